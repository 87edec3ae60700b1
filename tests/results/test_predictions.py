"""What is stored of a decision, against plain loops over its errors."""

import numpy as np
import pytest
import torch

from lightning_diffclf import DiffusionClassifier, Draws, PairedTest
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.results.predictions import Record
from tests.classifier.toys import Toy, some_images

CLASSES = np.array([0, 0, 0, 1, 2, 2, 3, 1])


def decided(ensemble, broken=()):
    """Decisions on 8 candidates of 4 classes, of which some return nothing finite."""
    toy = Toy(8)
    toy.candidates = type(toy.candidates)([str(k) for k in range(8)], CLASSES.tolist())
    predict = toy.predict

    def with_broken(x_t, t, candidate):
        out = predict(x_t, t, candidate)
        out[torch.isin(candidate, torch.tensor(broken, dtype=candidate.dtype))] = torch.nan
        return out

    toy.predict = with_broken
    recipe = Recipe(Draws(12), elimination=PairedTest(0.3), ensemble=ensemble)
    classifier = DiffusionClassifier(toy, recipe, keep_errors=True)
    results = list(classifier(some_images(20)))
    return results, [
        Record.of(r, CLASSES, classifier.terms.weights_S, 0, ensemble, seconds=0.0, rank=0) for r in results
    ]


def test_classes_are_ranked_by_the_decision():
    for ensemble in ("best", "mean"):
        results, rows = decided(ensemble)
        assert len({tuple(row.top5) for row in rows}) > 3
        for result, row in zip(results, rows, strict=True):
            assert row.top5[0] == row.prediction == result.prediction
            draws, differences = result.draws_K.numpy(), result.differences_K.numpy()

            def place(c, draws=draws, differences=differences):
                mine = np.flatnonzero(c == CLASSES)
                return min((-draws[k], differences[k]) for k in mine)

            others = sorted({*CLASSES.tolist()} - {row.prediction}, key=place)
            assert row.top5.tolist() == [row.prediction, *others]


def test_under_the_mean_draws_choose_classes_by_means():
    results, rows = decided("mean")
    different = 0
    for result, row in zip(results, rows, strict=True):
        errors_KS = result.errors_KS.double().numpy()
        for s, (choice, leader) in enumerate(zip(row.choice_S, row.leader_S, strict=True)):
            in_play = [c for c in range(4) if (result.draws_K.numpy()[c == CLASSES] > s).all()]
            mean_of = {c: errors_KS[c == CLASSES, : s + 1].mean(0) for c in in_play}
            assert choice == min(in_play, key=lambda c: mean_of[c][s])
            assert leader == min(in_play, key=lambda c: mean_of[c].sum())
            alive = [k for k in range(8) if result.draws_K[k] > s]
            different += choice != CLASSES[min(alive, key=lambda k: errors_KS[k, s])]
        assert row.leader_S[-1] == row.prediction
    assert different > 5  # the best prompt alone would have chosen another class


def test_nothing_finite_chooses_no_class():
    _, rows = decided("best", broken=range(8))
    for row in rows:
        assert row.prediction is None
        assert row.top5.tolist() == []
        assert set(row.choice_S.tolist()) == set(row.leader_S.tolist()) == {-1}
        assert row.votes == 0


@pytest.mark.parametrize("ensemble", ["best", "mean"])
def test_a_draw_without_weight_leaves_dropped_candidates_out(ensemble):
    results, _ = decided(ensemble)
    weights_S = np.ones(12)
    weights_S[:2] = 0
    for result in results:
        row = Record.of(result, CLASSES, weights_S, 0, ensemble, seconds=0.0, rank=0)
        staying = CLASSES[result.draws_K.numpy() == result.draws_K.max().item()]
        assert row.leader_S[-1] in staying
