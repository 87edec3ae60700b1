"""Replayed decisions against those of the engine."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_diffclf import (
    Candidates,
    DiffusionClassifier,
    Draws,
    Elimination,
    Exhaustive,
    LikelihoodRatio,
    NoiseSchedule,
    PairedTest,
    Stages,
)
from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors
from lightning_diffclf.results.replay import replay, to_table, usual_rules
from tests.classifier.toys import DropOneEachDraw, Toy, some_images
from tests.gaussians import CLASSES, Gaussians, Samples

DRAWS = 24


def store(path, denoiser, images, labels=None, candidates=None, **settings) -> StoredErrors:
    """The errors of a run, as the callback writes them."""
    classifier = DiffusionClassifier(denoiser, **{"draws": Draws(DRAWS)} | settings, keep_errors=True)
    info = ErrorsInfo.of(classifier)
    writer = ErrorsWriter(path, info, distances=classifier.keep_distances)
    results = list(classifier(images, candidates=candidates))
    for result, label in zip(results, [None] * len(results) if labels is None else labels, strict=True):
        writer.add(result, label)
    writer.close()
    return StoredErrors(path)


def same(replayed, results):
    results = list(results)
    assert [r.prediction for r in replayed] == [r.prediction for r in results]
    for ours, theirs in zip(replayed, results, strict=True):
        assert ours.nfe == theirs.nfe
        assert ours.draws_K.tolist() == theirs.draws_K.tolist()
        assert ours.candidates_K.tolist() == theirs.candidates_K.tolist()
        np.testing.assert_allclose(ours.scores_K, theirs.scores_K, rtol=1e-6)
        np.testing.assert_allclose(ours.margin, theirs.margin, rtol=1e-4)


@pytest.mark.parametrize("budget", [None, 40])
@pytest.mark.parametrize("weights", ["uniform", "velocity"])
@pytest.mark.parametrize(
    "rule", [Exhaustive(), PairedTest(0.05), PairedTest(0.001, growth=1.0), LikelihoodRatio(0.02), DropOneEachDraw()]
)
def test_decisions_are_those_of_the_engine(rule, weights, budget, tmp_path):
    module, data = Gaussians(), Samples(12)
    errors = store(tmp_path / "e.parquet", module, data.images, data.labels.tolist(), keep_distances=True)
    found = replay(errors, rule, weights, budget)
    settings = {"draws": Draws(DRAWS), "weights": weights, "microbatch": 50}
    expected = list(DiffusionClassifier(module, elimination=rule, budget=budget, **settings)(data.images))
    same(found.results, expected)
    exhaustive = list(DiffusionClassifier(module, **settings)(data.images))
    right = np.array([r.prediction for r in expected]) == data.labels.numpy()
    assert found.accuracy == pytest.approx(right.mean())
    assert found.exhaustive == [r.prediction for r in exhaustive]
    assert found.agreement == np.mean([a.prediction == b.prediction for a, b in zip(expected, exhaustive, strict=True)])
    assert found.nfe_per_image == np.mean([r.nfe for r in expected])
    assert found.factor == pytest.approx(DRAWS * CLASSES / found.nfe_per_image)
    if not isinstance(rule, Exhaustive):
        assert found.factor > 1.2  # the rule did drop candidates


def test_antithetic_pairs_are_replayed_as_they_were_drawn(tmp_path):
    images, settings = Samples(12).images, {"draws": 12, "antithetic": True}
    errors = store(tmp_path / "e.parquet", Gaussians(), images, keep_distances=True, **settings)
    rule = LikelihoodRatio(0.05)
    live = DiffusionClassifier(Gaussians(), elimination=rule, **settings)(images)
    same(replay(errors, rule).results, live)
    with pytest.raises(ValueError, match="Stages: has grids of its own, but the draws stored are antithetic pairs"):
        replay(errors, Stages((2, 12), (3, 1)))


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.rectified_flow(0), NoiseSchedule.edm()])
def test_rules_with_an_order_visit_the_stored_draws_in_it(schedule, tmp_path):
    """The same (timestep, noise) pairs for the engine: noise is given, in the order in which each run spends it."""
    denoiser, images, rule = Toy(6, schedule), some_images(5), Stages((5, DRAWS), (3, 1))
    noise = torch.randn(DRAWS, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    errors = store(tmp_path / "e.parquet", denoiser, images, draws=Draws(DRAWS, noise=noise))
    on_grid = noise[nested_order(DRAWS).argsort()]
    draws = Draws(DRAWS, noise=on_grid[torch.tensor(rule.order(DRAWS))])
    same(replay(errors, rule).results, DiffusionClassifier(denoiser, draws, elimination=rule)(images))
    # And back: a run in the order of Stages that dropped nobody serves rules without an order.
    keeps_all = {"draws": Draws(DRAWS, noise=on_grid), "elimination": Stages((DRAWS,), (1,))}
    errors = store(tmp_path / "o.parquet", denoiser, images, **keeps_all)
    found = replay(errors, PairedTest(0.1))
    same(found.results, DiffusionClassifier(denoiser, Draws(DRAWS, noise=noise), elimination=PairedTest(0.1))(images))
    assert found.factor > 1


def test_candidates_of_their_own_and_a_rule_that_sees_distances(tmp_path):
    """Ragged candidate lists; what the rule is shown is what the engine shows it."""
    images, lists = some_images(4), [[0, 1, 2], [4], [3, 1], [5, 4, 2, 0]]
    errors = store(tmp_path / "e.parquet", Toy(6), images, candidates=lists, keep_distances=True)
    ours, theirs = DropOneEachDraw("distances"), DropOneEachDraw("distances")
    found = replay(errors, ours)
    classifier = DiffusionClassifier(Toy(6), Draws(DRAWS), elimination=theirs, in_flight=1)
    same(found.results, classifier(images, candidates=lists))
    assert found.exhaustive_nfe == DRAWS * sum(map(len, lists))
    assert len(ours.rounds_of_images) == len(theirs.rounds_of_images) == 4
    for mine, other in zip(ours.rounds_of_images, theirs.rounds_of_images, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a.loss, a.done, a.total, a.dims) == (b.loss, b.done, b.total, b.dims)
            np.testing.assert_array_equal(a.active_A, b.active_A)
            np.testing.assert_allclose(a.errors_RA, b.errors_RA, rtol=1e-6)
            np.testing.assert_allclose(a.weights_R, b.weights_R)
            np.testing.assert_allclose(a.distances_RAA, b.distances_RAA, rtol=1e-3, atol=1e-7)


def test_calls_before_the_first_draw_count(tmp_path):
    """A proposal's, for example: they go off the budget, and every rule spends them."""
    classifier = DiffusionClassifier(Toy(), Draws(DRAWS), keep_errors=True)
    writer = ErrorsWriter(tmp_path / "e.parquet", ErrorsInfo.of(classifier))
    for result in classifier(some_images(3)):
        writer.add(replace(result, nfe=result.nfe + 2), None)
    writer.close()
    errors = StoredErrors(tmp_path / "e.parquet")
    assert replay(errors).nfe_per_image == 5 * DRAWS + 2
    limited = DiffusionClassifier(Toy(), Draws(DRAWS), budget=40, elimination=PairedTest())(some_images(3))
    assert [r.nfe for r in replay(errors, PairedTest(), budget=42).results] == [r.nfe + 2 for r in limited]
    with pytest.raises(ValueError, match=r"budget: 6 network calls for the 5 candidates of image '0', .* at least 7"):
        replay(errors, budget=6)


class Broken(Toy):
    """NaN for candidate 1 at noisy timesteps."""

    def predict(self, x_t, t, candidate):
        output = super().predict(x_t, t, candidate)
        output[(candidate == 1) & (t > 600)] = torch.nan
        return output


@pytest.mark.parametrize("rule", [Exhaustive(), PairedTest(0.1), LikelihoodRatio(0.1)])
def test_broken_candidates_fall_as_in_the_engine(rule, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        lists = [[0, 1, 2], [1], [1, 3], [4, 2, 1]]
        errors = store(tmp_path / "e.parquet", Broken(), some_images(4), candidates=lists, keep_distances=True)
        expected = list(DiffusionClassifier(Broken(), Draws(DRAWS), elimination=rule)(some_images(4), candidates=lists))
    found = replay(errors, rule)
    same(found.results, expected)
    assert found.exhaustive[1] is None
    assert found.exhaustive[2] == 3
    assert found.results[1].prediction is None


def test_weights_of_the_run_are_the_default_and_labels_may_be_missing(tmp_path):
    data = Samples(6)
    labels = [*data.labels.tolist()[:3], None, None, None]
    errors = store(tmp_path / "e.parquet", Gaussians(), data.images, labels, weights="velocity")
    assert replay(errors).weights == "velocity"
    half = replay(errors)
    assert half.accuracy == np.mean([r.prediction == label for r, label in zip(half.results, labels[:3], strict=False)])
    assert half.summary()["labelled"] == 3
    none = replay(store(tmp_path / "n.parquet", Gaussians(), data.images))
    assert none.accuracy is None
    assert none.agreement == none.factor == 1
    numbers = list(range(1, DRAWS + 1))
    weighted = store(tmp_path / "w.parquet", Gaussians(), data.images, weights=numbers)
    assert replay(weighted).summary()["weights"] == numbers
    expected = DiffusionClassifier(Gaussians(), Draws(DRAWS), weights=numbers)(data.images)
    same(replay(weighted).results, expected)


def test_classes_with_several_candidates(tmp_path):
    denoiser = Toy(4)
    denoiser.candidates = Candidates(["a", "b", "c", "d"], [0, 0, 3, 3])
    found = replay(store(tmp_path / "e.parquet", denoiser, some_images(8)))
    assert {r.prediction for r in found.results} <= {0, 3}
    assert all(denoiser.candidates.classes[r.candidate] == r.prediction for r in found.results)


class Short(Elimination):
    def order(self, count):
        return [2, 0, 1]


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (Stages((5, 20), (3, 1)), {}, "Stages: spends 20 draws, but 24 are stored"),
        (Stages(), {}, "Stages: spends 500 draws, but 24 are stored"),
        (Short(), {}, "Short: spends 3 draws, but 24 are stored"),
        (LikelihoodRatio(), {}, "needs distances between candidates, .*`--keep-errors distances`"),
        (PairedTest(), {"budget": 4}, "budget: 4 network calls for the 5 candidates of image '0'"),
        (PairedTest(), {"budget": 0}, "budget: 0, expected at least 1"),
        (PairedTest(), {"weights": "heavy"}, "weights: 'heavy'"),
        (PairedTest(), {"weights": [1.0, 2.0]}, "weights: 2 numbers for 24 draws"),
    ],
)
def test_what_cannot_be_replayed_is_refused(rule, settings, message, tmp_path):
    errors = store(tmp_path / "e.parquet", Toy(), some_images(2))
    with pytest.raises(ValueError, match=message):
        replay(errors, rule, **settings)


@pytest.mark.parametrize("settings", [{"elimination": PairedTest(0.2)}, {"budget": 30}])
def test_errors_of_a_run_that_dropped_candidates_are_refused(settings, tmp_path):
    errors = store(tmp_path / "e.parquet", Toy(), some_images(3), **settings)
    with pytest.raises(ValueError, match=r"the run eliminated candidates .*; keep errors of an Exhaustive run"):
        replay(errors)


def test_the_loss_and_the_rule_must_fit(tmp_path):
    errors = store(tmp_path / "e.parquet", Toy(), some_images(1), keep_distances=True)
    errors.info = replace(errors.info, loss="l2+l1")
    with pytest.raises(ValueError, match=r"loss 'l2\+l1' is no distance between noises"):
        replay(errors, LikelihoodRatio())
    assert not any(isinstance(rule, LikelihoodRatio) for rule in usual_rules(errors))


def test_a_file_without_images_is_refused(tmp_path):
    ErrorsWriter(tmp_path / "e.parquet", ErrorsInfo.of(DiffusionClassifier(Toy(), Draws(4)))).close()
    with pytest.raises(ValueError, match="holds no image"):
        replay(StoredErrors(tmp_path / "e.parquet"))


def test_the_usual_rules_fit_any_file(tmp_path):
    for draws, candidates in ((1, 2), (2, 1), (7, 3), (DRAWS, 12)):
        path = tmp_path / f"{draws}.parquet"
        errors = store(path, Toy(candidates), some_images(2), draws=Draws(draws), keep_distances=True)
        replays = [replay(errors, rule) for rule in usual_rules(errors)]
        assert len(replays) == (7 if draws == 1 else 8)
        assert to_table(replays, errors.info).row_count == len(replays)
    assert replays[1].rule == Stages((2, DRAWS), (5, 1))


def test_a_file_of_the_demos_size(tmp_path):
    """As many errors as dit_digits.yaml makes, drawn at random."""
    rng, draws, count = np.random.default_rng(0), 100, 10
    classifier = DiffusionClassifier(Toy(count), Draws(draws), keep_errors=True)
    template = next(iter(classifier(some_images(1))))
    writer = ErrorsWriter(tmp_path / "e.parquet", ErrorsInfo.of(classifier))
    for i in range(360):
        errors_KS = 0.5 + 0.01 * rng.standard_normal((count, draws)) + 0.002 * rng.standard_normal((count, 1))
        writer.add(replace(template, image_id=i, errors_KS=torch.from_numpy(errors_KS.astype(np.float32))), 3)
    writer.close()
    found = replay(StoredErrors(tmp_path / "e.parquet"), PairedTest())
    assert found.agreement > 0.95
    assert found.factor > 1.2
