"""Ablations from stored errors against runs of the network itself, and against counts made by hand."""

import numpy as np
import pytest
import torch

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.results import charts, charts_of_runs
from lightning_diffclf.results.ablations import GUIDANCE, Ablated, ablations
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors
from tests.classifier.toys import Toy, some_images

DRAWS, IMAGES, CLASSES = 20, 30, 4
NULL = "none of these"


class WithNull(Toy):
    """The last candidate is no condition."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__(classes + 1)
        self.candidates = Candidates([*(f"c{k}" for k in range(classes)), NULL])


class Guided(WithNull):
    """As a network whose predictions are guided away from no condition."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = w

    def predict(self, x_t, t, candidate):
        nothing = super().predict(x_t, t, torch.full_like(candidate, CLASSES))
        return (1 + self.w) * super().predict(x_t, t, candidate) - self.w * nothing


def stored(path, denoiser=None, labels=None, **settings) -> StoredErrors:
    settings = {"keep_errors": True, "keep_distances": True} | settings
    classifier = DiffusionClassifier(denoiser or WithNull(), draws=Draws(DRAWS), **settings)
    writer = ErrorsWriter(path, ErrorsInfo.of(classifier), distances=classifier.keep_distances)
    for row, result in enumerate(classifier(some_images(IMAGES))):
        writer.add(result, row % CLASSES if labels is None else labels[row])
    writer.close()
    return StoredErrors(path)


def test_guidance_is_that_of_a_network_that_is_guided(tmp_path):
    found = ablations(stored(tmp_path / "e.parquet"))
    accuracy = found[found["ablation"] == "guidance"].set_index("x")["accuracy"]
    assert list(accuracy.index) == list(GUIDANCE)
    labels = np.arange(IMAGES) % CLASSES
    for w in GUIDANCE:
        classifier = DiffusionClassifier(Guided(w), draws=Draws(DRAWS), candidates=list(range(CLASSES)))
        right = [r.prediction for r in classifier(some_images(IMAGES))] == labels
        assert accuracy[w] == pytest.approx(right.mean()), w
    assert accuracy.nunique() > 1  # guidance does change decisions


def test_draws_are_chosen_as_their_names_say(tmp_path):
    file = stored(tmp_path / "e.parquet")
    given, found = Ablated.of(file), ablations(file)
    assert given.errors_BSK.shape == (IMAGES, DRAWS, CLASSES)
    times = np.array(file.info.timesteps_S)
    for b, image in enumerate(file.images()):
        np.testing.assert_array_equal(given.errors_BSK[b], image.errors_SK[times.argsort()][:, :CLASSES])
    np.testing.assert_array_equal(given.nested_S, times.argsort().argsort())  # the run's own order

    def accuracy(draws) -> float:
        return float((given.errors_BSK[:, draws].mean(1).argmin(1) == given.labels_B).mean())

    rows = found.set_index(["ablation", "setting", "x"])["accuracy"]
    assert rows["timesteps", "even", 5] == accuracy(times.argsort().argsort()[:5])
    assert rows["timesteps", "even", 20] == accuracy(np.arange(DRAWS))
    assert rows["timesteps", "noisiest tenth", 2] == pytest.approx(accuracy([18, 19]))
    assert rows["timesteps", "cleanest tenth", 1] == pytest.approx(np.mean([accuracy([s]) for s in (0, 1)]), abs=0.1)
    assert rows["one draw", "one draw", 0.05] == pytest.approx(np.mean([accuracy([s]) for s in (0, 1)]))
    assert set(found["ablation"]) == {"one draw", "timesteps", "draws", "guidance"}
    assert ((found["low"] <= found["accuracy"]) & (found["accuracy"] <= found["high"])).mean() > 0.9


def test_shared_draws_tell_what_own_ones_cannot(tmp_path):
    """Errors that vary by draw much more than by candidate: the difference is in every draw, if it is the same one."""

    class Fixed:
        info = stored(tmp_path / "e.parquet").info
        path, has_distances = tmp_path / "e.parquet", False

        def images(self):
            noise = np.random.default_rng(0).normal(size=(DRAWS, 1)).astype(np.float32)
            for image in stored(tmp_path / "e.parquet").images():
                right = np.where(np.arange(CLASSES + 1) == image.label, -0.01, 0.0)
                yield type(image)(image.image_id, image.label, image.candidates_K, image.draws_K, 0, noise + right)

    found = ablations(Fixed()).set_index(["ablation", "setting", "x"])["accuracy"]
    assert found["draws", "shared", 5] == 1.0
    assert found["draws", "own", 5] < 0.5


def test_what_ablations_need(tmp_path):
    with pytest.raises(ValueError, match="has no labelled images"):
        ablations(stored(tmp_path / "a.parquet", labels=[None] * IMAGES))
    with pytest.raises(ValueError, match="did not see all draws, expected all errors"):
        ablations(stored(tmp_path / "b.parquet", elimination=LikelihoodRatio(0.3)))
    plain = ablations(stored(tmp_path / "c.parquet", Toy(CLASSES), keep_distances=False))
    assert "guidance" not in set(plain["ablation"])


def test_a_chart_for_each(tmp_path):
    found = charts_of_runs.ablations(ablations(stored(tmp_path / "e.parquet")))
    assert list(found) == ["one-draw", "timesteps", "draws", "guidance"]
    files = charts.save({"draws": charts.specs(found)["draws"]}, tmp_path, ["svg"])
    assert "Shared or own draws" in files[0].read_text()
