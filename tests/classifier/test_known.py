"""Errors of an earlier run take the place of network calls: the same decisions and errors, only the missing calls."""

import numpy as np
import pytest
import torch

from lightning_diffclf import DiffusionClassifier, Draws, LikelihoodRatio, NoiseSchedule, PairedTest, Stages
from lightning_diffclf.classifier.known import KnownErrors, distances_between, pair_of
from tests.classifier.toys import DropOneEachDraw, Toy, some_images

IDS = ["a", "b", 7, "d"]


class Exact(Toy):
    """One whose rows do not depend, to the bit, on what else is in a micro-batch."""

    def predict(self, x_t, t, candidate):
        self.calls.append((x_t, t, candidate))
        return torch.tanh(x_t * self.table[candidate].view_as(x_t) + (t / 1000)[:, None, None, None])


def classifier(draws=12, rule=None, microbatch=7, **settings) -> DiffusionClassifier:
    recipe = {"draws": draws, "grid": 100, "elimination": rule} | settings
    return DiffusionClassifier(Exact(), microbatch=microbatch, keep_errors=True, **recipe)


def decide(one: DiffusionClassifier, known=None, candidates=None):
    one.denoiser.calls.clear()
    run = one.run()
    results = []
    for i in range(0, len(IDS), 2):
        some = None if known is None else known[i : i + 2]
        run.add(some_images(len(IDS))[i : i + 2], IDS[i : i + 2], candidates, some)
        results += run.work()
    results += run.finish()
    return results, sum(len(candidate) for _, _, candidate in one.denoiser.calls)


def known_of(results) -> list[KnownErrors]:
    """As errors.parquet has them."""
    found = []
    for one in results:
        squares = None
        if one.distances_SKK is not None:
            upper = np.triu_indices(len(one.candidates_K), 1)
            squares = one.distances_SKK.numpy()[:, upper[0], upper[1]]
        found.append(KnownErrors(one.candidates_K.numpy(), one.draws_K.numpy(), one.errors_KS.numpy().T, squares))
    return found


def same(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a.image_id, a.prediction, a.margin) == (b.image_id, b.prediction, b.margin)
        assert torch.equal(a.draws_K, b.draws_K)
        assert torch.equal(a.scores_K, b.scores_K)
        assert np.array_equal(a.errors_KS.numpy(), b.errors_KS.numpy(), equal_nan=True)  # bit for bit
        assert a.nfe + a.reused == b.nfe + b.reused


def test_more_draws_cost_exactly_the_difference():
    few, calls_of_few = decide(classifier(10))
    assert calls_of_few == len(IDS) * 5 * 10
    fresh, calls = decide(classifier(25))
    assert calls == len(IDS) * 5 * 25
    again, new_calls = decide(classifier(25), known_of(few))
    same(again, fresh)
    assert new_calls == calls - calls_of_few == len(IDS) * 5 * 15
    assert [(one.nfe, one.reused) for one in again] == [(5 * 15, 5 * 10)] * len(IDS)
    assert {one.reused for one in fresh} == {0}


def test_all_that_is_known_takes_no_call():
    fresh, _ = decide(classifier(25))
    fewer, calls = decide(classifier(10), known_of(fresh))
    assert calls == 0
    same(fewer, decide(classifier(10))[0])
    assert {one.nfe for one in fewer} == {0}


@pytest.mark.parametrize("microbatch", [1, 7, 64])
@pytest.mark.parametrize("name", ["exhaustive", "ragged", "paired", "budget", "subset"])
def test_what_a_rule_or_a_budget_left_out_is_computed(name, microbatch):
    """Known are errors of a run that dropped candidates; what this one needs and that one did not, is computed."""
    ragged, _ = decide(classifier(12, DropOneEachDraw()))
    assert len({int(n) for one in ragged for n in one.draws_K}) > 2
    settings = {
        "exhaustive": {},
        "ragged": {"draws": 20, "rule": DropOneEachDraw()},
        "paired": {"draws": 20, "rule": PairedTest(0.05)},
        "budget": {"draws": 20, "budget": 33},
        "subset": {"draws": 20, "candidates": [4, 1, 2]},
    }[name]
    one = classifier(**settings, microbatch=microbatch)
    fresh, calls = decide(one)
    again, new_calls = decide(one, [*known_of(ragged)[:3], None])
    same(again, fresh)
    taken = sum(one.reused for one in again)
    assert new_calls == calls - taken
    assert again[3].reused == 0
    for image, old in zip(again[:3], ragged, strict=False):
        seen = dict(zip(old.candidates_K.tolist(), old.draws_K.tolist(), strict=True))
        pairs = zip(image.candidates_K.tolist(), image.draws_K.tolist(), strict=True)
        assert image.reused == sum(min(n, seen[k]) for k, n in pairs)


def test_distances_are_taken_as_well():
    rule = LikelihoodRatio(0.05)
    stored = DiffusionClassifier(Exact(), draws=6, grid=100, microbatch=7, keep_errors=True, keep_distances=True)
    few, _ = decide(stored)
    one = classifier(20, rule)
    fresh, calls = decide(one)
    again, new_calls = decide(one, known_of(few))
    same(again, fresh)
    assert new_calls == calls - sum(one.reused for one in again) < calls
    without = [KnownErrors(k.candidates_K, k.draws_K, k.errors_SK) for k in known_of(few)]
    assert decide(one, without)[1] == calls  # errors without distances are not enough: computed again, counted
    kept = DiffusionClassifier(Exact(), draws=9, grid=100, microbatch=7, keep_errors=True, keep_distances=True)
    both = [decide(kept, known)[0] for known in (None, known_of(few))]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a.distances_SKK, b.distances_SKK)


def test_a_draw_of_which_some_are_known_is_measured_whole():
    """Distances need all predictions of a draw: candidates dropped before make it unknown."""
    ragged = DiffusionClassifier(
        Exact(), draws=8, grid=100, elimination=DropOneEachDraw(), keep_errors=True, keep_distances=True
    )
    few, _ = decide(ragged)
    one = classifier(8, LikelihoodRatio(1e-9))  # keeps all
    fresh, calls = decide(one)
    again, new_calls = decide(one, known_of(few))
    same(again, fresh)
    complete = [int(image.draws_K.min()) for image in few]
    assert new_calls == calls - 5 * sum(complete)


def test_what_the_network_broke_stays_broken():
    class Breaks(Exact):
        def predict(self, x_t, t, candidate):
            output = super().predict(x_t, t, candidate)
            return torch.where((candidate == 2)[:, None, None, None], torch.nan, output)

    one = DiffusionClassifier(Breaks(), draws=4, grid=100, keep_errors=True)
    with pytest.warns(RuntimeWarning, match="NaN or infinity for 1 of 5"):
        few, _ = decide(one)
    with pytest.warns(RuntimeWarning, match="NaN or infinity for 1 of 5"):
        again, calls = decide(one, known_of(few))
    assert calls == 0
    assert [image.prediction for image in again] == [image.prediction for image in few]
    assert all(torch.isinf(image.scores_K[2]) for image in again)


def test_draws_on_one_grid_nest():
    schedule = NoiseSchedule.linear()
    many = Draws(250, grid=1000).visit(schedule)
    assert torch.equal(Draws(100, grid=1000).visit(schedule), many[:100])
    assert len(set(many.tolist())) == 250
    counts = torch.histc(many[:100].double(), 10, 0, 1000)  # any prefix is spread evenly
    assert counts.min() >= 9
    assert counts.max() <= 11
    assert not torch.equal(Draws(100).visit(schedule), Draws(250).visit(schedule)[:100])
    flow = NoiseSchedule.rectified_flow()
    assert torch.equal(Draws(7, grid=50).visit(flow), Draws(30, grid=50).visit(flow)[:7])
    assert torch.equal(Draws(50, grid=50).visit(flow), Draws(50).visit(flow))


def test_a_grid_that_cannot_be():
    with pytest.raises(ValueError, match="grid: 10 timesteps for 20 draws, expected at least 20"):
        Draws(20, grid=10)
    with pytest.raises(ValueError, match="grid: 100, but the elimination rule has grids of its own"):
        classifier(20, Stages((10, 20), (2, 1)))
    with pytest.raises(ValueError, match="grid of 5 beside fixed timesteps"):
        Draws(2, timesteps=torch.tensor([1, 2]), grid=5)
    with pytest.raises(ValueError, match="grid: 5, but draws have the grid None"):
        DiffusionClassifier(Toy(), draws=Draws(2), grid=5)


def test_pairs_of_candidates():
    full = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    full = full + full.transpose(0, 2, 1)
    full[:, np.arange(4), np.arange(4)] = 0
    upper = np.triu_indices(4, 1)
    playing = np.array([3, 0, 2])
    found = distances_between(full[:, upper[0], upper[1]], pair_of(4), playing)
    assert np.array_equal(found, full[:, playing][:, :, playing])
    known = KnownErrors(np.array([8, 5]), np.array([2, 1]), np.arange(4, dtype=np.float32).reshape(2, 2))
    found = known.of_round(np.array([5, 6, 8]), 0, 3, False)
    assert found.known_RP.tolist() == [[True, False, True], [False, False, True], [False, False, False]]
    assert found.errors_RP[found.known_RP].tolist() == [1, 0, 2]
