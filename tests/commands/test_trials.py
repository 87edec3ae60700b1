"""``diffclf attack`` and ``diffclf certify`` on checkpoints of both kinds of network."""

import json

import pytest

from lightning_diffclf import cli
from lightning_diffclf.commands import arguments
from lightning_diffclf.results.stored import read_table
from tests.test_readme import SMALLER

CPU = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("dit_digits", "timm_digits"):
        flags = [one for one in SMALLER["train.py"].split() if name == "dit_digits" or "--samples" not in one]
        cli.train([f"--config={name}.yaml", f"--run_dir={folder / name}", *flags, *CPU[:1]])
    return folder


@pytest.mark.parametrize("name", ["dit_digits", "timm_digits"])
def test_the_same_command_attacks_both_kinds_of_network(name, runs, capsys):
    own = ["--draws=2"] if name == "dit_digits" else []
    command = ["attack", "--ckpt", str(runs / name / "checkpoints" / "last.ckpt"), "--steps=2", *own, *CPU]
    cli.main([*command, "--limit=5", "--eps=16/255"])
    printed = capsys.readouterr().out
    assert f"APGD, linf, eps 0.06275 of images in [0, 1], {'2 fixed draws' if own else 'no draws'}" in printed
    assert "right under attack" in printed
    out = runs / name / "attack"
    assert f"results in {out}" in printed
    rows, report = read_table(out).to_pydict(), json.loads((out / "metrics.json").read_text())
    assert len(rows["id"]) == report["metrics"]["images"] == 5
    assert max(rows["distance"]) <= 16 / 255 + 1e-6
    assert report["settings"]["command"]
    cli.main([*command, "--limit=2", "--norm=l2"])  # in a folder of its own
    assert read_table(runs / name / "attack-2").num_rows == 2
    with pytest.raises(SystemExit, match=r"^error: settings: .*attack.norm: 'linf' there, 'l2' here"):
        cli.main([*command, "--limit=2", "--norm=l2", "--out", str(out)])


def test_certify_prints_a_row_for_each_radius(runs, capsys):
    command = ["certify", "--ckpt", str(runs / "dit_digits" / "checkpoints" / "last.ckpt"), *CPU]
    cli.main([*command, "--sigma=0.2", "--n0=4", "--n=12", "--alpha=0.05", "--draws=1", "--limit=2", "--radii=0,1/8,3"])
    printed = capsys.readouterr().out
    assert "sigma 0.2, n 12, alpha 0.05, 1 fixed draw, 320 network calls an image" in printed  # 16 (10 + 10)
    assert [line.split()[1] for line in printed.splitlines() if "%)" in line] == ["0", "0.125"]
    assert read_table(runs / "dit_digits" / "certification").num_rows == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["attack", "--eps=8"], r"eps: 8.0, expected a positive radius in units of images in \[0, 1\]"),
        (["attack", "--draws=0"], "draws: 0, expected at least 1"),
        (["attack", "--limit=0"], "limit: 0, expected at least 1"),
        (["certify", "--alpha=2"], "alpha: 2.0, expected a probability"),
        (["certify", "--sigma=64"], "sigma: 64.0, expected a standard deviation above 0"),
        (["attack"], "checkpoint: no file 'missing.ckpt'"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(args, message):
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        cli.main([*args, "--ckpt", "missing.ckpt"])


def test_a_network_without_weights_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: checkpoint: none given, and the .* weights .* are random"):
        cli.main(["attack", "--config=dit_digits.yaml", f"--run_dir={tmp_path}", *CPU])


@pytest.mark.parametrize("flag", ["--plan", "--classifier.corruption=gaussian_noise/3"])
def test_what_only_evaluations_do_is_refused(flag, runs):
    name = flag.strip("-").rpartition(".")[2].partition("=")[0]
    with pytest.raises(SystemExit, match=rf"^error: classifier\.{name}: .* is of evaluations, expected none here"):
        cli.main(["attack", "--ckpt", str(runs / "timm_digits" / "checkpoints" / "last.ckpt"), flag, *CPU])


def test_jobs_take_parts_that_are_merged(runs, tmp_path, capsys):
    ckpt = str(runs / "timm_digits" / "checkpoints" / "last.ckpt")
    command = ["attack", "--ckpt", ckpt, "--steps=1", "--limit=5", "--batch_size=2", "--eps=0.1", *CPU]
    for number in (1, 2):
        cli.main([*command, f"--part={number}/2"])
    parts = [runs / "timm_digits" / f"attack-{number}of2" for number in (1, 2)]
    assert [read_table(part).num_rows for part in parts] == [3, 2]  # groups of 2, 2 and 1
    cli.main(["merge", *map(str, parts), "--out", str(tmp_path / "all")])
    assert "right under attack" in capsys.readouterr().out.partition("merged into")[0].rpartition("results in")[2]
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["metrics"]["images"] == 5
    with pytest.raises(SystemExit, match=r"^error: .*part: '3/2', expected i/n"):
        cli.main([*command, "--part=3/2"])


def test_numbers_may_be_fractions(capsys):
    assert arguments.attack(["--ckpt=x", "--eps", "8/255"]).eps == 8 / 255 == arguments.attack(["--ckpt=x"]).eps
    assert arguments.attack(["--ckpt=x", "--norm=l2"]).eps == 0.5
    for wrong in ("8/0", "a lot"):
        with pytest.raises(SystemExit):
            arguments.attack(["--ckpt=x", "--eps", wrong])
        assert f"{wrong!r}, expected a number such as 0.03 or 8/255" in capsys.readouterr().err
