"""``diffclf demo``: what it runs works, from an empty folder."""

import re
from pathlib import Path

from lightning_diffclf.commands import arguments, main
from lightning_diffclf.commands.demo import demo_commands

SMALLER = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=2"),
    *("--model.hidden_size=16", "--model.depth=1", "--model.num_heads=2", "--model.warmup_steps=1"),
    *("--classifier.draws=2", "--classifier.fit_images=2", "--samples.steps=1", "--trainer.enable_progress_bar=false"),
]


def test_it_trains_and_classifies_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    """It shows shares in per cent, where everything is, and nothing internal."""
    monkeypatch.chdir(tmp_path)
    given = arguments.demo(["--run_dir", "there", *SMALLER])
    assert (given.run_dir, given.flags) == ("there", SMALLER)
    fit, everything, *others = demo_commands(given.run_dir, given.flags)
    for command in (fit, everything):
        main(command)
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"network: net \(DiT, (\d+\.\d K)\); \1 weights are trained trained 2 steps; in there: ", shown), (
        shown
    )
    assert re.search(r"accuracy │ \d+\.\d\d%, 95 % interval \d+\.\d\d to \d+\.\d\d%", shown), shown
    assert "network calls │ 20.0 an image │" in shown  # all of them: nothing was saved
    for internal in ("FLOPs", "diffclf_metrics", "Trainable params", "already configured"):
        assert internal not in shown
    events = b"".join(path.read_bytes() for path in Path("there/tensorboard").rglob("events.*"))
    assert b"val/loss" in events
    assert b"hp_metric" not in events

    for command in others:
        main(command)
    assert "360 images of both runs" in capsys.readouterr().out
    assert {"samples.png", "evaluation", "all_draws", "checkpoints"} <= {path.name for path in Path("there").iterdir()}
    assert Path("there/evaluation/report.html").stat().st_size > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
