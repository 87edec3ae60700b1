import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from lightning_diffclf import DiffusionClassifier, Draws, PairedTest, Posterior
from lightning_diffclf.classifier import posterior
from lightning_diffclf.classifier.posterior import class_differences
from tests.classifier.toys import Toy, some_images


def test_reductions_and_temperature():
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 0.01
    for reduction, factor in (("mean", 1), ("sum", 300)):
        p = Posterior(reduction, 0.7)(scores, dims=300)
        np.testing.assert_allclose(p, softmax(-scores.double().numpy() * factor / 0.7, axis=1), rtol=1e-10)
    assert Posterior("mean")(scores, 300).max() < 0.2  # nearly flat: users wondered
    assert Posterior("sum")(scores, 300).max() > 0.35


def test_broken_candidates_have_probability_zero():
    p = Posterior()(torch.tensor([[0.1, torch.inf, 0.2, torch.nan]]), dims=10)
    assert p[0, [1, 3]].tolist() == [0, 0]
    assert p.sum() == pytest.approx(1)
    np.testing.assert_allclose(p[0, [0, 2]], softmax([-0.1 * 10, -0.2 * 10]), rtol=1e-6)


@given(
    st.lists(st.lists(st.floats(0, 1e3), min_size=3, max_size=3), min_size=1, max_size=4),
    st.sampled_from(["mean", "sum"]),
    st.floats(1e-3, 1e3),
)
@settings(deadline=None)
def test_rows_are_distributions_that_prefer_low_scores(scores, reduction, temperature):
    scores = torch.tensor(scores, dtype=torch.float64)
    posterior = Posterior(reduction, temperature)
    p = posterior(scores, dims=768)
    torch.testing.assert_close(p.sum(1), torch.ones(len(p), dtype=torch.float64))
    assert bool((p.gather(1, scores.argsort(1)).diff() <= 1e-12).all())
    torch.testing.assert_close(posterior.log_probabilities(scores, 768).exp(), p)


@pytest.mark.parametrize("true_temperature", [0.05, 1.0, 40.0])
def test_fit_finds_the_temperature(true_temperature):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(3000, 5, generator=generator).double() * 3 * true_temperature
    targets = torch.multinomial((-scores / true_temperature).softmax(1), 1, generator=generator)[:, 0]

    def nll(log_temperature):
        return -log_softmax(-scores.numpy() / np.exp(log_temperature), axis=1)[range(3000), targets].mean()

    best = minimize_scalar(nll, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    fitted = Posterior("mean").fit(scores, targets, dims=64)
    assert np.log(fitted.temperature) == pytest.approx(best.x, abs=1e-6)
    assert fitted == Posterior("mean").fit(scores.numpy(), targets.numpy(), dims=64)  # arrays as well
    assert fitted.temperature == pytest.approx(true_temperature, rel=0.15)
    same = Posterior("sum").fit(scores, targets, dims=64)
    torch.testing.assert_close(same(scores, 64), fitted(scores, 64), rtol=1e-4, atol=1e-6)


def simulated(temperature: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(400, 5, generator=generator, dtype=torch.float64)
    return scores, torch.multinomial((-scores / temperature).softmax(1), 1, generator=generator)[:, 0]


def test_fit_of_images_in_any_portions_is_the_same(monkeypatch):
    scores, targets = simulated()
    whole = Posterior("mean").fit(scores, targets, dims=1).temperature
    monkeypatch.setattr(posterior, "CELLS", 5 * 37)
    assert Posterior("mean").fit(scores, targets, dims=1).temperature == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e5])
def test_fit_does_not_care_how_hard_an_image_is(size):
    """A constant added to all scores of an image changes no probability; real errors differ far more by image."""
    scores, targets = simulated()
    hardness = size * torch.randn(400, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = Posterior("mean").fit(scores, targets, dims=1).temperature
    assert Posterior("mean").fit(scores + hardness, targets, dims=1).temperature == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_fit_with_broken_candidates(broken):
    scores, targets = simulated()
    rows = torch.arange(0, 400, 3)
    scores[rows, (targets[rows] + 1) % 5] = broken  # a wrong candidate: out of play
    scores[1, targets[1]] = broken  # the right one: no temperature can help

    def nll(temperature):
        logits = np.where(np.isfinite(scores), -scores.numpy() / temperature, -np.inf)
        return -np.delete(log_softmax(logits, axis=1)[range(400), targets], 1).mean()

    best = minimize_scalar(nll, bounds=(0.02, 2), method="bounded")
    fitted = Posterior("mean").fit(scores, targets, dims=1)
    assert nll(fitted.temperature) == pytest.approx(best.fun, abs=1e-6)
    assert fitted.temperature == pytest.approx(best.x, rel=0.01)


@pytest.mark.parametrize("scores", [torch.full((3, 2), 0.1), torch.full((3, 2), torch.inf), torch.tensor([[0.1]] * 3)])
def test_fit_leaves_the_temperature_alone_where_it_does_not_matter(scores):
    assert Posterior(temperature=2.5).fit(scores, torch.zeros(3).long(), dims=5).temperature == 2.5


def test_fit_works_without_gradients():
    scores, targets = simulated()
    expected = Posterior().fit(scores, targets, dims=5)
    with torch.no_grad():
        assert Posterior().fit(scores, targets, dims=5) == expected


def test_fit_of_a_flawless_classifier_stays_finite():
    scores = torch.eye(4).neg() * 0.01
    fitted = Posterior().fit(scores, torch.arange(4), dims=10)
    assert 0 < fitted.temperature < 1
    half_broken = torch.tensor([[0.1, torch.inf], [0.3, 0.2]])
    assert 0 < Posterior().fit(half_broken, torch.tensor([0, 1]), 5).temperature < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Posterior("max"), "reduction 'max'"),
        (lambda: Posterior(temperature=-1), "temperature -1"),
        (lambda: Posterior(temperature=0), "temperature 0, expected a positive"),
        (lambda: Posterior(temperature=float("nan")), "temperature nan"),
        (lambda: Posterior().fit(torch.zeros(2, 3), torch.tensor([0]), 1), "2 rows of scores and 1 targets"),
        (lambda: Posterior().fit(torch.zeros(2, 3), torch.tensor([-1, 0]), 1), "targets -1 … 0, expected 0 … 2"),
        (lambda: Posterior().fit(torch.zeros(0, 3), torch.zeros(0).long(), 1), "0 rows of scores"),
        (lambda: Posterior().fit(torch.zeros(2, 3), torch.tensor([0, 3]), 1), "targets 0 … 3, expected 0 … 2"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_class_stands_where_its_best_candidate_stands():
    """By a plain loop; candidates without a finite difference count for nothing."""
    generator = torch.Generator().manual_seed(0)
    differences_BK = torch.rand(30, 9, dtype=torch.float64, generator=generator)
    differences_BK[torch.rand(30, 9, generator=generator) < 0.3] = torch.inf
    differences_BK[0], differences_BK[1, :4] = torch.inf, torch.nan
    class_BK = torch.randint(4, (30, 9), generator=generator)
    p_BC = Posterior(temperature=0.1)(class_differences(differences_BK, class_BK, 5), dims=3)
    for i in range(30):
        best_C = np.full(5, np.inf)
        for difference, c in zip(differences_BK[i].tolist(), class_BK[i].tolist(), strict=True):
            best_C[c] = min(best_C[c], difference) if difference == difference else best_C[c]
        expected = softmax(-best_C * 30) if np.isfinite(best_C).any() else np.full(5, 0.2)
        np.testing.assert_allclose(p_BC[i].numpy(), expected, rtol=1e-12)


def test_more_prompts_gain_nothing():
    """Two classes that fit equally well are equally likely, however many prompts each has."""
    p_1C = Posterior()(class_differences(torch.zeros(1, 4), torch.tensor([[0, 1, 1, 1]]), 2), dims=100)
    assert p_1C.tolist() == [[0.5, 0.5]]


def test_with_one_candidate_for_each_class_nothing_changes():
    scores = torch.rand(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 100
    class_BK = torch.arange(7).expand(50, 7)
    assert torch.equal(Posterior()(class_differences(scores, class_BK, 7), 300), Posterior()(scores, 300))


def test_a_fit_works_in_inference_mode():
    scores, targets = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 3
    expected = Posterior().fit(scores, targets, dims=10).temperature
    with torch.inference_mode():
        assert Posterior().fit(scores.clone(), targets.clone(), dims=10).temperature == pytest.approx(expected)


# --- differences to the winner -------------------------------------------------------------------------------------


def test_differences_are_paired_over_the_draws_that_both_saw():
    """By a plain loop over the chain: who was best when a candidate fell, and when that one fell."""
    images = some_images(20)
    rule = PairedTest(0.4)
    full = list(DiffusionClassifier(Toy(8), Draws(30), keep_errors=True)(images))
    some = list(DiffusionClassifier(Toy(8), Draws(30), elimination=rule)(images))
    assert len({d for r in some for d in r.draws_K.tolist()}) > 3
    for everything, result in zip(full, some, strict=True):
        errors_KS, draws_K = everything.errors_KS.double(), result.draws_K
        for k in range(8):
            total, at = 0.0, k
            while at != result.candidate:
                n = int(draws_K[at])
                means = errors_KS[:, :n].mean(1)
                stay = [c for c in range(8) if draws_K[c] > n or c == result.candidate]
                conqueror = min(stay, key=lambda c: float(means[c]))
                total += float(means[at] - means[conqueror])
                at = conqueror
            assert float(result.differences_K[k]) == pytest.approx(total, rel=1e-5, abs=1e-9)
    for result in full:
        torch.testing.assert_close(result.differences_K, result.scores_K - result.scores_K.min())
