"""Images that arrive in parts, budgets, abstention, margins and compiled networks."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diffclf import (
    Candidates,
    DiffusionClassifier,
    Draws,
    Elimination,
    Exhaustive,
    LikelihoodRatio,
    NoiseSchedule,
    PairedTest,
)
from lightning_diffclf.classifier import Landed
from tests.classifier.gaussians import ExactGaussians, mixture
from tests.classifier.toys import DropOneEachDraw, Toy, some_images

RULES = {
    "exhaustive": Exhaustive(),
    "ragged": DropOneEachDraw("distances"),
    "paired": PairedTest(0.2),
    "ratio": LikelihoodRatio(0.2),
}


def same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a.image_id, a.prediction, a.nfe, a.draws_K.tolist()) == (
            b.image_id,
            b.prediction,
            b.nfe,
            b.draws_K.tolist(),
        )
        np.testing.assert_allclose(a.scores_K, b.scores_K, rtol=2e-6)


# --- parts ---------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(list(RULES)),
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.sampled_from([1, 7, 64]),
    st.sampled_from([1, 3, None]),
)
@settings(deadline=None, max_examples=50)
def test_parts_do_not_change_results(rule, parts, microbatch, in_flight):
    images = some_images(sum(parts))
    classifier = DiffusionClassifier(
        Toy(), Draws(12), elimination=RULES[rule], microbatch=microbatch, in_flight=in_flight
    )
    run, results, start = classifier.run(), [], 0
    for size in parts:
        run.add(images[start : start + size], ids=range(start, start + size))
        results += run.work()
        start += size
    results += run.finish()
    same(results, classifier(images))


def test_micro_batches_are_filled_across_parts():
    denoiser = Toy()
    run = DiffusionClassifier(denoiser, Draws(4), microbatch=32).run()
    results = []
    for image in some_images(8).split(1):
        run.add(image)
        results += run.work()
    assert len(results) > 4  # what is decided comes at once
    results += run.finish()
    assert [r.image_id for r in results] == list(range(8))
    assert [len(rows) for rows, *_ in denoiser.calls] == [32] * 5  # 8 images × 5 candidates × 4 draws


@pytest.mark.parametrize("microbatch", [1, 3, 7, 64])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_whoever_watches_sees_each_error_once(rule, microbatch):
    images = some_images(4)
    classifier = DiffusionClassifier(Toy(), Draws(12), elimination=rule, microbatch=microbatch, keep_errors=True)
    seen: list[Landed] = []
    run = classifier.run(seen.append)
    run.add(images)
    results = list(run.finish())
    same(results, classifier(images))  # watching changes nothing
    for number, result in enumerate(results):
        errors_KS, calls = np.full(result.errors_KS.shape, np.nan, dtype=np.float32), []
        for landed in (one for one in seen if one.image_id == number):
            for draw, errors_P in enumerate(landed.errors_RP, landed.first):
                assert np.isnan(errors_KS[landed.candidates_P, draw]).all()
                errors_KS[landed.candidates_P, draw] = errors_P
            calls.append(landed.nfe)
        np.testing.assert_array_equal(errors_KS, result.errors_KS)
        assert calls == sorted(set(calls))
        assert calls[-1] == result.nfe


def test_whoever_watches_may_end_the_run():
    class Enough(Exception):
        pass

    def watch(landed: Landed) -> None:
        raise Enough

    network = Toy()
    run = DiffusionClassifier(network, Draws(100), microbatch=5).run(watch)
    run.add(some_images(2))
    with pytest.raises(Enough):
        list(run.finish())
    assert len(network.calls) == 1


def test_what_is_wrong_with_a_part_is_said_before_it_is_taken():
    run = DiffusionClassifier(Toy(), Draws(4), microbatch=7).run()
    run.add(some_images(2))
    with pytest.raises(ValueError, match="candidates"):
        run.add(some_images(1), candidates=[9])
    assert [r.image_id for r in run.finish()] == [0, 1]


# --- budget, margin, abstention ------------------------------------------------------------------------------------


@given(st.sampled_from(list(RULES)), st.integers(5, 70), st.sampled_from([3, 64]))
@settings(deadline=None, max_examples=50)
def test_a_budget_is_kept_and_used(rule, budget, microbatch):
    """Never more calls; the remaining candidates have all seen equally many draws, and one more would not be paid."""
    settings_ = {"draws": Draws(12), "elimination": RULES[rule], "microbatch": microbatch}
    images = some_images(6)
    free = list(DiffusionClassifier(Toy(), **settings_)(images))
    for result, unlimited in zip(DiffusionClassifier(Toy(), budget=budget, **settings_)(images), free, strict=True):
        assert result.nfe == int(result.draws_K.sum()) <= budget
        if unlimited.nfe <= budget:
            same([result], [unlimited])
        else:
            left = result.draws_K == result.draws_K.max()
            assert budget - result.nfe < left.sum() or result.draws_K.max() == 12
            best = result.scores_K.masked_fill(~left, torch.inf).argmin()
            assert result.candidate == int(best)


def test_a_budget_below_the_candidates_is_refused_before_any_call():
    denoiser = Toy()
    classifier = DiffusionClassifier(denoiser, Draws(4), budget=4)
    with pytest.raises(ValueError, match=r"budget: 4 network calls for the 5 candidates of image 'a', expected .* 5"):
        classifier(some_images(1), ids=["a"])
    assert len(list(classifier(some_images(1), candidates=[0, 1, 2, 3]))) == 1
    for bad in (0, -3):
        with pytest.raises(ValueError, match=f"budget: {bad}, expected at least 1"):
            DiffusionClassifier(denoiser, budget=bad)


def test_the_margin_is_the_log_likelihood_ratio_of_gaussian_residuals():
    means, images, _ = mixture(4, 10, distance=0.5)
    denoiser = ExactGaussians(NoiseSchedule.linear(), means)
    for result in DiffusionClassifier(denoiser, Draws(9))(images):
        best, second = result.scores_K.sort().values[:2]
        n = 9 * result.dims
        log_p = [-n / 2 * e / best for e in (best, second)]  # N(0, best) is the residual's distribution
        assert result.margin == pytest.approx(float(log_p[0] - log_p[1]), rel=1e-9)
    [alone] = DiffusionClassifier(denoiser, Draws(2))(images[:1], candidates=[3])
    assert alone.margin == float("inf")


def test_candidates_that_are_alike_have_no_margin():
    denoiser = Toy(3)
    with torch.no_grad():
        denoiser.table[:] = denoiser.table[0]
    [result] = DiffusionClassifier(denoiser, Draws(4), abstain=1e-9)(some_images(1))
    assert result.margin == 0
    assert result.abstained


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_small_margins_abstain_and_decisions_stay(rule):
    images = some_images(12)
    plain = list(DiffusionClassifier(Toy(), Draws(12), elimination=rule)(images))
    threshold = float(np.median([r.margin for r in plain]))
    picky = list(DiffusionClassifier(Toy(), Draws(12), elimination=rule, abstain=threshold)(images))
    same(picky, plain)
    assert not any(r.abstained for r in plain)
    assert [r.abstained for r in picky] == [r.margin < threshold for r in plain]
    assert 0 < sum(r.abstained for r in picky) < 12
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"abstain: .* expected a margin in nats"):
            DiffusionClassifier(Toy(), abstain=bad)


# --- broken outputs ------------------------------------------------------------------------------------------------


class Broken(Toy):
    def __init__(self, broken: list[int], value: float) -> None:
        super().__init__()
        self.broken, self.value = torch.tensor(broken), value

    def predict(self, x_t, t, candidate):
        output = super().predict(x_t, t, candidate)
        output[torch.isin(candidate, self.broken)] = self.value
        return output


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_broken_candidates_are_named_and_cannot_win(rule, value):
    denoiser = Broken([1, 3], value)
    denoiser.candidates = Candidates(["ant", "bee", "cow", "dog", "eel"])
    with pytest.warns(RuntimeWarning, match=r"image 'x': .* NaN or infinity for 2 of 5 candidates \(bee, dog\)"):
        [result] = DiffusionClassifier(denoiser, Draws(12), elimination=rule)(some_images(1), ids=["x"])
    assert result.candidate in {0, 2, 4}
    assert result.scores_K.isinf().tolist() == [False, True, False, True, False]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        [hopeless] = DiffusionClassifier(denoiser, Draws(12), elimination=rule)(some_images(1), candidates=[1, 3])
    assert (hopeless.prediction, hopeless.candidate, hopeless.abstained) == (None, None, True)


# --- compiled ------------------------------------------------------------------------------------------------------


class DropTwo(Elimination):
    """Uneven on purpose, so that micro-batches end anywhere."""

    def survivors(self, state, current):
        return np.argsort(np.argsort(current.scores_A)) < max(1, len(current.scores_A) - 2)

    def next_stop(self, done, total):
        return min(total, done + 3)


class Small(torch.nn.Module):
    """Without side effects, which would be guarded and compiled again."""

    def __init__(self) -> None:
        super().__init__()
        toy = Toy()
        self.schedule, self.candidates, self.weight, self.table = toy.schedule, toy.candidates, toy.weight, toy.table

    def encode(self, images):
        return images

    def predict(self, x_t, t, candidate):
        hidden = x_t.flatten(1) @ self.weight + self.table[candidate] * (t / 1000)[:, None]
        return torch.tanh(hidden).view_as(x_t)


def test_compiled_once_for_all_micro_batches():
    images, settings_ = some_images(5), {"draws": Draws(7), "elimination": DropTwo(), "microbatch": 16}
    plain = list(DiffusionClassifier(Small(), **settings_)(images))
    assert sum(r.nfe for r in plain) % 16  # the last one is padded
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    classifier = DiffusionClassifier(Small(), compile=True, **settings_)
    same(list(classifier(images)), plain)
    same(list(classifier(images[:1])), plain[:1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- several candidates for a class --------------------------------------------------------------------------------

CLASSES = [2, 0, 0, 1, 1, 2, 0]  # uneven, and mixed up


def pooled(values_K):
    return np.array([np.mean([v for v, c in zip(values_K, CLASSES, strict=True) if c == own]) for own in CLASSES])


def test_the_mean_over_prompts_decides():
    images, denoiser = some_images(30), Toy(7)
    denoiser.candidates = Candidates(list("abcdefg"), CLASSES)
    best = list(DiffusionClassifier(denoiser, Draws(12))(images))
    mean = list(DiffusionClassifier(denoiser, Draws(12), ensemble="mean")(images))
    for a, b in zip(best, mean, strict=True):
        assert torch.equal(a.scores_K, b.scores_K)
        expected = pooled(a.scores_K.numpy())
        assert b.prediction == CLASSES[int(expected.argmin())]
        mine = [k for k in range(7) if CLASSES[k] == b.prediction]
        assert b.candidate == min(mine, key=lambda k: float(a.scores_K[k]))
        np.testing.assert_allclose(b.differences_K, expected - expected.min(), atol=1e-12)
        others = min(expected[k] for k in range(7) if CLASSES[k] != b.prediction)
        margin = 12 * b.dims * (others - expected.min()) / (2 * expected.min())
        assert b.margin == pytest.approx(margin)
    assert any(a.prediction != b.prediction for a, b in zip(best, mean, strict=True))
    with pytest.raises(ValueError, match="ensemble: 'sum', expected 'best' or 'mean'"):
        DiffusionClassifier(denoiser, ensemble="sum")


@pytest.mark.parametrize("rule", [PairedTest(0.05), LikelihoodRatio(0.05)])
def test_prompts_of_a_class_stay_or_go_together(rule):
    images, denoiser = some_images(30), Toy(7)
    denoiser.candidates = Candidates(list("abcdefg"), CLASSES)
    full = list(DiffusionClassifier(denoiser, Draws(30), ensemble="mean")(images))
    some = list(DiffusionClassifier(denoiser, Draws(30), elimination=rule, ensemble="mean", microbatch=11)(images))
    for result in some:
        for c in range(3):
            assert len({int(d) for d, own in zip(result.draws_K, CLASSES, strict=True) if own == c}) == 1
    assert sum(a.prediction == b.prediction for a, b in zip(full, some, strict=True)) >= 28
    assert sum(r.nfe for r in some) < sum(r.nfe for r in full)
