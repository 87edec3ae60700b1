"""A run with more draws takes the errors of one with fewer; of anything else, it refuses them."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch

from lightning_diffclf import DiffusionClassifierCallback, LikelihoodRatio, PairedTest, Stages
from lightning_diffclf.commands import run
from tests.gaussians import CLASSES, Gaussians, loader

IMAGES, FEW, MANY = 10, 10, 25


class Counts(Gaussians):
    """Rows that the network was given."""

    rows = 0

    def predict(self, x_t, t, candidate):
        self.rows += len(x_t)
        return super().predict(x_t, t, candidate)

    def identity(self) -> dict[str, Any]:
        return {"means": self.means, "schedule": self.schedule, "candidates": self.candidates}


def evaluate(out: Path, module: L.LightningModule | None = None, images=IMAGES, precision="32-true", **settings: Any):
    module = module or Counts()
    module.rows = 0
    recipe = {"draws": FEW, "grid": 100, "error_maps": 0, "microbatch": 16} | settings
    callback = DiffusionClassifierCallback(output_dir=str(out), **recipe)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", precision=precision, callbacks=[callback], **quiet)
    trainer.test(module, loader(images), verbose=False)
    return module.rows, json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("few")
    rows, _ = evaluate(folder, keep_errors=True)
    assert rows == IMAGES * CLASSES * FEW
    return str(folder)


def columns(out: Path, name: str = "predictions.parquet") -> dict[str, list]:
    found: dict[str, list] = pq.read_table(out / name).to_pydict()
    return {column: values for column, values in found.items() if column not in ("seconds", "thumbnail")}


def test_more_draws_cost_the_difference_and_nothing_else_changes(few, tmp_path):
    fresh, report = evaluate(tmp_path / "fresh", draws=MANY, keep_errors=True)
    calls, reused = evaluate(tmp_path / "reused", draws=MANY, keep_errors=True, reuse=few)
    assert (fresh, calls) == (IMAGES * CLASSES * MANY, IMAGES * CLASSES * (MANY - FEW))
    assert reused["metrics"]["nfe_per_image"] == CLASSES * (MANY - FEW)
    assert reused["metrics"]["reused_per_image"] == CLASSES * FEW
    assert reused["settings"]["reuse"] == few
    assert "reused_per_image" not in report["metrics"]
    assert reused["metrics"]["speedup"] == report["metrics"]["speedup"] == 1
    kept = [columns(tmp_path / name, "errors.parquet") for name in ("fresh", "reused")]
    assert kept[0]["nfe"] == kept[1]["nfe"]
    errors = [torch.tensor(one["errors"]) for one in kept]
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-5, atol=0)  # packed in other micro-batches
    stored = torch.tensor(columns(Path(few), "errors.parquet")["errors"])
    assert torch.equal(errors[1][:, : FEW * CLASSES], stored)  # taken as they are
    decided = [columns(tmp_path / name) for name in ("fresh", "reused")]
    assert decided[0]["prediction"] == decided[1]["prediction"]
    assert decided[1]["reused"] == [CLASSES * FEW] * IMAGES


def test_a_rule_takes_what_there_is_and_a_reused_run_is_replayed(few, tmp_path, capsys):
    fresh, _ = evaluate(tmp_path / "fresh", draws=MANY, elimination=PairedTest(0.05))
    calls, found = evaluate(tmp_path / "out", draws=MANY, elimination=PairedTest(0.05), reuse=few)
    taken = round(found["metrics"]["reused_per_image"] * IMAGES)
    assert calls == fresh - taken < fresh
    evaluate(tmp_path / "all", draws=MANY, keep_errors=True, reuse=few)
    run("replay", [str(tmp_path / "all" / "errors.parquet"), "--elimination=Exhaustive"])
    assert f"{CLASSES * MANY:.1f}" in capsys.readouterr().out  # what it would have cost without reuse


def test_images_that_the_run_did_not_have_are_computed(tmp_path):
    part, found = evaluate(tmp_path / "part", keep_errors=True, part="1/2")
    assert 0 < found["metrics"]["images"] < IMAGES
    calls, _ = evaluate(tmp_path / "whole", reuse=str(tmp_path / "part"))
    assert calls == IMAGES * CLASSES * FEW - part


def test_distances_have_to_be_there(few, tmp_path):
    with pytest.raises(ValueError, match=r"has no distances between candidates, .*made with --keep-errors distances"):
        evaluate(tmp_path / "out", draws=MANY, elimination=LikelihoodRatio(0.05), reuse=few)
    evaluate(tmp_path / "kept", keep_errors=True, keep_distances=True)
    fresh, _ = evaluate(tmp_path / "fresh", draws=MANY, elimination=LikelihoodRatio(0.001))
    kept = str(tmp_path / "kept")
    calls, found = evaluate(tmp_path / "out", draws=MANY, elimination=LikelihoodRatio(0.001), reuse=kept)
    assert calls == fresh - round(found["metrics"]["reused_per_image"] * IMAGES) < fresh


class Other(Counts):
    def __init__(self):
        super().__init__()
        self.means += 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": None, "draws": MANY}, r"do not begin alike: draw 1 is at timestep .*--classifier\.grid 1000"),
        ({"grid": None, "elimination": Stages((5, 10), (2, 1))}, r"do not begin alike.*Stages"),
        ({"seed": 3}, r"errors of something else \(recipe\.seed: 0 there, 3 here\)"),
        ({"antithetic": True, "draws": 12}, r"recipe\.antithetic: None there, True here"),
        ({"loss": "l1"}, r"recipe\.loss: 'l2' there, 'l1' here"),
        ({"module": Other()}, r"module\.means"),
        ({"precision": "bf16-mixed"}, r"precision: '32-true' there, 'bf16-mixed' here"),
        ({"corruption": "gaussian_noise/1"}, "corruption: None there"),
        ({"images": 12}, r"something else \(data\."),
    ],
    ids=["draws", "stages", "seed", "antithetic", "loss", "weights", "precision", "corruption", "data"],
)
def test_errors_of_something_else_are_refused(few, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", reuse=few, **settings)
    assert not (tmp_path / "out").exists()


def test_a_run_without_errors_is_refused(few, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no settings\.json"):
        evaluate(tmp_path / "out", reuse=str(tmp_path / "nowhere"))
    evaluate(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"has no errors\.parquet, expected a run that has ended"):
        evaluate(tmp_path / "out", reuse=str(tmp_path / "bare"))
