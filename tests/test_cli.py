"""The command line as users type it. Every test works in a folder of its own, not in the repository."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import lightning_diffclf
from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws, LikelihoodRatio, LinearProbe, Recipe, cli
from lightning_diffclf.callbacks import loggers
from lightning_diffclf.classifier.checks import resolve_candidates
from lightning_diffclf.cli import DiffClfCLI, evaluate, main, read_checkpoint, train
from lightning_diffclf.commands import telling
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.errors import UserError
from lightning_diffclf.modules.checkpoints import trained_module
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[1]

QUICK = [
    "--config=dit_digits.yaml",
    "--trainer.max_steps=4",
    "--trainer.val_check_interval=4",
    "--trainer.enable_progress_bar=false",
    "--checkpoint.every_n_train_steps=2",
    "--model.hidden_size=16",
    "--model.depth=1",
    "--model.num_heads=2",
    "--model.warmup_steps=1",
    "--data.batch_size=32",
    "--classifier.draws=3",
    "--classifier.fit_images=4",
    "--samples.columns=2",
    "--samples.steps=2",
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "digits"
    train([*QUICK, f"--run_dir={folder}"])
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def last(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / "last.ckpt"


def fails(capsys, command, args) -> str:
    """The one error message of a command that must fail."""
    with pytest.raises(SystemExit) as exit_info:
        command(args)
    return f"{exit_info.value.code if isinstance(exit_info.value.code, str) else ''}{capsys.readouterr().err}"


def test_training_leaves_everything_behind(run_dir):
    assert (run_dir / "samples.png").stat().st_size > 1000
    logged = (run_dir / "logs" / "version_0" / "metrics.csv").read_text()
    assert "diffclf/accuracy" in logged
    assert "val/loss" in logged
    config = yaml.safe_load((run_dir / "logs" / "version_0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["hidden_size"] == 16
    checkpoint = read_checkpoint(last(run_dir))
    assert checkpoint["global_step"] == 4
    assert checkpoint["current_model_state"].keys() == checkpoint["state_dict"].keys()
    assert ClassConditionalDiT.load_from_checkpoint(last(run_dir)).net.blocks[0].attn.num_heads == 2
    assert trained_module(last(run_dir)).net.blocks[0].attn.num_heads == 2


def test_evaluate_needs_the_checkpoint_alone_and_flags_override(run_dir, capsys, tmp_path):
    evaluate([f"--ckpt={last(run_dir)}", "--trainer.enable_progress_bar=false"])
    first = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    assert first["metrics"]["images"] == 360
    assert first["metrics"]["nfe_per_image"] == 30
    assert first["settings"]["recipe"]["draws"] == 3
    assert "accuracy" in capsys.readouterr().out
    for name in ("predictions.parquet", "confusion.png", "timesteps.png"):
        assert (run_dir / "evaluation" / name).is_file()
    evaluate(
        [
            f"--ckpt={last(run_dir)}",
            f"--out={tmp_path / 'out'}",
            "--trainer.enable_progress_bar=false",
            "--classifier.draws=10",
            "--classifier.elimination=Stages",
            "--classifier.elimination.samples=[2,10]",
            "--classifier.elimination.keep=[3,1]",
        ]
    )
    second = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert second["settings"]["recipe"]["elimination"] | {"class": ""} == {
        "class": "",
        "samples": [2, 10],
        "keep": [3, 1],
    }
    assert second["metrics"]["nfe_per_image"] == 2 * 10 + 8 * 3
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    assert sorted(set(rows["draws_K"][0])) == [2, 10]


def test_a_classifier_from_the_checkpoint_alone(run_dir):
    """It decides as the evaluation of the checkpoint does, by the recipe of the run."""
    evaluate([f"--ckpt={last(run_dir)}", "--out=out", "--trainer.enable_progress_bar=false"])
    rows = pq.read_table("out/predictions.parquet").to_pydict()
    data = DigitsDataModule()
    data.setup()
    batch = {name: values[:20] for name, values in data.test.parts.items()}
    classifier = DiffusionClassifier.from_checkpoint(last(run_dir))
    results = {str(one.image_id): one for one in classifier(batch["image"], ids=batch["id"])}
    assert classifier.recipe.draws == 3
    for image_id, one in results.items():
        row = rows["id"].index(image_id)
        assert (one.prediction, one.nfe) == (rows["prediction"][row], rows["nfe"][row])
        np.testing.assert_allclose(one.scores_K, rows["scores_K"][row], rtol=1e-5)
    module = ClassConditionalDiT.load_from_checkpoint(last(run_dir))
    assert "DigitsDataModule" in module.generate_model_card(evaluation="out").text


def test_settings_of_a_checkpoint_are_overridden_by_keyword(run_dir):
    rule = LikelihoodRatio(0.2)
    found = DiffusionClassifier.from_checkpoint(last(run_dir), raw=True, draws=7, elimination=rule, microbatch=5)
    assert (found.recipe.draws, found.recipe.elimination, found.microbatch) == (7, rule, 5)
    with pytest.raises(TypeError, match="no argument 'drawz'; did you mean 'draws'"):
        DiffusionClassifier.from_checkpoint(last(run_dir), drawz=7)
    weights = read_checkpoint(last(run_dir))["current_model_state"]
    assert all(torch.equal(value, weights[name]) for name, value in found.denoiser.state_dict().items())


def test_settings_of_a_checkpoint_run_nothing(run_dir):
    checkpoint = read_checkpoint(last(run_dir))
    settings = yaml.safe_load(checkpoint[cli.CONFIG_KEY])
    settings["classifier"]["elimination"] = {"class_path": "os.system", "init_args": {"command": "touch harm"}}
    torch.save(checkpoint | {cli.CONFIG_KEY: yaml.safe_dump(settings)}, "evil.ckpt")
    with pytest.raises(ValueError, match=r"classifier.elimination.class_path: 'os.system'"):
        DiffusionClassifier.from_checkpoint("evil.ckpt")
    assert not Path("harm").exists()
    del checkpoint[cli.CONFIG_KEY]  # of a Trainer in Python
    torch.save(checkpoint, "plain.ckpt")
    assert DiffusionClassifier.from_checkpoint("plain.ckpt", draws=4).recipe == Recipe(draws=4)
    with pytest.raises(FileNotFoundError, match=r"no file 'none.ckpt'"):
        DiffusionClassifier.from_checkpoint("none.ckpt")


def test_the_same_command_again_goes_on(run_dir, tmp_path, capsys):
    folder = tmp_path / "again"
    short = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    train([*QUICK, f"--run_dir={folder}", *short, "--samples.columns=0"])
    train([*QUICK, f"--run_dir={folder}", "--samples.columns=0"])
    assert f"resuming from {folder}" in capsys.readouterr().out
    again, straight = (read_checkpoint(last(d)) for d in (folder, run_dir))
    assert again["global_step"] == 4
    for name in ("logs", "tensorboard"):
        assert [p.name for p in (folder / name).iterdir()] == ["version_0"]
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["val/loss"]] == ["1", "3"]
    assert not list(tmp_path.rglob("lightning_logs"))
    train([*QUICK, f"--run_dir={folder}", "--samples.columns=0", "--ckpt_path=null", *short])
    assert sorted(p.name for p in (folder / "logs").iterdir()) == ["version_0", "version_1"]
    assert again["state_dict"].keys() == straight["state_dict"].keys()


def test_parts_are_disjoint_and_make_up_the_whole(run_dir, tmp_path, capsys):
    quiet = "--trainer.enable_progress_bar=false"
    evaluate([f"--ckpt={last(run_dir)}", f"--out={tmp_path / 'whole'}", quiet])
    for i in (1, 2, 3):
        evaluate([f"--ckpt={last(run_dir)}", f"--part={i}/3", quiet])
    folders = [run_dir / f"evaluation-{i}of3" for i in (1, 2, 3)]  # of their own, if none is named
    parts = [pq.read_table(folder / "predictions.parquet") for folder in folders]
    assert sum(part.num_rows for part in parts) == 360
    assert all(90 < part.num_rows < 150 for part in parts)
    main(["merge", *map(str, folders), f"--out={tmp_path / 'merged'}"])
    whole, merged = (pq.read_table(tmp_path / name / "predictions.parquet").to_pydict() for name in ("whole", "merged"))
    assert all(whole[name] == merged[name] for name in ("id", "label", "prediction", "nfe"))
    np.testing.assert_allclose(whole["scores_K"], merged["scores_K"], rtol=1e-4)
    for wrong in ("4/3", "0/3", "two/3", "3"):
        assert f"part: '{wrong}', expected i/n" in fails(
            capsys, evaluate, [f"--ckpt={last(run_dir)}", f"--part={wrong}"]
        )


def test_published_weights_are_evaluated_and_trained_on(tmp_path, capsys):
    small = ["--model.hidden_size=16", "--model.depth=1", "--model.num_heads=2"]
    trained = ClassConditionalDiT(
        input_size=8,
        in_channels=1,
        num_classes=10,
        hidden_size=16,
        depth=1,
        num_heads=2,
        patch_size=2,
        latents=False,
        learn_sigma=False,
        schedule="rectified_flow",
    )
    for i, p in enumerate(trained.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    torch.save(trained.net.state_dict(), "published.pt")
    quiet = ["--trainer.enable_progress_bar=false", "--classifier.draws=3"]
    config = ["--config=dit_digits.yaml", *small, *quiet, f"--out={tmp_path / 'out'}"]
    evaluate(["--ckpt=published.pt", *config])
    assert "weights of published.pt" in capsys.readouterr().out
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    data = DigitsDataModule(eval_batch_size=360)
    data.setup()
    batch = next(iter(data.test_dataloader()))
    expected = list(DiffusionClassifier(trained.eval(), draws=Draws(3))(batch["image"][:20], ids=batch["id"][:20]))
    predictions = dict(zip(rows["id"], rows["prediction"], strict=True))
    assert [predictions[str(one.image_id)] for one in expected] == [one.prediction for one in expected]
    assert "give --config as well" in fails(capsys, evaluate, ["--ckpt=published.pt"])
    said = fails(capsys, evaluate, ["--ckpt=published.pt", "--config=dit_digits.yaml", *quiet])
    assert "does not fit the network as configured" in said
    # training begins with them once, and then resumes from its own checkpoint
    begin = [*QUICK, "--run_dir=run", "--warm_start=published.pt", "--samples.columns=0", "--model.lr=1e-12"]
    train([*begin, "--trainer.max_steps=2", "--trainer.val_check_interval=2"])
    assert "weights of published.pt" in capsys.readouterr().out
    for name, value in read_checkpoint(last(Path("run")))["state_dict"].items():
        torch.testing.assert_close(value, trained.state_dict()[name], atol=1e-6, rtol=0)
    train(begin)
    said = capsys.readouterr().out
    assert "resuming from run" in said
    assert "weights of" not in said
    torch.save({"state_dict": {}}, "empty.ckpt")
    assert "does not fit" in fails(capsys, train, [*QUICK, "--run_dir=other", "--warm_start=empty.ckpt"])


@pytest.mark.ddp
def test_another_number_of_processes_goes_on_with_the_same_batches(tmp_path, caplog):
    """The two ranks are real processes, in another folder, which Lightning starts by running the same command again."""
    settings = [*QUICK, "--model.decay=none", "--samples.columns=0", "--classifier.fit_images=0"]
    settings += ["--trainer.accelerator=cpu", "--trainer.val_check_interval=2"]
    train([*settings, "--run_dir=straight"])
    command = [sys.executable, str(ROOT / "train.py"), *settings, "--run_dir=changed"]
    command += ["--trainer.max_steps=2", "--trainer.devices=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    train([*settings, "--run_dir=changed"])
    assert "resuming with 1 processes in place of 2" in caplog.text
    straight, changed = (read_checkpoint(Path(d) / "checkpoints" / "last.ckpt") for d in ("straight", "changed"))
    assert straight["global_step"] == changed["global_step"] == 4
    for name, value in straight["current_model_state"].items():
        torch.testing.assert_close(changed["current_model_state"][name], value, rtol=1e-3, atol=1e-5)


def test_subcommands(run_dir, capsys):
    config = f"--config={run_dir / 'logs' / 'version_0' / 'config.yaml'}"
    for subcommand in ("validate", "predict"):
        out = Path(f"out-{subcommand}")
        main([subcommand, config, f"--ckpt_path={last(run_dir)}", f"--classifier.output_dir={out}"])
        assert pq.read_table(out / "predictions.parquet").num_rows == 360


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config=nothing.yaml"], "no file 'nothing.yaml', neither here nor in"),
        (["--config=dit_digts.yaml"], "did you mean 'dit_digits.yaml'?"),
        (["--config=dit_digits"], "did you mean 'dit_digits.yaml'?"),
        ([*QUICK, "--model.hiden_size=3"], "no option 'model.hiden_size'; did you mean 'model.hidden_size'?"),
        ([*QUICK, "--model.hidden_size=wide"], "error: model.hidden_size: 'wide', expected int\n"),
        ([*QUICK, "--classifier.draws=many"], "error: classifier.draws: 'many', expected int\n"),
        ([*QUICK, "--classifier.lss=l2"], "no option '--classifier.lss'; did you mean '--classifier.loss'?"),
        ([*QUICK, "--trainer.max_step=50"], "no option '--trainer.max_step'; did you mean '--trainer.max_steps'?"),
        ([*QUICK, "--classifier.draw=50"], "did you mean '--classifier.draws'?"),
        ([*QUICK, "--config=step.yaml"], "no option 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        (
            [*QUICK, "--model=ClassConditionalDit"],
            "model: no class 'ClassConditionalDit'; did you mean 'ClassConditionalDiT'",
        ),
        ([*QUICK, "--data=lightning_diffclf.data.digits.Digits"], "did you mean 'DigitsDataModule'?"),
        (
            [*QUICK, "--classifier.elimination=Stage"],
            "classifier.elimination: no class 'Stage'; did you mean 'Stages'?",
        ),
        ([*QUICK, "--classifier.draws=2000"], "2000 draws: the schedule allows 1 … 1000"),
        ([*QUICK, "--model.schedule=linear", "--classifier.draws=2000"], "2000 draws"),
        ([*QUICK, "--classifier.loss=kl"], "'kl' needs a discrete schedule"),
        ([*QUICK, "--model.learn_sigma=true"], "learn_sigma"),
        ([*QUICK, "--model.input_size=16"], r"images: shape (32, 1, 8, 8), expected (B, 1, 16, 16)"),
    ],
)
def test_bad_settings_give_one_clear_error(args, message, capsys):
    if message.startswith("2000 draws: the schedule allows"):
        args = [*args, "--model.schedule=linear"]
    Path("step.yaml").write_text("trainer:\n  max_step: 3\n")
    told = fails(capsys, train, [*args, "--run_dir=x"])
    assert message in told
    assert "usage:" not in told
    assert not Path("x/checkpoints").exists()


def test_the_version_and_unknown_commands(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"diffclf {lightning_diffclf.__version__}\n"
    assert "no command 'classif'; did you mean 'classify'?" in fails(capsys, main, ["classif"])
    assert "no command 'tset'; did you mean 'test'?" in fails(capsys, main, ["tset", "--config=dit_digits.yaml"])


def test_options_come_from_flags_and_files_alone(capsys, monkeypatch):
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "7")
    told = fails(capsys, train, [*QUICK, "--run_dir=x"])
    assert "environment: PL_FIT__TRAINER__MAX_STEPS is not read; expected --trainer.max_steps 7" in told


def test_a_logger_without_its_package_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(loggers.PACKAGES, "WandbLogger", ("there_is_no_wandb", "wandb"))
    for flag in ("--trainer.logger=WandbLogger", "--trainer.logger=[WandbLogger]"):
        assert "needs wandb, which is not installed: pip install wandb" in fails(capsys, train, [*QUICK, flag])


def test_bad_checkpoints_give_one_clear_error(run_dir, capsys, tmp_path):
    assert "no file 'none.ckpt'" in fails(capsys, evaluate, ["--ckpt=none.ckpt"])
    Path("text.ckpt").write_text("hello")
    assert "'text.ckpt' cannot be read (it is no file of torch.save)" in fails(capsys, evaluate, ["--ckpt=text.ckpt"])
    torch.save({"weights": torch.zeros(1)}, "foreign.ckpt")
    assert "'foreign.ckpt' has no weights of a DiT" in fails(capsys, evaluate, ["--ckpt=foreign.ckpt"])
    torch.save({"state_dict": {"layer.weight": torch.zeros(1)}}, "other.ckpt")
    assert "'other.ckpt' does not say how it was made" in fails(capsys, evaluate, ["--ckpt=other.ckpt"])
    told = fails(capsys, evaluate, ["--ckpt=other.ckpt", "--config=dit_digits.yaml", "--out=o"])
    assert "does not fit ClassConditionalDiT as configured" in told
    assert "1 tensors are unknown here, such as layer.weight" in told
    told = fails(capsys, evaluate, [f"--ckpt={last(run_dir)}", "--model.hidden_size=32", "--out=o"])
    assert "is (16,) there and (32,) here" in told
    told = fails(capsys, evaluate, [f"--ckpt={last(run_dir)}", "--model.schedule=linear", "--out=o"])
    assert "was trained with schedule 'rectified_flow', but schedule is configured as 'linear'" in told
    told = fails(capsys, train, [*QUICK, f"--run_dir={run_dir}", "--model.depth=2"])
    assert "give another --run_dir" in told
    assert not Path("o").exists()
    assert "give --ckpt PATH, or --config FILE" in fails(capsys, evaluate, [])
    assert "no option '--confg'; did you mean '--config'?" in fails(capsys, evaluate, ["--confg=dit_digits.yaml"])


def test_a_network_without_a_checkpoint_is_evaluated_only_if_that_is_meant(capsys):
    quick = ["--config=dit_digits.yaml", "--model.depth=1", "--trainer.limit_test_batches=1", "--classifier.draws=1"]
    quick += ["--run_dir=x", "--trainer.enable_progress_bar=false", "--data.eval_batch_size=2"]
    for command, args in ((evaluate, [*quick, "--out=x/evaluation"]), (main, ["predict", *quick])):
        told = fails(capsys, command, args)
        assert re.search(r"checkpoint: none given, and the [\d,]+ weights of ClassConditionalDiT are random", told)
        assert "--untrained" in told
    assert not Path("x").exists()
    evaluate([*quick, "--plan", "--out=x/evaluation"])  # what it will cost, before it is trained
    assert not Path("x").exists()
    evaluate([*quick, "--untrained", "--out=x/evaluation"])
    assert json.loads(Path("x/evaluation/metrics.json").read_text())["metrics"]["images"] == 2


@pytest.fixture(scope="module")
def kept(run_dir) -> Path:
    """Errors and distances of the checkpoint, without elimination."""
    out = run_dir / "kept"
    quiet = "--trainer.enable_progress_bar=false"
    evaluate([f"--ckpt={last(run_dir)}", f"--out={out}", "--keep-errors", "distances", quiet, "--classifier.draws=20"])
    return out / "errors.parquet"


def test_replay_says_what_an_evaluation_finds(kept, run_dir, capsys):
    settings = {"elimination": "PairedTest", "elimination.alpha": "0.1", "weights": "velocity", "budget": "150"}
    flags = [f"--classifier.{name}={value}" for name, value in settings.items()]
    flags += ["--trainer.enable_progress_bar=false", "--classifier.draws=20", "--out=real"]
    evaluate([f"--ckpt={last(run_dir)}", *flags])
    real = json.loads(Path("real/metrics.json").read_text())["metrics"]
    capsys.readouterr()
    main(["replay", str(kept), *[f"--{name}={value}" for name, value in settings.items()], "--out", "table.json"])
    assert "360 images, 20 draws, l2" in capsys.readouterr().out
    table = json.loads(Path("table.json").read_text())
    (found,) = table["replays"]
    assert found["elimination"] == "PairedTest(alpha=0.1, growth=1.2)"
    assert found["images"] == found["labelled"] == real["images"]
    assert found["accuracy"] == pytest.approx(real["accuracy"])
    assert found["nfe_per_image"] == pytest.approx(real["nfe_per_image"])
    assert found["factor"] == pytest.approx(200 / real["nfe_per_image"])
    assert (table["draws"], table["seed"], found["budget"]) == (20, 0, 150)


def test_replay_compares_the_usual_rules(kept, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    main(["replay", str(kept), "--out=all.json"])
    shown, rows = capsys.readouterr().out, json.loads(Path("all.json").read_text())["replays"]
    names = [row["elimination"].split("(")[0] for row in rows]
    assert names == ["Exhaustive", "Stages", *["PairedTest"] * 3, *["LikelihoodRatio"] * 3]
    assert all(row["elimination"] in shown for row in rows)
    assert rows[0]["agreement"] == rows[0]["factor"] == 1
    exhaustive = json.loads((kept.parent / "metrics.json").read_text())["metrics"]["accuracy"]
    assert rows[0]["accuracy"] == pytest.approx(exhaustive)


def test_errors_alone_hold_no_distances(run_dir, capsys):
    flags = [
        "--out=alone",
        "--keep-errors",
        "--trainer.enable_progress_bar=false",
        "--classifier.elimination=PairedTest",
    ]
    evaluate([f"--ckpt={last(run_dir)}", *flags])
    stored = pq.read_table("alone/errors.parquet")
    assert "distances" not in stored.column_names
    assert stored.num_rows == 360
    for rule in ("LikelihoodRatio", "Exhaustive"):
        told = fails(capsys, main, ["replay", "alone/errors.parquet", f"--elimination={rule}"])
        expected = "`--keep-errors distances`" if rule == "LikelihoodRatio" else "keep errors of an Exhaustive run"
        assert expected in told
        assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["none.parquet"], "no file 'none.parquet'"),
        (["KEPT", "--elimination=Staged"], "Staged"),
        (["KEPT", "--elimination=Stages", "--elimination.samples=[2,10]"], "spends 10 draws, but 20 are stored"),
        (["KEPT", "--elimination=PairedTest", "--elimination.alpha=0.7"], "alpha 0.7"),
        (["KEPT", "--weights=heavy"], "weights: 'heavy'"),
        (["KEPT", "--weights=[1.0,2.0]"], "weights: 2 numbers for 20 draws"),
        (["KEPT", "--budget=2"], "budget: 2 network calls for the 10 candidates"),
        (["KEPT", "--nonsense=2"], "nonsense"),
        ([], "file"),
    ],
)
def test_bad_replays_give_one_clear_error(flags, message, kept, capsys):
    told = fails(capsys, main, ["replay", *[str(kept) if flag == "KEPT" else flag for flag in flags]])
    assert message in told
    assert "usage:" not in told
    assert "Traceback" not in told


def test_a_plan_writes_nothing(run_dir, capsys):
    before = sorted(run_dir.rglob("*"))
    flags = ["--plan", "--classifier.elimination=PairedTest", "--trainer.enable_progress_bar=false"]
    evaluate([f"--ckpt={last(run_dir)}", *flags])
    shown = capsys.readouterr().out
    for row in ("images", "360", "candidates", "NFE/image, estimate", "rows per second", "FLOPs per row", "hours"):
        assert row in shown
    assert "accuracy" not in shown
    assert sorted(run_dir.rglob("*")) == before
    assert not list(Path().iterdir())


def test_proposals_by_name(run_dir, tmp_path, capsys):
    flags = [f"--ckpt={last(run_dir)}", "--trainer.enable_progress_bar=false", "--trainer.limit_test_batches=1"]
    probe = ["--classifier.proposal=LinearProbe", "--classifier.proposal.top=3", "--classifier.proposal.images=700"]
    evaluate([*flags, *probe, "--out=probe"])
    assert "LinearProbe: fitted to 700 training images" in capsys.readouterr().out
    evaluate([*flags, *probe, "--out=probe", "--trainer.limit_test_batches=2"])
    assert "LinearProbe: fitted" not in capsys.readouterr().out
    rows = pq.read_table("probe/predictions.parquet").to_pydict()
    assert (len(rows["id"]), set(map(len, rows["candidates_K"])), set(rows["search_nfe"])) == (120, {3}, {1})
    data = DigitsDataModule()
    data.setup()
    module, train = trained_module(last(run_dir)), data.training_images(700)
    fitted = LinearProbe(top=3).fit(module, ((batch["image"], batch["label"]) for batch in train))
    images, labels = (data.test.parts[name][:120] for name in ("image", "label"))
    recall = json.loads(Path("probe/metrics.json").read_text())["metrics"]["proposal_recall"]
    assert recall == fitted.recall(module, images, labels.tolist()) > 0.3
    evaluate([*flags, "--classifier.proposal=GradientSearch", "--classifier.proposal.most=4", "--out=search"])
    numbers = json.loads(Path("search/metrics.json").read_text())["metrics"]
    assert numbers["nfe_per_image"] == numbers["search_nfe_per_image"] + 3 * numbers["kept_per_image"]
    covariance = ["--classifier.proposal=CovarianceSearch", "--classifier.proposal.anchors=4"]
    evaluate([*flags, *covariance, "--classifier.proposal.images=20", "--out=covariance"])
    told = "CovarianceSearch: fitted to 20 training images, 34 network calls each; measured inflation "
    assert told in capsys.readouterr().out  # ten candidates, and three of them at eight draws
    assert json.loads(Path("covariance/metrics.json").read_text())["metrics"]["search_nfe_per_image"] == 8
    main(["report", "search"])
    assert "NFE of the search" in Path("search/report.html").read_text()
    capsys.readouterr()
    evaluate([*flags, "--classifier.proposal=GradientSearch", "--plan"])
    shown = capsys.readouterr().out
    assert "NFE/image, of the proposal" in shown
    assert "GradientSearch(draws=6" in shown
    words = ["--config=sd_digits.yaml", "--classifier.proposal=LinearProbe", "--data=ZeroShotDataModule"]
    told = fails(capsys, evaluate, [*words, f"--data.root={tmp_path}", "--out=none"])
    assert "ZeroShotDataModule" in told
    assert not Path("none").exists()


@pytest.mark.ddp
def test_two_ranks_plan_together(run_dir, tmp_path):
    evaluation = ["evaluate", f"--ckpt={last(run_dir)}", f"--out={tmp_path / 'out'}", "--trainer.accelerator=cpu"]
    [[plan, other]] = run_ranks("command.py", (2, *evaluation, "--trainer.devices=2", "--plan"))
    assert plan.count("plan of the evaluation") == 1
    assert "on 2 ranks" in plan
    assert " 360 " in plan
    assert "plan" not in other
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_keep_errors_together(run_dir, tmp_path):
    """Both are real processes, as those of training."""
    command = [sys.executable, str(ROOT / "evaluate.py"), f"--ckpt={last(run_dir)}", "--out=out", "--keep-errors"]
    command += ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    tables = [pq.read_table(tmp_path / "out" / f"{name}.parquet") for name in ("errors", "predictions")]
    assert tables[0]["id"].to_pylist() == tables[1]["id"].to_pylist()
    assert tables[0].num_rows == 360
    assert not list((tmp_path / "out").glob("*rank*"))


def test_the_public_option_list_is_that_of_the_signatures(capsys):
    with pytest.raises(SystemExit):
        DiffClfCLI(["fit", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--run_dir", "--classifier.draws", "--ema.decay", "--checkpoint.save_last", "--samples.columns"):
        assert flag in shown
    assert "Rule that drops candidates early" in shown  # help texts come from the docstrings


def test_arguments_that_a_class_refuses_are_named_as_options():
    for option in ("model.depth", "data.batch_size", "classifier.draws"):
        with pytest.raises(SystemExit, match=rf"^error: {re.escape(option)}: 0, expected at least 1$"):
            train(["--config", "dit_digits.yaml", f"--{option}=0"])


def test_only_errors_meant_for_the_user_become_one_line():
    def wrapped():
        try:
            raise UserError("depth: 0, expected at least 1")
        except UserError as error:
            raise RuntimeError("instantiation failed") from error

    def met_while_telling():
        try:
            raise UserError("depth: 0, expected at least 1")
        except UserError:
            {}["a defect"]

    with pytest.raises(SystemExit, match="error: depth: 0, expected at least 1"):
        telling(wrapped)
    with pytest.raises(KeyError):
        telling(met_while_telling)
    for defect in (ValueError, TypeError, OSError):
        with pytest.raises(defect):
            telling(lambda kind=defect: resolve_candidates(Raises(kind), 1, 5))


class Raises(list):
    """Candidates whose length raises within a function of ours."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        raise self.kind("a defect")
