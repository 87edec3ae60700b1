"""What a suite asks for, how it is divided, what it skips; one that runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_diffclf.commands import cells, main, run
from lightning_diffclf.commands import suite as suite_module
from lightning_diffclf.commands.cells import commands_of, folder_of, is_done, run_command, slug
from lightning_diffclf.commands.suite import RUNS, Suite, divided, name_of, pieces, planned
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.paper import Cell
from tests.baselines.evaluation import evaluate
from tests.data.test_corruptions import Counting

SUITE = {
    "out": "runs/all",
    "flags": {"seed_everything": 1},
    "models": {"A": {"config": ["sd_digits.yaml", "compile.yaml"]}, "B": {"ckpt": "b.ckpt"}},
    "data": {"plain": None, "noisy": {"classifier.corruption": "gaussian_noise/3"}},
    "rules": {
        "all": {"classifier.draws": 50},
        "LR": {"config": "likelihood_ratio.yaml", "classifier.elimination": {"class_path": "PairedTest"}},
    },
    "exclude": [{"model": "B", "rule": ["LR"], "data": "noisy"}],
}


def write(folder: Path, **changes) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (SUITE | changes).items() if v is not None}, sort_keys=False))
    return str(path)


def test_it_is_models_by_data_by_rules_without_what_is_excluded(tmp_path):
    suite = Suite.read(write(tmp_path))
    assert suite.out == Path("runs/all")
    names = [name_of(cell) for cell in suite.cells]
    assert names == [
        *("A, all, plain", "A, LR, plain", "A, all, noisy", "A, LR, noisy"),
        *("B, all, plain", "B, LR, plain", "B, all, noisy"),
    ]
    by_name = dict(zip(names, suite.cells, strict=True))
    configs = "--config=sd_digits.yaml", "--config=compile.yaml", "--config=likelihood_ratio.yaml"
    assert by_name["A, LR, noisy"].flags == (
        *configs,
        "--seed_everything=1",
        "--classifier.corruption=gaussian_noise/3",
        '--classifier.elimination={"class_path": "PairedTest"}',
    )
    assert by_name["B, all, plain"].flags == ("--seed_everything=1", "--ckpt=b.ckpt", "--classifier.draws=50")
    one = Suite.read(write(tmp_path, data=None, rules=None, exclude=None, out=None))
    assert [(cell.row, cell.column) for cell in one.cells] == [("A", "data"), ("B", "data")]
    assert one.out == Path("runs/suite")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {}}, "no setting 'model'; did you mean 'models'"),
        ({"models": None}, "models: nothing, expected names"),
        ({"models": ["A"]}, r"models: \['A'\], expected names"),
        ({"models": {"A": "sd.yaml"}}, "models: A: 'sd.yaml', expected flags by name"),
        ({"models": {"A": {"out": "x"}}}, "out is no flag of a cell"),
        ({"models": {"A b": {}, "a-B": {}}, "exclude": None}, "'A b, all, plain' and 'a-B, all, plain' would have"),
        ({"exclude": [{"model": "b"}]}, "exclude: no model 'b'; did you mean 'B'"),
        ({"exclude": [{"rules": "LR"}]}, "exclude: no axis 'rules'; did you mean 'rule'"),
        ({"exclude": {"model": "B"}}, "expected a list such as"),
        ({"exclude": [{"model": ["A", "B"]}]}, "all combinations are excluded"),
        ({"out": 3}, "out: 3, expected the name of a folder"),
    ],
)
def test_mistakes_in_the_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Suite.read(write(tmp_path, **changes))


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="suite: no file"):
        Suite.read(tmp_path / "nothing.yaml")
    for text, message in (("- a\n", "holds a list"), ("a: [", "is no YAML file")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            Suite.read(tmp_path / "x.yaml")


NAMES = st.text("abcdef", min_size=1, max_size=4)


@given(st.dictionaries(NAMES, st.integers(0, 10**9), max_size=30), st.integers(1, 9))
def test_parts_are_disjoint_complete_balanced_and_the_same_for_all(costs, parts):
    lists = divided(costs, parts)
    assert sorted(name for one in lists for name in one) == sorted(costs)
    assert len(lists) == parts
    assert divided(dict(reversed(costs.items())), parts) == lists
    loads = [sum(costs[name] for name in one) for one in lists]
    # Graham 1969: within the mean and the dearest; moving the last of the fullest to the emptiest would not help
    assert max(loads) <= sum(loads) / parts + max(costs.values(), default=0)
    assert max(loads) - min(loads) <= max(costs.values(), default=0)
    for one, load in zip(lists, loads, strict=True):
        assert load - min((costs[name] for name in one), default=0) <= min(loads)


PLANNED = st.fixed_dictionaries({"nfe": st.integers(0, 10**9), "images": st.integers(1, 10**5)})


@given(st.dictionaries(NAMES, PLANNED, min_size=1, max_size=20), st.integers(1, 9))
def test_a_dear_cell_is_divided_by_its_images(plans, parts):
    found = pieces(plans, parts)
    total = sum(plan["nfe"] for plan in plans.values())
    for name, plan in plans.items():
        own = [piece for piece in found if piece.cell == name]
        assert sorted(piece.number for piece in own) == list(range(1, own[0].parts + 1))  # each image in one of them
        assert sum(found[piece] for piece in own) == pytest.approx(plan["nfe"])
        assert len(own) == 1 or len(own) <= plan["images"] / 20
    lists = divided(found, parts)
    assert sorted(piece for one in lists for piece in one) == sorted(found)
    loads = [sum(found[piece] for piece in one) for one in lists]
    if all(plan["images"] >= 40 * 9 * len(plans) for plan in plans.values()):  # enough to divide
        assert max(loads) <= 1.5 * total / parts + 1e-6


def test_parts_of_a_cell_are_joined_before_it_is_finished(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(cells, "run_command", lambda command, name: ran.append((command, name)))
    cell = Cell("a", "b", None, ("--config=x.yaml",))
    cells.run_part(cell, tmp_path, ["--y=1"], 2, 3)
    part = f"{tmp_path}/evaluation/part-2-of-3"
    assert ran == [(["evaluate", "--config=x.yaml", f"--out={part}", "--part=2/3", "--y=1"], "a, b")]
    for number in (1, 2):
        folder = cells.part_of(tmp_path, number, 3)
        folder.mkdir(parents=True)
        (folder / "metrics.json").touch()
        (folder / "predictions.parquet").touch()
    cells.part_of(tmp_path, 3, 3).mkdir()  # claimed, nothing decided yet
    cells.run_part(cell, tmp_path, [], 2, 3)  # done
    assert len(ran) == 1
    cells.run_cell(cell, tmp_path, [])
    out = f"--out={tmp_path}/evaluation"
    assert [command for command, _ in ran[1:]] == [
        ["merge", f"{tmp_path}/evaluation/part-1-of-3", part, out],
        ["evaluate", "--config=x.yaml", out],
    ]
    assert json.loads((tmp_path / cells.CELL).read_text())["flags"] == ["--config=x.yaml"]


def tiny(folder: Path, **changes) -> str:
    return write(
        folder,
        out=str(folder / "out"),
        flags=None,
        exclude=None,
        models={"CLIP": {"config": "clip_digits.yaml"}, "again": {"config": "clip_digits.yaml"}},
        data=None,
        rules=None,
        **changes,
    )


def test_what_is_done_is_skipped_and_shown(tmp_path, capsys, monkeypatch):
    """Evaluations of another network in the places of the cells: nothing is left to run."""
    monkeypatch.setenv("COLUMNS", "150")
    path = tiny(tmp_path)
    suite = Suite.read(path)
    folders = [folder_of(suite.out, RUNS, cell) for cell in suite.cells]
    assert not any(map(is_done, suite.cells, folders))
    evaluate(folders[0] / "evaluation", Counting(), DigitsDataModule(), limit=1)
    run("suite", [path, "--dry-run"])
    printed = capsys.readouterr().out
    assert "done" in printed
    assert "to do" in printed
    assert not (suite.out / "leaderboard.html").exists()
    evaluate(folders[1] / "evaluation", Counting(), DigitsDataModule(), limit=1, corruption="jpeg/1")
    with pytest.raises(SystemExit, match="error: leaderboard: 'again' and 'CLIP' are not of the same data"):
        main(["suite", path])
    os.rename(folders[1] / "evaluation", folders[1] / "other")
    evaluate(folders[1] / "evaluation", Counting(), DigitsDataModule(), limit=1)
    run("suite", [path])
    assert "| 1 | CLIP |" in (suite.out / "leaderboard.md").read_text()


def test_other_flags_are_another_cell(tmp_path, monkeypatch):
    cell = Cell("a", "b", None, ("--config=x.yaml",))
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.json").write_text("{}")
    assert is_done(cell, tmp_path)  # nobody says by which
    monkeypatch.setattr(cells, "run_command", lambda command, name: None)
    cells.run_cell(cell, tmp_path, ["--trainer.devices=2"])
    assert json.loads((tmp_path / cells.CELL).read_text())["flags"] == ["--config=x.yaml"]
    assert is_done(cell, tmp_path)
    assert not is_done(cell._replace(flags=("--config=y.yaml",)), tmp_path)
    assert not is_done(cell._replace(training=("--config=x.yaml",)), tmp_path)


def test_parts_need_plans_of_the_flags_that_are(tmp_path):
    path = tiny(tmp_path)
    suite = Suite.read(path)
    with pytest.raises(SystemExit, match=r"CLIP, data has no plan, .*first run `diffclf suite .*suite\.yaml --plan`"):
        main(["suite", path, "--part", "1/2"])
    with pytest.raises(SystemExit, match="part: '3/2', expected i/n"):
        main(["suite", path, "--part", "3/2"])
    plan = {"images": 10, "nfe_per_image": 2.0, "nfe": None, "hours": 0.1}
    for cell in suite.cells:
        folder = folder_of(suite.out, RUNS, cell)
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(json.dumps({"flags": list(cell.flags), "plan": plan}))
        assert planned(suite, cell) == plan
        assert planned(suite, cell._replace(flags=())) is None
    with pytest.raises(SystemExit, match="nobody knows how many images it has"):
        main(["suite", path, "--part", "1/2"])


def test_flags_that_are_not_understood_are_told_before_anything_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cells.subprocess, "Popen", lambda *_: pytest.fail("a process was started"))
    models = {"A": {"config": "clip_digits.yaml"}}
    path = write(tmp_path, exclude=None, models=models, data=None, flags={"classifier.drawz": 3}, rules=None)
    with pytest.raises(SystemExit, match="error: suite: A, data cannot be evaluated, as said above"):
        main(["suite", path])
    assert "did you mean '--classifier.draws'?" in capsys.readouterr().err
    other = write(tmp_path, exclude=None, models={"A": {"ckpt": "nowhere.ckpt"}}, data=None, flags=None, rules=None)
    with pytest.raises(SystemExit, match=r"error: suite: A, data: checkpoint: .*nowhere"):
        main(["suite", other])


def test_a_command_that_fails_is_named():
    with pytest.raises(UserError, match="row, column: `diffclf compare` ended with status 2"):
        run_command(["compare", "--nonsense"], "row, column")


def test_signals_are_passed_on_and_end_the_suite(tmp_path):
    """A process that runs a command, told to end: the command is told as well, and is waited for."""
    code = """
import sys
from lightning_diffclf.commands import cells
cells.sys = type("sys", (), {"executable": sys.argv[1]})
cells.run_command([], "name")
print("went on")
"""
    child = tmp_path / "child"
    child.write_text(
        f"""#!{sys.executable}
import signal, sys, time
from pathlib import Path
def saved(*_):
    Path("saved").touch()
    sys.exit(0)
signal.signal(signal.SIGUSR1, saved)
Path("ready").touch()
time.sleep(30)
"""
    )
    child.chmod(0o755)
    started = subprocess.Popen(
        [sys.executable, "-c", code, str(child)], cwd=tmp_path, stdout=subprocess.PIPE, env=dict(os.environ)
    )
    while not (tmp_path / "ready").exists():
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(signal.SIGUSR1)
    printed, _ = started.communicate(timeout=20)
    assert (tmp_path / "saved").exists()
    assert started.returncode == 0
    assert b"went on" not in printed


def test_folders_and_commands():
    cell = Cell("Diffusion Classifier, 256", "ImageNet-A", None, ("--ckpt=x",))
    assert folder_of(Path("out"), RUNS, cell) == Path("out/runs/diffusion-classifier-256/imagenet-a")
    assert commands_of(cell, Path("f"), ["--x=1"]) == [["evaluate", "--ckpt=x", "--out=f/evaluation", "--x=1"]]
    assert slug("--") == ""


def test_the_suite_that_comes_along():
    suite = Suite.read(Path(__file__).parents[2] / "configs" / "suites" / "digits.yaml")
    assert [name_of(cell) for cell in suite.cells] == [
        *(f"tiny Stable Diffusion, {rule}, scenes" for rule in ("all draws", "likelihood ratio")),
        *(f"tiny Stable Diffusion, {rule}, noisy scenes" for rule in ("all draws", "likelihood ratio")),
        *(f"tiny CLIP, one call, {data}" for data in ("scenes", "noisy scenes")),
    ]


def test_a_suite_from_the_plan_to_the_leaderboard(tmp_path, monkeypatch):
    """In one process here: all evaluations were one of their own each otherwise, of which imports are most."""
    monkeypatch.setenv("COLUMNS", "150")
    ran: list[list[str]] = []

    def here(command: list[str], name: str) -> None:
        ran.append(command)
        run(command[0], command[1:])

    for module in (cells, suite_module):
        monkeypatch.setattr(module, "run_command", here)
    path = write(
        tmp_path,
        out=str(tmp_path / "out"),
        flags={"trainer.accelerator": "cpu", "trainer.enable_progress_bar": False, "trainer.limit_test_batches": 2}
        | {"data.eval_batch_size": 20},
        models={"CLIP": {"config": "clip_digits.yaml"}, "SD": {"config": "sd_digits.yaml"}},
        data=None,
        rules={"few": {"classifier.draws": 2}, "one": None},
        exclude=[{"model": "CLIP", "rule": "few"}, {"model": "SD", "rule": "one"}],
    )
    run("suite", [path, "--plan"])
    monkeypatch.setattr(suite_module, "_check", lambda cells, flags: None)  # of the same flags, which takes seconds
    suite = Suite.read(path)
    assert [planned(suite, cell)["nfe_per_image"] for cell in suite.cells] == [1, 20]
    for part in ("1/2", "2/2"):
        run("suite", [path, "--part", part])
    clip, sd = (folder_of(suite.out, RUNS, cell) for cell in suite.cells)
    assert is_done(suite.cells[0], clip)
    assert len(list(sd.glob("evaluation/part-*-of-2/metrics.json"))) == 2  # 20 times as dear: divided by images
    run("suite", [path])
    assert json.loads((sd / "evaluation" / "metrics.json").read_text())["metrics"]["images"] == 40
    assert "SD, few" in (tmp_path / "out" / "leaderboard.html").read_text()
    assert sorted(command[0] for command in ran) == [*["evaluate"] * 6, "merge"]
    ran.clear()
    run("suite", [path])
    assert ran == []
