"""Cascade: what a small network proposes, against weights written out; what it costs, and what is refused."""

import numpy as np
import pytest
import torch

from lightning_diffclf import (
    Candidates,
    Cascade,
    DiffusionClassifier,
    DiT,
    Draws,
    LikelihoodRatio,
    NoiseSchedule,
    Recipe,
    Stages,
)
from lightning_diffclf.classifier.cascade import cost_of
from tests.classifier.gaussians import ExactGaussians, mixture
from tests.classifier.toys import SHAPE, Toy, some_images

FOUR = Recipe(draws=4, seed=3)


class Spoilt(Toy):
    """Returns NaN for some candidates."""

    def __init__(self, num_candidates: int, broken: list[int]) -> None:
        super().__init__(num_candidates)
        self.broken = torch.tensor(broken)

    def predict(self, x_t, t, candidate):
        output = super().predict(x_t, t, candidate)
        return torch.where(torch.isin(candidate, self.broken)[:, None, None, None], torch.nan, output)


class Net(torch.nn.Module):
    """A DiT as a denoiser."""

    def __init__(self, hidden_size: int, depth: int) -> None:
        super().__init__()
        torch.manual_seed(hidden_size)
        self.net = DiT(4, 2, 2, hidden_size, depth, 2, num_classes=8, learn_sigma=False)
        for parameter in self.net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        self.schedule, self.candidates = NoiseSchedule.linear(), Candidates([f"c{k}" for k in range(8)])

    def encode(self, images):
        return images

    def predict(self, x_t, t, candidate):
        return self.net(x_t, t, candidate)


def propose(cascade, images, ids=None, candidates=None, large=None, **settings):
    large = large or Toy(len(cascade.denoiser.candidates))
    classifier = DiffusionClassifier(large, Draws(8, seed=5), proposal=cascade, **settings)
    every = [np.arange(len(large.candidates))] * len(images)
    return cascade.propose(classifier, images, range(len(images)) if ids is None else ids, candidates or every)


def lists(found) -> list[list[int]]:
    return [one.tolist() for one in found.candidates]


def test_what_is_kept_are_the_likeliest_by_the_errors_of_the_other_network():
    small, images = Toy(12), some_images(5)
    cascade = Cascade(small, FOUR, miss=0.2, least=1, temper=0.7)
    found = propose(cascade, images)
    results = DiffusionClassifier(small, FOUR)(images, [f"cascade: {b}" for b in range(5)])
    sizes = set()
    for kept, result in zip(lists(found), results, strict=True):
        scores = result.scores_K.double()
        posterior = (-0.7 * 4 * int(np.prod(SHAPE)) * scores / (2 * scores.min())).softmax(0)
        order = posterior.argsort(descending=True)
        count = 1 + int((1 - posterior[order].cumsum(0) >= 0.2).sum())
        assert kept == sorted(order[:count].tolist())
        sizes.add(count)
    assert len(sizes) > 1


def test_the_contest_is_among_the_proposed():
    """A network that proposes for itself, and one that knows better than another."""
    means, images, labels = mixture(40, 30, distance=1.5)
    exact = ExactGaussians(NoiseSchedule.linear(), means)
    rough = ExactGaussians(NoiseSchedule.linear(), means + 0.1 * torch.randn_like(means))
    alone = DiffusionClassifier(exact, Draws(64), elimination=LikelihoodRatio(0.002))(images)
    cascade = Cascade(rough, Recipe(draws=64, elimination=LikelihoodRatio(0.05)))
    classifier = DiffusionClassifier(exact, Draws(64), elimination=LikelihoodRatio(0.002), proposal=cascade)
    results = classifier(images)
    proposed = propose(cascade, images, large=exact)
    assert [r.candidates_K.tolist() for r in results] == lists(proposed)
    assert np.mean([len(one) for one in lists(proposed)]) < 15
    assert np.mean([r.prediction == a.prediction for r, a in zip(results, alone, strict=True)]) >= 0.9
    assert np.mean([r.prediction == int(label) for r, label in zip(results, labels, strict=True)]) >= 0.9


def test_calls_are_counted_by_flops():
    small, large, images = Net(8, 1), Net(32, 4), some_images(3)
    cascade = Cascade(small, FOUR, miss=0.3, least=2, temper=0.5)
    classifier = DiffusionClassifier(large, Draws(8), proposal=cascade)
    found = propose(cascade, images, large=large)
    # Of a block: 4 tokens through qkv, projection, MLP and twice attention; 6 modulations by the condition.
    block = {n: 4 * (4 * n * n + 8 * n * n) + 2 * 4 * 4 * n + 6 * n * n for n in (8, 32)}
    # Around the blocks: the patches' convolution, two layers for the time, two modulations, and the output.
    around = {n: 4 * 8 * n + 256 * n + n * n + 2 * n * n + 4 * 8 * n for n in (8, 32)}
    ratio = (block[8] + around[8]) / (4 * block[32] + around[32])
    one = DiffusionClassifier(small, FOUR)
    assert cost_of(classifier, one, images[:1]) == pytest.approx(ratio, rel=0.03)  # older torch leaves out attention
    assert found.nfe == [int(np.ceil(ratio * 4 * 8))] * 3
    for result, kept in zip(classifier(images, ids=range(3)), found.candidates, strict=True):
        assert result.nfe == found.nfe[0] + 8 * len(kept)


def test_where_no_flops_are_counted_a_call_is_a_call():
    means, images, _ = mixture(6, 2, distance=1.0)
    exact = ExactGaussians(NoiseSchedule.linear(), means)
    assert propose(Cascade(exact, FOUR), images, large=exact).nfe == [24, 24]


def test_proposals_do_not_depend_on_batch_order_or_microbatch():
    images, ids = some_images(7), list("abcdefg")
    cascade = Cascade(Toy(12), Recipe(draws=20, elimination=LikelihoodRatio(0.05)), temper=0.5)
    together = propose(cascade, images, ids)
    assert len({tuple(one) for one in lists(together)}) > 1
    singly = [propose(cascade, image[None], [i]) for image, i in zip(images, ids, strict=True)]
    assert [lists(one)[0] for one in singly] == lists(together)
    assert [one.nfe[0] for one in singly] == together.nfe
    assert lists(propose(cascade, images.flip(0), ids[::-1])) == lists(together)[::-1]
    assert lists(propose(cascade, images, ids, microbatch=5)) == lists(together)
    assert lists(propose(cascade, images, list("tuvwxyz"))) != lists(together)


def test_its_noise_is_none_of_the_contests():
    small, large, images = Toy(5), Toy(5), some_images(1)
    cascade = Cascade(small, Recipe(draws=4, seed=5))
    propose(cascade, images, ids=[3], large=large)
    DiffusionClassifier(large, Draws(4, seed=5))(images, ids=[3])
    ours, theirs = (torch.cat([call[0] for call in one.calls if len(call[0]) > 1]) for one in (small, large))
    assert len(ours) == len(theirs) == 20
    assert not torch.isin(ours, theirs).any()


def test_only_candidates_in_play_are_proposed_and_few_are_not_searched():
    small, images = Toy(12), some_images(3)
    cascade = Cascade(small, FOUR, least=3)
    found = propose(cascade, images, candidates=[np.array([2, 4, 7, 9]), np.array([1, 3, 5]), np.array([8, 6])])
    assert set(lists(found)[0]) <= {2, 4, 7, 9}
    assert (lists(found)[1:], found.nfe[1:]) == ([[1, 3, 5], [8, 6]], [0, 0])
    small.calls.clear()
    found = propose(cascade, images[:1], candidates=[np.array([1, 3])])
    assert (lists(found), found.nfe, small.calls) == ([[1, 3]], [0], [])


def test_whole_classes_stay_where_their_mean_counts():
    small, large = Toy(12), Toy(12)
    small.candidates = large.candidates = Candidates(list("abcdefghijkl"), [k // 3 for k in range(12)])
    cascade = Cascade(small, Recipe(draws=4, ensemble="mean"), temper=0.5)
    for one in lists(propose(cascade, some_images(6), large=large, ensemble="mean")):
        assert len(one) >= 6  # the least number of classes
        assert all({3 * (k // 3), 3 * (k // 3) + 1, 3 * (k // 3) + 2} <= set(one) for k in one)


def test_the_other_network_moves_to_the_images():
    small, moved = Toy(12), []
    small.to = moved.append
    images = some_images(2)
    propose(Cascade(small, FOUR), images)
    assert moved == [images.device]


def test_a_recipe_that_does_not_fit_the_other_network_is_refused_before_any_image():
    with pytest.raises(TypeError, match="denoiser: Linear lacks"):
        DiffusionClassifier(Toy(5), Draws(8), proposal=Cascade(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="draws: 8, but the elimination rule spends up to 500"):
        DiffusionClassifier(Toy(5), Draws(8), proposal=Cascade(Toy(5), Recipe(draws=8, elimination=Stages())))


@pytest.mark.filterwarnings("ignore:image 'cascade:RuntimeWarning")
def test_what_the_other_network_cannot_predict_is_not_proposed_unless_it_is_all():
    found = propose(Cascade(Spoilt(6, [0, 4]), FOUR, most=3, temper=0.01), some_images(2))
    assert all(len(one) == 3 and not {0, 4} & set(one) for one in lists(found))
    found = propose(Cascade(Spoilt(6, list(range(6))), FOUR), some_images(2))
    assert lists(found) == [list(range(6))] * 2
    assert found.dropped == [4, 4]
    assert min(found.nfe) > 0


def test_candidates_that_differ_are_refused():
    def other(names, classes=None):
        toy = Toy(5)
        toy.candidates = Candidates(names, classes)
        return toy

    large = Toy(5)
    for small, message in (
        (Toy(4), "cascade: a network with 4 candidates, expected the 5 of the other"),
        (other(["c0", "c2", "c1", "c3", "c4"]), "cascade: candidate 1 is 'c2' of class 1, expected 'c1' of class 1"),
        (other(large.candidates.names, [0, 1, 2, 3, 3]), "cascade: candidate 4 is 'c4' of class 3, .* of class 4"),
    ):
        with pytest.raises(ValueError, match=message):
            DiffusionClassifier(large, Draws(8), proposal=Cascade(small))
    DiffusionClassifier(large, Draws(8), proposal=Cascade(Toy(5)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least": 0}, "least 0, expected at least 1"),
        ({"least": 5, "most": 4}, "most 4, expected at least the 5 of least"),
        ({"miss": 1.0}, "miss 1.0, expected a share"),
        ({"temper": 0.0}, "temper 0.0, expected a number above 0"),
        ({"temper": float("nan")}, "temper nan"),
        ({"recipe": Recipe(candidates=[0, 1])}, "a recipe with candidates, expected one of all candidates"),
        ({"recipe": Recipe(proposal=Cascade(Toy(5)))}, "a recipe with proposal"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=f"cascade: {message}"):
        Cascade(Toy(5), **settings)
