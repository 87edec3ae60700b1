"""``diffclf demo``: what it runs works, from an empty folder."""

from pathlib import Path

from lightning_diffclf.commands import arguments, main
from lightning_diffclf.commands.demo import demo_commands

SMALLER = [
    *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=2"),
    *("--model.hidden_size=16", "--model.depth=1", "--model.num_heads=2", "--model.warmup_steps=1"),
    *("--classifier.draws=2", "--classifier.fit_images=2", "--samples.steps=1", "--trainer.enable_progress_bar=false"),
]


def test_it_trains_and_classifies_from_an_empty_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = arguments.demo(["--run_dir", "there", *SMALLER])
    assert (given.run_dir, given.flags) == ("there", SMALLER)
    for command in demo_commands(given.run_dir, given.flags):
        main(command)
    shown = capsys.readouterr().out
    assert "accuracy" in shown
    assert "360" in shown  # test images
    assert {"samples.png", "evaluation", "checkpoints"} <= {path.name for path in Path("there").iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
