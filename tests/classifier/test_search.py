"""GradientSearch: gradients by the condition against closed forms, invariances, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, NoiseSchedule
from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.classifier.search import FIRST_DRAW, GradientSearch, cost_of, gradient
from lightning_diffclf.denoiser import SearchableDenoiser
from tests.classifier.gaussians import ExactGaussians, mixture
from tests.classifier.toys import SHAPE, Toy, some_images

DIMS = int(np.prod(SHAPE))


class Gaussians(ExactGaussians):
    """Conditions are the means, and predictions are linear in them."""

    def conditions(self, candidate: Tensor) -> Tensor:
        return self.means[candidate]

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        table, self.means = self.means, conditions
        try:
            return self.predict(x_t, t, torch.arange(len(x_t)))
        finally:
            self.means = table


class Searchable(Toy):
    """A nonlinear network with conditions in two parts, which may fail."""

    def __init__(self, num_candidates: int = 12, broken: tuple[float, ...] = (), schedule: NoiseSchedule | None = None):
        super().__init__(num_candidates, schedule)
        self.broken, self.gradients = broken, 0
        self.scale = nn.Parameter(torch.rand(num_candidates, 1, 1, generator=torch.Generator().manual_seed(3)))

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        with torch.no_grad():
            return self.predict_from(x_t, t, self.conditions(candidate))

    def conditions(self, candidate: Tensor) -> tuple[Tensor, ...]:
        return self.table[candidate], self.scale[candidate]

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: tuple[Tensor, ...]) -> Tensor:
        self.gradients += torch.is_grad_enabled()
        shift, scale = conditions
        hidden = x_t.flatten(1) @ self.weight + shift * (t / 1000)[:, None]
        hidden = torch.where(torch.isin(t, torch.tensor(self.broken, dtype=t.dtype))[:, None], torch.nan, hidden)
        return torch.tanh(hidden * (1 + scale[:, 0])).view_as(x_t)


def propose(denoiser, images, search=None, ids=None, candidates=None, **settings):
    classifier = DiffusionClassifier(denoiser, Draws(8, seed=5), **settings)
    every = [np.arange(len(denoiser.candidates))] * len(images)
    found = (search or GradientSearch()).propose(
        classifier, images, range(len(images)) if ids is None else ids, candidates or every
    )
    assert len(found.candidates) == len(found.nfe) == len(found.dropped) == len(images)
    return found


def lists(found) -> list[list[int]]:
    return [one.tolist() for one in found.candidates]


# --- what the gradient says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(), NoiseSchedule.rectified_flow()])
def test_the_gradient_ranks_as_the_errors_do_to_first_order(schedule):
    """Of conditions near their mean, log likelihoods differ by the gradient times the difference of conditions."""
    generator = torch.Generator().manual_seed(1)
    directions, centre = torch.randn(6, *SHAPE, generator=generator), torch.randn(1, *SHAPE, generator=generator)
    x0, noise = torch.randn(3, *SHAPE, generator=generator), torch.randn(3, *SHAPE, generator=generator)
    t = schedule.timesteps(2)[1]
    misfit = []
    for distance in (0.04, 0.01):
        means = centre + distance * directions
        denoiser = Gaussians(schedule, means)
        mean = means.flatten(1).mean(0, keepdim=True)
        gradient_MP = gradient(denoiser, x0, noise, t, mean.expand(3, -1), means)
        ours_MK = gradient_MP @ (means.flatten(1) - mean).T
        likelihood = []
        for k in range(-1, 6):  # the mean of all first
            table = Gaussians(schedule, means if k >= 0 else mean.view(1, *SHAPE))
            times = t.expand(3)
            x_t = schedule.add_noise(x0, noise, times)
            output = table.predict(*schedule.network_rows(x_t, times), torch.full((3,), max(k, 0)))
            error = (schedule.to_epsilon(output, x_t, times) - noise).double().square().flatten(1).mean(1)
            likelihood.append(-DIMS / 2 * error.log())
        true_MK = torch.stack(likelihood[1:], 1) - likelihood[0][:, None]
        misfit.append(float((ours_MK - true_MK).abs().max()))
        if distance == 0.01:
            assert torch.equal(ours_MK.argsort(1), true_MK.argsort(1))
    assert misfit[1] < misfit[0] / 8  # the second order: a sixteenth of it at a quarter of the distance


def test_it_finds_the_class_among_many():
    means, images, labels = mixture(150, 40, distance=1.0)
    found = propose(Gaussians(NoiseSchedule.linear(), means), images, GradientSearch(temper=0.1))
    assert np.mean([int(label) in one for label, one in zip(labels, lists(found), strict=True)]) >= 0.95
    assert np.mean([len(one) for one in lists(found)]) < 15


def test_a_draw_is_mirror_descent_on_the_mean_condition():
    """One draw, written out: noise of the search's own, at the middle of its timesteps, from the mean on."""
    denoiser, image = Searchable(5), some_images(1)
    search = GradientSearch(draws=1, temper=0.9, miss=0.2, least=1, most=5)
    t = search.times(denoiser.schedule)
    assert t.tolist() == [500]
    keyed, noise = KeyedNoise(5), np.empty(SHAPE, dtype=np.float32)
    keyed.fill(noise, keyed.key("an image"), FIRST_DRAW)
    x_t = denoiser.schedule.add_noise(image, torch.from_numpy(noise)[None], t)
    weights = torch.full((5,), 0.2, requires_grad=True)
    shift, scale = weights @ denoiser.table, (weights @ denoiser.scale.flatten()).view(1, 1, 1)
    output = denoiser.predict_from(x_t, t, (shift[None], scale))
    likelihood = -DIMS / 2 * (output - torch.from_numpy(noise)).square().mean().log()
    (by_weight,) = torch.autograd.grad(likelihood, weights)  # by the chain rule, what each condition adds
    posterior = (0.9 * by_weight.double()).softmax(0)
    order = posterior.argsort(descending=True)
    count = 1 + int((1 - posterior[order].cumsum(0) >= 0.2).sum())
    assert 1 < count < 5
    found = propose(denoiser, image, search, ids=["an image"])
    assert lists(found) == [sorted(order[:count].tolist())]


# --- invariances ---------------------------------------------------------------------------------------------------


def test_proposals_do_not_depend_on_batch_order_or_microbatch():
    denoiser, images, ids = Searchable(), some_images(7), list("abcdefg")
    search = GradientSearch(draws=4, temper=0.5)
    together = lists(propose(denoiser, images, search, ids))
    assert len({tuple(one) for one in together}) > 1
    singly = [lists(propose(denoiser, image[None], search, [i]))[0] for image, i in zip(images, ids, strict=True)]
    assert singly == together
    assert lists(propose(denoiser, images.flip(0), search, ids[::-1])) == together[::-1]
    assert lists(propose(denoiser, images, dataclasses.replace(search, microbatch=2), ids)) == together
    assert lists(propose(denoiser, images, search, list("tuvwxyz"))) != together


def test_only_candidates_in_play_are_mixed_and_proposed():
    images, search = some_images(2), GradientSearch(draws=3, temper=0.5)
    found = propose(Searchable(12), images, search, candidates=[np.array([7, 2, 9, 4]), np.array([0, 1, 3, 5, 6])])
    assert set(lists(found)[0]) <= {2, 4, 7, 9}
    assert set(lists(found)[1]) <= {0, 1, 3, 5, 6}
    few = Searchable(12)
    few.candidates = Candidates(["a", "b", "c", "d"])
    few.table, few.scale = nn.Parameter(few.table[[2, 4, 7, 9]]), nn.Parameter(few.scale[[2, 4, 7, 9]])
    alone = propose(few, images[:1], search)
    assert [[2, 4, 7, 9][k] for k in lists(alone)[0]] == lists(found)[0]


def test_in_inference_mode_as_under_a_trainer():
    search = GradientSearch(draws=3, temper=0.5)
    expected = lists(propose(Searchable(), some_images(3), search))
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert lists(propose(Searchable(), some_images(3) * 1, search)) == expected
            assert not torch.is_grad_enabled()


def test_whole_classes_stay_where_their_mean_counts():
    denoiser = Searchable(12)
    denoiser.candidates = Candidates(list("abcdefghijkl"), [k // 3 for k in range(12)])
    search = GradientSearch(draws=3, temper=0.5)
    for one in lists(propose(denoiser, some_images(6), search, ensemble="mean")):
        assert len(one) >= 6  # the least number of classes
        assert all({3 * (k // 3), 3 * (k // 3) + 1, 3 * (k // 3) + 2} <= set(one) for k in one)


@pytest.mark.parametrize(
    ("weights", "settings", "kept"),
    [
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.31, "least": 1}, [10]),
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.29, "least": 1}, [10, 13]),
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.1, "least": 1}, [10, 11, 13]),
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.01}, [10, 11, 12, 13]),
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.31, "least": 2}, [10, 13]),
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.01, "most": 3}, [10, 11, 13]),
        ([0.7, 0.1, 0.05, 0.15], {"miss": 0.9, "least": 9}, [10, 11, 12, 13]),
    ],
)
def test_what_is_kept(weights, settings, kept):
    search = GradientSearch(**settings)
    assert search.keep(np.array(weights), np.arange(10, 14), np.arange(20)).tolist() == kept


def test_timesteps_are_of_the_part_asked_for_from_its_middle_on():
    for schedule in (NoiseSchedule.linear(), NoiseSchedule.rectified_flow(), NoiseSchedule.rectified_flow(0)):
        times = GradientSearch(draws=4, timesteps=(0.2, 0.6)).times(schedule)
        grid = schedule.timesteps(1000)
        noisy = schedule.log_snr(grid).argsort(descending=True).argsort()  # 0 is the cleanest
        places = [int(noisy[(grid == t).nonzero()[0, 0]]) for t in times]
        assert places == [450, 250, 550, 350]


# --- cost ----------------------------------------------------------------------------------------------------------


def test_cost_is_counted_in_forwards():
    class Layers(Searchable):
        def __init__(self):
            super().__init__(12)
            self.down, self.up = nn.Linear(8, 64, bias=False), nn.Linear(64, DIMS, bias=False)
            self.embed = nn.Embedding(12, 8)

        def conditions(self, candidate):
            return self.embed(candidate)

        def predict(self, x_t, t, candidate):
            return self.predict_from(x_t, t, self.embed(candidate))

        def predict_from(self, x_t, t, conditions):
            return self.up(torch.tanh(x_t.flatten(1) @ self.weight @ self.up.weight + self.down(conditions))).view_as(
                x_t
            )

    denoiser = Layers()
    x, back, down, up = DIMS * DIMS, DIMS * 64, 8 * 64, 64 * DIMS
    cost = cost_of(DiffusionClassifier(denoiser, Draws(8)), some_images(1))
    assert cost == pytest.approx((x + back + 2 * down + 2 * up) / (x + back + down + up))  # no gradient of weights
    assert propose(denoiser, some_images(2), GradientSearch(draws=5)).nfe == [int(np.ceil(5 * cost))] * 2


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_candidates_are_not_searched(count):
    denoiser = Searchable(count)
    found = propose(denoiser, some_images(2))
    assert (lists(found), found.nfe, denoiser.gradients) == ([list(range(count))] * 2, [0, 0], 0)
    found = propose(Searchable(12), some_images(2), candidates=[np.arange(12), np.array([3, 1])])
    assert found.nfe[0] > 0
    assert (lists(found)[1], found.nfe[1]) == ([3, 1], 0)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_draws_without_a_gradient_are_dropped_and_counted():
    search = GradientSearch(draws=3, temper=0.5)
    times = search.times(NoiseSchedule.linear()).tolist()
    with pytest.warns(RuntimeWarning, match=r"search: 2 of 6 gradients were NaN .* \(image 0: 1 of 3\)"):
        found = propose(Searchable(broken=(times[1],)), some_images(2), search)
    assert found.dropped == [1, 1]
    assert all(len(one) < 12 for one in lists(found))
    with pytest.warns(RuntimeWarning, match="search: 6 of 6 gradients"):
        found = propose(Searchable(broken=tuple(times)), some_images(2), search)
    assert found.dropped == [3, 3]
    assert lists(found) == [list(range(12))] * 2
    assert min(found.nfe) > 0


def test_without_a_gradient_it_says_so_before_long_work():
    class Frozen(Searchable):
        def predict_from(self, x_t, t, conditions):
            with torch.no_grad():
                return super().predict_from(x_t, t, conditions)

    class Elsewhere(Searchable):
        def predict_from(self, x_t, t, conditions):
            return x_t * self.weight[0, 0]

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.round()

    class Quantised(Searchable):
        def predict_from(self, x_t, t, conditions):
            return super().predict_from(x_t, t, (Kernel.apply(conditions[0]), conditions[1]))

    class Detached(Searchable):
        def predict_from(self, x_t, t, conditions):
            return super().predict_from(x_t, t, tuple(part.detach() for part in conditions))

    for denoiser in (Frozen(), Elsewhere(), Detached()):
        with pytest.raises(ValueError, match=f"search: what {type(denoiser).__name__} predicts has no gradient"):
            propose(denoiser, some_images(3))
        assert len(denoiser.calls) == 0
    with pytest.raises(ValueError, match="search: Quantised cannot be differentiated by its conditions"):
        propose(Quantised(), some_images(3))
    with pytest.raises(TypeError, match=r"search: Toy lacks \['conditions', 'predict_from'\]; see SearchableDenoiser"):
        propose(Toy(), some_images(1))
    assert not isinstance(Toy(), SearchableDenoiser)
    assert isinstance(Searchable(), SearchableDenoiser)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws 0, expected at least 1"),
        ({"least": 0}, "least 0, expected at least 1"),
        ({"microbatch": 0}, "microbatch 0, expected at least 1"),
        ({"least": 5, "most": 4}, "most 4, expected at least the 5 of least"),
        ({"miss": 0.0}, "miss 0.0, expected a share"),
        ({"miss": 1.0}, "miss 1.0, expected a share"),
        ({"miss": float("nan")}, "miss nan"),
        ({"temper": 0.0}, "temper 0.0"),
        ({"temper": float("inf")}, "temper inf"),
        ({"fall": -0.1}, "fall -0.1"),
        ({"timesteps": (0.6, 0.6)}, r"timesteps \(0.6, 0.6\)"),
        ({"timesteps": (-0.1, 0.6)}, "timesteps"),
        ({"timesteps": (0.1, 1.1)}, "timesteps"),
        ({"timesteps": (0.1,)}, "timesteps"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"search: {message}"):
        GradientSearch(**settings)
