"""Against torchmetrics, sklearn, scipy and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import binom, norm
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from lightning_diffclf.results.statistics import (
    Clusters,
    Judged,
    Scores,
    ece,
    holm,
    mcnemar,
    paired_difference,
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


# --- images that come in groups --------------------------------------------------------------------------------------


def test_groups_of_one_are_independent_images():
    values = np.random.default_rng(0).random(50)
    alone = Clusters.of(values)
    assert alone.error == pytest.approx(values.std(ddof=1) / 50**0.5)
    low, high = stats.t.interval(0.95, 49, loc=values.mean(), scale=alone.error)
    assert alone.interval() == pytest.approx((values.mean(), low, high))
    assert alone.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    again = Clusters.of(values, list(range(50)))
    assert again.error == pytest.approx(alone.error)


def test_the_cluster_robust_error_is_that_of_a_hand_computation():
    """Miller 2024, equation 4: the usual variance and the covariances within groups; times G / (G - 1)."""
    values = np.array([1, 1, 0, 1, 0, 0, 0, 1, 1])
    groups = list("aabbbcddd")
    mean, total = values.mean(), 0.0
    for i in range(9):
        for j in range(9):
            if groups[i] == groups[j]:
                total += (values[i] - mean) * (values[j] - mean)
    assert Clusters.of(values, groups).error == pytest.approx((4 / 3 * total) ** 0.5 / 9)
    # Repeated images say nothing new: the error is that of the images once.
    once = Clusters.of(values)
    five_times = Clusters.of(np.repeat(values, 5), np.repeat(np.arange(9), 5).tolist())
    assert five_times.error == pytest.approx(once.error)
    assert five_times.share() == pytest.approx(once.share())


def test_intervals_of_groups_at_their_ends():
    right = Clusters.of(np.ones(40), np.repeat(np.arange(4), 10).tolist())
    assert right.share().high == 1
    assert right.share().low == pytest.approx(4 / (4 + stats.t.ppf(0.975, 3) ** 2))  # as four right ones of four
    single = Clusters.of(np.array([1.0, 0.0]), ["a", "a"])
    assert single.share() == (0.5, 0, 1)
    assert single.interval() == (0.5, -np.inf, np.inf)
    assert single.p_value == 1
    balanced = Clusters.of(
        np.array([1.0, 0.0] * 20), np.repeat(np.arange(20), 2).tolist()
    )  # no variance between groups
    assert balanced.error == 0
    assert balanced.share().low == pytest.approx(wilson_by_t(0.5, 40, 19)[0])  # never as if there were more images
    assert Clusters.of(np.ones(6), list("aabbcc")).p_value == 0


def wilson_by_t(share, images, freedom):
    z2 = stats.t.ppf(0.975, freedom) ** 2
    half = (z2 * (share * (1 - share) / images + z2 / (4 * images**2))) ** 0.5
    return [(share + z2 / (2 * images) + side * half) / (1 + z2 / images) for side in (-1, 1)]


def test_intervals_cover_the_truth_where_images_of_a_group_are_alike():
    """Beta-binomial groups of unequal size, accuracy 0.8, correlation 0.5: Wilson's interval is far too narrow."""
    rng = np.random.default_rng(0)
    hits = {"groups": 0, "wilson": 0, "difference": 0, "alone": 0}
    for _ in range(400):
        sizes = rng.integers(2, 9, 30)
        groups = np.repeat(np.arange(30), sizes).tolist()
        first, second = (rng.random(sizes.sum()) < np.repeat(rng.beta(0.8, 0.2, 30), sizes) for _ in range(2))
        low, high = Clusters.of(first, groups).share()[1:]
        hits["groups"] += low <= 0.8 <= high
        low, high = wilson(int(first.sum()), len(first))[1:]
        hits["wilson"] += low <= 0.8 <= high
        gain = first.astype(float) - second
        hits["difference"] += Clusters.of(gain, groups).p_value > 0.05
        hits["alone"] += Clusters.of(gain).p_value > 0.05
    assert 0.92 <= hits["groups"] / 400 <= 0.98
    assert hits["wilson"] / 400 < 0.85
    assert 0.92 <= hits["difference"] / 400 <= 0.98
    assert hits["alone"] / 400 < 0.85


def test_the_interval_of_a_paired_difference_covers_it_and_has_a_width():
    p, q = 26 / 302, 11 / 302  # Bonett and Price's formula
    half = norm.ppf(0.975) * ((p + q - (p - q) ** 2) / 302) ** 0.5
    assert paired_difference(25, 10, 300) == pytest.approx((15 / 300, p - q - half, p - q + half))
    same = paired_difference(0, 0, 60)
    assert same.value == 0
    assert same.low == pytest.approx(-same.high)
    assert 0.04 < same.high < 0.06
    rng = np.random.default_rng(1)
    hits = 0
    for first, second, _, _ in rng.multinomial(80, [0.08, 0.03, 0.8, 0.09], 2000):
        low, high = paired_difference(int(first), int(second), 80)[1:]
        hits += low <= 0.05 <= high
    assert 0.935 <= hits / 2000 <= 0.975


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
