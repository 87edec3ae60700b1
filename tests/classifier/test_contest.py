"""One place decides: what a run did and what its own errors say afterwards are the same, to the last bit."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diffclf import (
    Candidates,
    DiffusionClassifier,
    Draws,
    Exhaustive,
    LikelihoodRatio,
    PairedTest,
    Stages,
)
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.classifier.contest import Contest, Terms, judge
from lightning_diffclf.results.errors import ErrorsInfo, StoredImage
from lightning_diffclf.results.replay import decide
from tests.classifier.toys import DropOneEachDraw, Toy, some_images

CLASSES = (0, 1, 1, 2, 2, 2, 0)
DRAWS = 12


class Prompts(Toy):
    """Seven prompts of three classes; what some of them predict is broken at some noise levels."""

    def __init__(self, broken=(), classes=CLASSES) -> None:
        super().__init__(len(classes))
        self.candidates = Candidates([f"prompt {k}" for k in range(len(classes))], classes)
        self.broken = broken  # (candidate, least t, greatest t, value)

    def predict(self, x_t, t, candidate):
        output = super().predict(x_t, t, candidate)
        for k, low, high, value in self.broken:
            output[(candidate == k) & (t >= low) & (t <= high)] = value
        return output


RULES = [
    Exhaustive(),
    Stages((3, DRAWS), (2, 1)),
    PairedTest(0.2),
    PairedTest(0.05, growth=1.0),
    LikelihoodRatio(0.2),
    LikelihoodRatio(0.01, growth=1.0, inflation=0.5),
    DropOneEachDraw("distances"),
]
breaks = st.tuples(
    st.integers(0, 6), st.sampled_from([0, 300, 900]), st.sampled_from([400, 1000]), st.sampled_from([np.nan, np.inf])
)


def from_run(result) -> StoredImage:
    """What errors.parquet would hold."""
    upper = np.triu_indices(len(result.candidates_K), 1)
    roots_SP = np.sqrt(result.distances_SKK.numpy()[:, upper[0], upper[1]]).astype(np.float16)
    return StoredImage(
        image_id=str(result.image_id),
        label=None,
        candidates_K=result.candidates_K.numpy(),
        draws_K=result.draws_K.numpy(),
        nfe=result.nfe,
        errors_SK=result.errors_KS.numpy().T,
        distances_SP=np.square(roots_SP.astype(np.float32)),
    )


@given(
    rule=st.sampled_from(RULES),
    ensemble=st.sampled_from(["best", "mean"]),
    budget=st.sampled_from([None, 7, 20, 45]),
    weights=st.sampled_from(["uniform", "velocity", [0.0] * 4 + [1.0, 2.0] * 4]),
    loss=st.sampled_from(["l2", "l1"]),
    broken=st.lists(breaks, max_size=4),
    microbatch=st.sampled_from([5, 64]),
    candidates=st.sampled_from([None, [6, 2, 1, 3], [5]]),
)
@settings(deadline=None, max_examples=150)
def test_a_run_is_what_its_own_errors_decide(rule, ensemble, budget, weights, loss, broken, microbatch, candidates):
    recipe = Recipe(Draws(DRAWS), 0, loss, rule, weights, budget, ensemble=ensemble, candidates=candidates)
    classifier = DiffusionClassifier(
        Prompts(broken), recipe, microbatch=microbatch, keep_errors=True, keep_distances=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        results = classifier(some_images(4))
    info = ErrorsInfo.of(classifier)
    for live in results:
        stored = from_run(live)
        again = decide(stored, classifier.terms, info.ensemble, replace(info, dims=live.dims))
        assert (again.prediction, again.candidate, again.nfe, again.margin) == (
            live.prediction,
            live.candidate,
            live.nfe,
            live.margin,
        )
        for name in ("scores_K", "differences_K", "draws_K"):
            assert torch.equal(getattr(again, name), getattr(live, name)), name
        assert not live.differences_K.isnan().any()
        assert not live.scores_K.isnan().any()
        if live.candidate is not None:
            # Whoever was ahead of the winner was dropped by such a rule, or was behind one that broke later.
            assert live.differences_K.min() == 0 or broken or isinstance(rule, (DropOneEachDraw, Stages))
            assert live.differences_K[live.candidates_K == live.candidate] == 0
        if ensemble == "mean":  # prompts of a class stay or go together, but for broken ones
            whole = live.scores_K.isfinite()
            for c in range(3):
                own = torch.tensor([CLASSES[k] == c for k in live.candidates_K]) & whole
                assert len(set(live.draws_K[own].tolist())) <= 1
                assert len(set(live.differences_K[own].tolist())) <= 1


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_prompts_that_say_the_same_are_one_contestant(rule):
    """Each prompt twice: rules see what they saw with each once, so that alpha means the same."""
    once, twice = Prompts(classes=(0, 1, 2, 3)), Prompts(classes=(0, 1, 2, 3, 0, 1, 2, 3))
    twice.weight, images = once.weight, some_images(12)
    twice.table = torch.nn.Parameter(torch.cat([once.table, once.table]))
    expected = DiffusionClassifier(once, Draws(DRAWS), elimination=rule)(images)
    found = DiffusionClassifier(twice, Draws(DRAWS), elimination=rule, ensemble="mean")(images)
    for a, b in zip(expected, found, strict=True):
        assert (a.prediction, 2 * a.nfe) == (b.prediction, b.nfe)
        assert a.draws_K.tolist() * 2 == b.draws_K.tolist()
        np.testing.assert_allclose(np.tile(a.differences_K, 2), b.differences_K, atol=1e-7)
        np.testing.assert_allclose(a.margin, b.margin, rtol=1e-3)
    if not isinstance(rule, Exhaustive):
        assert sum(r.nfe for r in found) < 12 * 8 * DRAWS


@pytest.mark.parametrize("rule", [Exhaustive(), PairedTest(0.1), LikelihoodRatio(0.1)], ids=repr)
def test_a_broken_prompt_spoils_neither_its_class_nor_its_rivals(rule):
    images, broken = some_images(8), Prompts([(2, 0, 1000, np.nan)])
    without = Prompts()
    with pytest.warns(RuntimeWarning, match="1 of 7 candidates"):
        found = DiffusionClassifier(broken, Draws(DRAWS), elimination=rule, ensemble="mean")(images)
    expected = DiffusionClassifier(without, Draws(DRAWS), elimination=rule, ensemble="mean")(
        images, candidates=[0, 1, 3, 4, 5, 6]
    )
    for a, b in zip(found, expected, strict=True):
        keep = a.candidates_K != 2
        assert (a.prediction, a.candidate) == (b.prediction, b.candidate)
        assert a.scores_K[2] == a.differences_K[2] == torch.inf
        np.testing.assert_allclose(a.differences_K[keep], b.differences_K, atol=1e-7)


def test_a_candidate_that_breaks_late_does_not_hide_those_that_it_beat():
    """Candidate 0 leads, drops 2, then breaks: 2 is compared with who was left."""
    terms = Terms(Stages((1, 2), (2, 1)), "l2", np.zeros(2), np.ones(2))
    contest = Contest(terms, 3)
    contest.land(np.array([[1.0, 2.0, 4.0]], dtype=np.float32))
    judge([contest], dims=1)
    assert contest.playing.tolist() == [0, 1]
    assert contest.land(np.array([[np.nan, 2.0]], dtype=np.float32)).tolist() == [0]
    judge([contest], dims=1)
    assert contest.decided
    decision = contest.decide(dims=1)
    assert decision.winner == 1
    assert decision.differences_K.tolist() == [np.inf, 0.0, 2.0]


def test_distances_of_classes_are_those_of_their_mean_predictions():
    generator = np.random.default_rng(0)
    p_RPD = generator.normal(size=(3, 7, 20))
    distances_RPP = np.square(p_RPD[:, :, None] - p_RPD[:, None]).mean(-1)
    seen = []

    class Watch(DropOneEachDraw):
        def survivors(self, state, current):
            seen.append(current)
            return np.ones(len(current.active_A), dtype=bool)

        def next_stop(self, done, total):
            return total

    contest = Contest(Terms(Watch("distances"), "l2", np.zeros(3), np.ones(3)), 7, np.array(CLASSES))
    errors_RP = generator.random((3, 7), dtype=np.float32)
    contest.land(errors_RP, distances_RPP)
    judge([contest], dims=20)
    means_RAD = np.stack([p_RPD[:, np.array(CLASSES) == c].mean(1) for c in range(3)], 1)
    expected = np.square(means_RAD[:, :, None] - means_RAD[:, None]).mean(-1)
    np.testing.assert_allclose(seen[0].distances_RAA, expected, atol=1e-12)
    pooled = np.stack([errors_RP[:, np.array(CLASSES) == c].mean(1) for c in range(3)], 1)
    np.testing.assert_allclose(seen[0].errors_RA, pooled, rtol=1e-6)
    assert seen[0].active_A.tolist() == [0, 1, 2]
