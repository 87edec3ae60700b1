"""Against torchmetrics, sklearn, scipy and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from lightning_diffclf.results.statistics import (
    Judged,
    Scores,
    ece,
    mcnemar,
    selective_accuracy,
    selective_scores,
    wilson,
)


@given(st.integers(1, 2000), st.data())
def test_wilson_is_the_score_interval(total, data):
    right = data.draw(st.integers(0, total))
    found = wilson(right, total)
    z, p = norm.ppf(0.975), right / total
    centre = (p + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    assert found == pytest.approx((p, max(0, centre - half), min(1, centre + half)), abs=1e-9)


def test_wilson_covers():
    inside = sum(binom.pmf(k, 40, 0.9) for k in range(41) if wilson(k, 40).low <= 0.9 <= wilson(k, 40).high)
    assert 0.93 < inside < 0.98
    for right, total in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(ValueError, match="interval: "):
            wilson(right, total)


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(0, 0) == 1
    for a, b in ((3, 11), (11, 3), (0, 6), (5, 5)):
        tail = binom.cdf(min(a, b), a + b, 0.5)
        assert mcnemar(a, b) == pytest.approx(min(1, 2 * tail))


def probabilities(count: int = 300, classes: int = 5):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(count, classes)) * 2
    p_BC = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return p_BC, np.array([rng.choice(classes, p=p) for p in p_BC])


def test_calibration_error_is_that_of_torchmetrics():
    p_BC, label_B = probabilities()
    metric = MulticlassCalibrationError(5, n_bins=15, norm="l1")
    expected = metric(torch.from_numpy(p_BC), torch.from_numpy(label_B))
    assert ece(p_BC.max(1), p_BC.argmax(1) == label_B) == pytest.approx(float(expected), abs=1e-6)


def test_scores_are_those_of_sklearn_in_parts_of_any_size():
    p_BC, label_B = probabilities()
    judged = Judged(p_BC.max(1), p_BC.argmax(1) == label_B, p_BC[np.arange(300), label_B], np.square(p_BC).sum(1))
    scores = Scores.zeros()
    for first, last in ((0, 7), (7, 7), (7, 200), (200, 300)):
        scores.add(Judged(*(values[first:last] for values in judged)))
    assert scores.numbers()["nll"] == pytest.approx(log_loss(label_B, p_BC))
    expected = brier_score_loss(label_B, p_BC, labels=range(5), scale_by_half=False)
    assert scores.numbers()["brier"] == pytest.approx(expected)
    assert scores.numbers()["ece"] == pytest.approx(ece(judged.confidence, judged.right))


def test_what_is_impossible_costs_much_but_not_infinitely_much():
    scores = Scores.zeros()
    scores.add(Judged(np.ones(2), np.array([False, True]), np.array([0.0, 1.0]), np.ones(2)))
    assert scores.numbers()["nll"] == pytest.approx(354.2, rel=1e-3)
    assert scores.numbers()["brier"] == 1


def test_bins_hold_every_image_once():
    confidence, right = np.array([1e-9, 0.2, 0.2000001, 0.5, 1.0, 1.0]), np.array([0, 1, 1, 0, 1, 0])
    scores = Scores.zeros(bins=5)
    scores.add(Judged(confidence, right, np.ones(6), np.ones(6)))
    assert scores.bins_M3[:, 0].tolist() == [2, 1, 1, 0, 2]
    assert scores.bins_M3[:, 2].tolist() == [1, 1, 0, 0, 1]
    assert scores.bins_M3[:, 1].sum() == pytest.approx(confidence.sum())


def test_selective_accuracy():
    curve = selective_accuracy(np.array([0.1, 0.9, 0.5, 0.7]), np.array([0, 1, 0, 1]))
    assert curve.coverage.tolist() == [0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(curve.accuracy, [1, 1, 2 / 3, 0.5])


# of torch-uncertainty 0.13: AURC(), AUGRC(), CovAt5Risk(), RiskAt80Cov() on probabilities [sure, 1 - sure], in float64
TORCH_UNCERTAINTY = {
    (0, 40, 0.9): [0.21065226896184472, 0.11121794878980157, 0.1, 0.1875],
    (1, 200, 0.7): [0.24878856484303552, 0.1437688442160845, 0.055, 0.3125],
    (2, 500, 0.98): [0.07718494692730296, 0.046795591076095745, 0.366, 0.1075],
}


@pytest.mark.parametrize("case", TORCH_UNCERTAINTY, ids=str)
def test_selective_scores_are_those_of_torch_uncertainty(case):
    seed, count, share = case
    rng = np.random.default_rng(seed)
    sure = 0.5 + rng.permutation(count) / (2 * count + 2)
    right = rng.random(count) < share * (0.5 + sure / 2)
    found = selective_scores(sure, right)
    names = ("aurc", "augrc", "coverage_at_5_risk", "risk_at_80_coverage")
    assert [found[name] for name in names] == pytest.approx(TORCH_UNCERTAINTY[case], abs=1e-6)


def test_selective_scores_of_few_and_of_hopeless_images():
    assert selective_scores(np.array([1.0]), np.array([False]))["aurc"] == 1
    assert selective_scores(np.arange(3.0), np.zeros(3, bool))["coverage_at_5_risk"] == 0
    assert selective_scores(np.arange(30.0), np.ones(30, bool)) == {
        "aurc": 0,
        "augrc": 0,
        "coverage_at_5_risk": 1,
        "risk_at_80_coverage": 0,
    }
