import dataclasses
import json

import lightning as L
import numpy as np
import pytest
import torch

from lightning_diffclf import DiffusionClassifierCallback
from lightning_diffclf.classifier.conformal import rank_of
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.calibration import fold_of
from lightning_diffclf.results.conformal import CalibrationRun, RightScores, Sets, sets_of
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.headline import details, percent
from lightning_diffclf.results.predictions import to_table
from tests.gaussians import Gaussians, loader
from tests.results.made_up import made_up_outline, made_up_rows, made_up_run


def quiet_trainer(callback: L.Callback, **settings) -> L.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(callbacks=[callback], **quiet, **settings)


def outline_with(classes: int, **settings):
    return dataclasses.replace(made_up_outline(classes), **settings)


def by_hand(rows, coverage: float):
    """Members of each image's set, calibrated on the other folds, with loops."""

    def score(row, c):
        return row.differences_K[c] - min(np.delete(row.differences_K, c))

    members = []
    for row in rows:
        others = sorted(score(one, one.label) for one in rows if fold_of(one.id) != fold_of(row.id))
        threshold = others[rank_of(coverage, len(others)) - 1]
        members.append([c for c in range(len(row.differences_K)) if score(row, c) <= threshold])
    return members


def test_sets_are_calibrated_on_the_other_folds():
    rows = list(made_up_rows(150, 5))
    found = sets_of(outline_with(5, coverage=0.8), [rows[:70], to_table(rows[70:])])
    members = by_hand(rows, 0.8)
    hits = [row.label in some for row, some in zip(rows, members, strict=True)]
    assert found["set_coverage"] == np.mean(hits)
    assert found["set_size"] == pytest.approx(np.mean([len(some) for some in members]))
    assert found["sets_of_one"] == np.mean([len(some) == 1 for some in members])
    assert found["empty_sets"] == np.mean([len(some) == 0 for some in members])
    labels = np.array([row.label for row in rows])
    assert found["set_coverage_worst_class"] == min(np.mean(np.array(hits)[labels == c]) for c in range(5))
    assert found["set_images"] == 150
    assert sets_of(made_up_outline(5), [rows]) == {}  # nobody asked


def test_candidates_that_a_proposal_left_out_are_in_no_set():
    rows = list(made_up_rows(100, 6))
    for i in range(0, 100, 20):
        keep = np.array([c for c in range(6) if c not in (rows[i].label, (rows[i].label + 1) % 6)])
        rows[i] = dataclasses.replace(
            rows[i], candidates_K=keep.astype(np.int32), differences_K=rows[i].differences_K[keep]
        )
    outline = outline_with(6, coverage=0.5)
    scores = RightScores(outline)
    scores.update(rows)
    sets = Sets(outline, [scores.fit()] * 5)
    sets.update(rows)
    assert 0.5 <= sets.numbers()["set_coverage"] <= 0.5 + 2 / 100
    with pytest.raises(UserError, match=r"5 of 100 images have no score for their right class"):
        RightScores.fit(_with(scores, coverage=0.99))


def _with(scores: RightScores, **settings) -> RightScores:
    scores.outline = dataclasses.replace(scores.outline, **settings)
    return scores


def test_too_few_images_are_a_warning_at_the_end():
    with pytest.warns(UserWarning, match=r"no conformal sets.*expected at least 99 for 0.99"):
        assert sets_of(outline_with(5, coverage=0.99), [list(made_up_rows(60, 5))]) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coverage": 0.98}, r"coverage: 30 images to calibrate on, expected at least 49 for a coverage of 0.98$"),
        (
            {"coverage": 0.93, "coverage_by_class": True},
            r"coverage: 30 images to calibrate on, expected at least \d+ for a coverage of 0.93, 14 of each class",
        ),
    ],
    ids=["together", "by class"],
)
def test_too_few_images_are_an_error_before_they_are_classified(settings, message, tmp_path):
    callback = DiffusionClassifierCallback(draws=6, output_dir=str(tmp_path / "run"), **settings)
    with pytest.raises(UserError, match=message):
        quiet_trainer(callback).test(Gaussians(), loader(30), verbose=False)
    assert not (tmp_path / "run").exists()


def test_a_limit_of_batches_counts_unless_there_are_images_already(tmp_path):
    def limited(batches):
        callback = DiffusionClassifierCallback(draws=6, coverage=0.95, output_dir=str(tmp_path / "run"))
        return quiet_trainer(callback, limit_test_batches=batches).test(Gaussians(), loader(30), verbose=False)

    with pytest.raises(UserError, match=r"coverage: 8 images to calibrate on, expected at least 19"):
        limited(2)
    assert not (tmp_path / "run").exists()
    limited(8)
    limited(2)  # goes on with the 30 images that it has


def test_the_report_says_what_sets_come_to(tmp_path):
    run = made_up_run(tmp_path / "run", made_up_rows(200, 5), 5, coverage=0.9)
    evaluation = Evaluation.read(run)
    lines = {name: (value, note) for name, value, note in details(evaluation)}
    assert lines["conformal sets"][0] == percent(evaluation.sets["set_coverage"], 2)
    assert "asked for 90.0 %" in lines["conformal sets"][1]
    assert lines["AURC"][0] == f"{evaluation.sureness.selective()['aurc']:.4f}"


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """A run of the first 30 images."""
    folder = tmp_path_factory.mktemp("runs") / "calibration"
    callback = DiffusionClassifierCallback(draws=6, coverage=0.8, output_dir=str(folder))
    quiet_trainer(callback).test(Gaussians(), loader(30), verbose=False)
    return folder


class Others(torch.utils.data.Dataset):
    """Images 30 … 69 of the same kind."""

    def __init__(self) -> None:
        self.whole = loader(70).dataset

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.whole[30 + index]


def test_another_run_calibrates(calibration, tmp_path):
    callback = DiffusionClassifierCallback(
        draws=6, coverage=0.9, calibration=str(calibration), output_dir=str(tmp_path / "out")
    )
    quiet_trainer(callback).test(Gaussians(), torch.utils.data.DataLoader(Others(), batch_size=8), verbose=False)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]
    rows = CalibrationRun.read(calibration, 0.9)
    assert metrics["set_thresholds"] == list(rows.conformal.thresholds)
    assert metrics["set_images"] == 30
    found = Evaluation.read(tmp_path / "out")
    assert found.outline.conformal == rows.conformal
    assert found.sets == {name: metrics[name] for name in found.sets}
    assert {"aurc", "augrc", "coverage_at_5_risk", "risk_at_80_coverage"} <= metrics.keys()


def test_a_calibration_that_would_mean_nothing_is_refused(calibration, tmp_path):
    def evaluate(dataset, **settings):
        usual = {"draws": 6, "coverage": 0.9, "calibration": str(calibration), "output_dir": str(tmp_path / "no")}
        callback = DiffusionClassifierCallback(**usual | settings)
        quiet_trainer(callback).test(Gaussians(), torch.utils.data.DataLoader(dataset, batch_size=8), verbose=False)

    with pytest.raises(UserError, match=r"calibration: image 100 is in .* as well"):
        evaluate(loader(40).dataset)
    with pytest.raises(UserError, match=r"the calibration run .* was made with other ones .*draws"):
        evaluate(Others(), draws=7)
    with pytest.raises(UserError, match=r"30 labelled images, expected at least 49 for 0.98"):
        evaluate(Others(), coverage=0.98)
    with pytest.raises(UserError, match=r"coverage by class: .* have too few calibration images"):
        evaluate(Others(), coverage_by_class=True)
    with pytest.raises(UserError, match=r"calibration: given without a coverage"):
        evaluate(Others(), coverage=None)
    with pytest.raises(FileNotFoundError, match=r"run: no settings.json"):
        evaluate(Others(), calibration=str(tmp_path))
