import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import betabinom, binom

from lightning_diffclf import Candidates, Classification, Conformal, DiffusionClassifier, Draws, PairedTest
from lightning_diffclf.classifier.conformal import least_images, nonconformity, order_of_elimination, rank_of
from lightning_diffclf.errors import UserError
from tests.classifier.toys import Toy, some_images


@given(st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=1, max_size=5))
def test_nonconformity_is_the_distance_to_the_best_other(rows):
    scores = nonconformity(torch.tensor(rows, dtype=torch.float64))
    for row, found in zip(rows, scores.tolist(), strict=True):
        assert found == pytest.approx([row[c] - min(row[:c] + row[c + 1 :]) for c in range(3)])


def test_classes_without_a_difference_do_not_conform():
    inf = math.inf
    assert nonconformity(torch.tensor([[0.0, inf, math.nan]])).tolist() == [[-inf, inf, inf]]
    assert nonconformity(torch.tensor([[inf, inf]])).tolist() == [[inf, inf]]
    assert nonconformity(torch.tensor([[0.0]])).tolist() == [[-inf]]


def test_order_of_elimination_sorts_by_draws_first():
    differences = torch.tensor([[0.0, 0.5, 0.1, 9.0, torch.inf]])
    draws = torch.tensor([[20, 20, 5, 20, 20]])
    found = order_of_elimination(differences, draws, total=20)[0]
    assert found.argsort().tolist() == [0, 1, 3, 2, 4]
    assert found[0] == pytest.approx(-0.1)
    assert 15 <= found[2] < 16


@given(st.integers(1, 999), st.integers(1, 400))
def test_the_least_size_is_the_first_with_a_finite_threshold(permille, images):
    coverage = permille / 1000
    least = least_images(coverage)
    assert rank_of(coverage, least) <= least
    assert least == 1 or rank_of(coverage, least - 1) > least - 1
    assert rank_of(coverage, images) == -(-(images + 1) * permille // 1000)  # without rounding errors


def made_up(rng: np.random.Generator, images: int, classes: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Exchangeable images whose candidates were dropped early: differences censored by what was known by then."""
    label = rng.integers(classes, size=images)
    true = rng.exponential(1, (images, classes))
    true[np.arange(images), label] *= 0.2
    draws = rng.integers(1, 30, (images, classes))
    seen = true + rng.normal(size=true.shape) / np.sqrt(draws)
    seen -= seen.min(1, keepdims=True)
    return np.minimum(seen, 2.0), draws, label  # a rule that drops what is 2 behind


@pytest.mark.parametrize("kind", ["difference", "order"])
def test_coverage_is_that_of_the_beta_binomial_law(kind):
    """Of m test images, those covered are beta-binomial given n to calibrate on, if scores have no ties."""
    rng, coverage, n, m = np.random.default_rng(0), 0.9, 60, 40
    counts = []
    for _ in range(600):
        differences, draws, label = made_up(rng, n + m)
        differences = torch.from_numpy(differences)
        if kind == "difference":
            scores = nonconformity(differences).numpy()
        else:
            scores = order_of_elimination(differences, torch.from_numpy(draws), 30).numpy()
        right = scores[np.arange(n + m), label]
        found = Conformal.fit(right[:n], label[:n], coverage)
        member = found(torch.from_numpy(scores[n:])).numpy()
        counts.append(member[np.arange(m), label[n:]].sum())
    rank = rank_of(coverage, n)
    law = betabinom(m, rank, n + 1 - rank)
    assert np.mean(counts) == pytest.approx(law.mean(), abs=4 * law.std() / math.sqrt(600))
    inside = (law.ppf(0.025) <= counts) & (counts <= law.ppf(0.975))
    expected = law.cdf(law.ppf(0.975)) - law.cdf(law.ppf(0.025) - 1)
    assert inside.sum() >= binom.ppf(0.001, 600, expected)


def test_by_class_covers_a_class_that_marginal_sets_miss():
    rng = np.random.default_rng(1)
    hard, cover = [], []
    for by_class in (False, True):
        covered = np.zeros((2, 2))
        for _ in range(100):
            label = (rng.random(400) < 0.15).astype(int)  # class 1 is rare, and its images fit worse
            right = rng.normal(size=400) + 2 * label
            found = Conformal.fit(right[:300], label[:300], 0.9, ["common", "rare"] if by_class else None)
            member = found(torch.from_numpy(right[300:, None]), torch.from_numpy(label[300:, None])).numpy()[:, 0]
            for c in (0, 1):
                covered[c] += member[label[300:] == c].sum(), (label[300:] == c).sum()
        hard.append(covered[1, 0] / covered[1, 1])
        cover.append(covered[:, 0].sum() / covered[:, 1].sum())
    assert hard[0] < 0.7
    assert hard[1] > 0.89
    assert min(cover) > 0.89


def test_what_cannot_be_calibrated_is_said():
    scores, label = np.arange(20.0), np.arange(20) % 2
    with pytest.raises(UserError, match=r"calibration set has 8 labelled images, expected at least 9 for 0.9"):
        Conformal.fit(scores[:8], label[:8], 0.9)
    with pytest.raises(UserError, match=r"1 of 3 classes have too few calibration images: 'c' \(0\); .* at least 9 "):
        Conformal.fit(scores, label, 0.9, ["a", "b", "c"])
    with pytest.raises(UserError, match="coverage: 19 labels for 20 scores, expected one for each"):
        Conformal.fit(scores, label[1:], 0.9)
    with pytest.raises(UserError, match=r"20 of 20 images have no score for their right class"):
        Conformal.fit(np.full(20, np.nan), label, 0.9)
    scores[:3] = np.inf
    with pytest.raises(UserError, match=r"3 of 20 images have no score for their right class.*expected at most 1 "):
        Conformal.fit(scores, label, 0.9)
    for coverage in (0, 1, -0.1, math.nan, 90):
        with pytest.raises(UserError, match=r"coverage: .*, expected a share of images above 0 and below 1"):
            Conformal.fit(scores, label, coverage)


def test_the_set_of_a_decision():
    """Of classes by name, the likeliest first; two candidates of a class stand where the better one does."""
    result = Classification(
        image_id=0,
        prediction=1,
        candidate=2,
        margin=1.0,
        abstained=False,
        candidates=Candidates(["a", "a'", "b", "c"], [0, 0, 1, 2], ["A", "B", "C"]),
        candidates_K=torch.arange(4),
        scores_K=torch.tensor([0.5, 0.9, 0.2, 0.6]),
        differences_K=torch.tensor([0.3, 0.7, 0.0, 0.4]).double(),
        draws_K=torch.full((4,), 5),
        nfe=20,
        dims=4,
        timesteps_S=torch.arange(5),
    )
    assert result.conforming(Conformal(0.9, (0.35,), 20)) == ["B", "A"]
    assert result.conforming(Conformal(0.9, (-0.3,), 20)) == ["B"]
    assert result.conforming(Conformal(0.9, (-0.31,), 20)) == []
    assert result.conforming(Conformal(0.9, (0.1, -0.5, 0.5), 60)) == ["C"]


def test_scores_of_an_image_do_not_depend_on_the_others():
    """Exchangeability rests on this: the score of a class is a function of its image alone, also under a rule."""
    images = some_images(6)
    classifier = DiffusionClassifier(Toy(), Draws(12), elimination=PairedTest(0.05), microbatch=7)
    together = classifier(images, ids=range(6))
    for i in (0, 4):
        (alone,) = classifier(images[i : i + 1], ids=[i])
        torch.testing.assert_close(
            nonconformity(alone.differences_K[None]), nonconformity(together[i].differences_K[None])
        )
