import csv
from pathlib import Path

import pytest

from lightning_diffclf.callbacks.loggers import run_loggers


def log(run_dir: Path, resumes: bool, *rows: tuple[int, dict]) -> Path:
    """As one start of a run does; returns the file."""
    logger, tensorboard = run_loggers(run_dir, resumes)
    for step, metrics in rows:
        logger.log_metrics(metrics, step)
        tensorboard.log_metrics(metrics, step)
    logger.finalize("success")
    tensorboard.finalize("success")
    return Path(logger.log_dir) / "metrics.csv"


def read(path: Path) -> list[tuple[str, str, str]]:
    with path.open(newline="") as file:
        return [(row["step"], row["loss"], row.get("val", "")) for row in csv.DictReader(file)]


def versions(run_dir: Path) -> dict[str, list[str]]:
    return {name: sorted(path.name for path in (run_dir / name).iterdir()) for name in ("logs", "tensorboard")}


def test_a_resumed_run_adds_to_its_logs(tmp_path):
    path = log(tmp_path, False, (0, {"loss": 3.0}), (1, {"loss": 2.0}))
    for step in (2, 3):  # twice, the second time with the columns that the first one added
        assert log(tmp_path, True, (step, {"loss": 1.0, "val": 0.5})) == path
    assert read(path) == [("0", "3.0", ""), ("1", "2.0", ""), ("2", "1.0", "0.5"), ("3", "1.0", "0.5")]
    assert versions(tmp_path) == {"logs": ["version_0"], "tensorboard": ["version_0"]}
    assert len(list((tmp_path / "tensorboard" / "version_0").glob("events.*"))) == 3
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_a_new_run_has_logs_of_its_own(tmp_path):
    (tmp_path / "logs" / "version_best").mkdir(parents=True)  # not ours
    first = log(tmp_path, False, (0, {"loss": 3.0}))
    second = log(tmp_path, False, (0, {"loss": 4.0}))
    assert log(tmp_path, True, (1, {"loss": 5.0})) == second
    assert (read(first), len(read(second))) == ([("0", "3.0", "")], 2)
    assert second.parent.name == "version_1"
    assert versions(tmp_path)["tensorboard"] == ["version_0", "version_1"]


def test_a_start_that_got_nowhere_leaves_its_version_to_the_next(tmp_path):
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    assert log(tmp_path, False, (0, {"loss": 3.0})).parent.name == "version_0"


@pytest.mark.parametrize("lost", [1, 4])
def test_a_line_that_a_kill_cut_off_goes(tmp_path, lost):
    path = log(tmp_path, False, (0, {"loss": 3.0}), (1, {"loss": 2.0}))
    path.write_bytes(path.read_bytes()[:-lost])
    log(tmp_path, True, (2, {"loss": 1.0}))
    assert read(path) == [("0", "3.0", ""), ("2", "1.0", "")]


def test_a_kill_in_the_first_line_leaves_nothing_behind(tmp_path):
    path = log(tmp_path, False, (0, {"loss": 3.0}))
    path.write_text("lo")
    log(tmp_path, True, (1, {"loss": 2.0}))
    assert read(path) == [("1", "2.0", "")]
