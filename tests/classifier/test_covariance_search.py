"""CovarianceSearch: what it predicts, against normal distributions written out; what it finds, costs and refuses."""

import numpy as np
import pytest
import torch

from lightning_diffclf import DiffusionClassifier, Draws, GradientSearch, LikelihoodRatio
from lightning_diffclf.classifier import CovarianceSearch
from lightning_diffclf.classifier.covariance_search import pivots
from lightning_diffclf.classifier.search import FIRST_DRAW
from lightning_diffclf.noise import KeyedNoise
from tests.classifier.toys import SHAPE, Toy, some_images


class Pairs(Toy):
    """100 candidates, whose halves of what is predicted are one of 10 each, as pairs of digits are."""

    def __init__(self) -> None:
        super().__init__(100)
        generator = torch.Generator().manual_seed(1)
        left, right = torch.randn(2, 10, int(np.prod(SHAPE)), generator=generator)
        half = torch.arange(left.shape[1]) < left.shape[1] // 2
        self.table = torch.nn.Parameter(torch.cat([torch.where(half, one, right) for one in left]) * 2)
        self.broken, self.broken_above = -1, -torch.inf  # the candidate, and the sum of x_t from which it is

    def predict(self, x_t, t, candidate):
        output = super().predict(x_t, t, candidate)
        breaks = (candidate == self.broken) & (x_t.flatten(1).sum(1) > self.broken_above)
        return torch.where(breaks[:, None, None, None], torch.nan, output)


NET, IMAGES = Pairs(), torch.rand(80, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
SETTINGS = {"timestep": 0.6, "temper": 2.0, "miss": 0.1}  # the draws that it sees are what counts here
FITTED = CovarianceSearch(**SETTINGS).fit(NET, [(IMAGES[:25], None), (IMAGES[25:60], None)])


def propose(search, images, ids=None, candidates=None, net=NET):
    classifier = DiffusionClassifier(net, Draws(8, seed=5), proposal=search)
    every = [np.arange(len(net.candidates))] * len(images)
    return search.propose(classifier, images, range(len(images)) if ids is None else ids, candidates or every)


def lists(found):
    return [one.tolist() for one in found.candidates]


def predictions_of_all(x0, key, seed, sign=1):
    """What each candidate predicts (K, D), and the noise (D,), at 0.6 of the time axis: a call for each."""
    noise, keyed = np.empty(SHAPE, dtype=np.float32), KeyedNoise(seed)
    keyed.fill(noise, keyed.key(key), FIRST_DRAW)
    noise *= sign
    t = torch.full((100,), 600)
    x_t = NET.schedule.add_noise(x0.expand(100, *SHAPE), torch.from_numpy(noise).expand(100, *SHAPE), t)
    with torch.no_grad():
        return Toy.predict(NET, x_t, t, torch.arange(100)).flatten(1).numpy(), noise.ravel()


def test_what_is_predicted_is_the_conditional_mean_of_a_normal_distribution():
    seen_BKD = np.stack([predictions_of_all(x0, f"fit: {b}", 0)[0] for b, x0 in enumerate(IMAGES[:60])])
    mean_KD = seen_BKD.mean(0)
    anchors = FITTED.state_dict()["anchors"].numpy()
    truth_KD, noise_D = predictions_of_all(IMAGES[70], 70, 5)
    expected_KD = mean_KD.astype(np.float64)
    for d in range(mean_KD.shape[1]):
        covariance = np.cov(seen_BKD[:, :, d].T.astype(np.float64), bias=True)
        noisy = covariance[np.ix_(anchors, anchors)] + 0.02 * covariance.diagonal().mean() * np.eye(len(anchors))
        told = np.linalg.solve(noisy, truth_KD[anchors, d] - mean_KD[anchors, d])
        expected_KD[:, d] += covariance[:, anchors] @ told
    expected_KD[anchors] = truth_KD[anchors]
    for told_D in (noise_D, *truth_KD[3:6]):  # of other noise too: what is expected, from more than one side
        asked = torch.from_numpy(truth_KD[anchors])[None], torch.from_numpy(told_D)[None]
        np.testing.assert_allclose(
            FITTED.errors(*asked)[0], np.square(expected_KD - told_D).mean(1), rtol=1e-3, atol=1e-5
        )
    # Six of a hundred say nearly all about the others, whose halves they share.
    assert np.square(expected_KD - truth_KD).mean() < 0.1 * truth_KD.var(0).mean()


def test_it_measures_how_much_more_differences_vary_than_residuals_say():
    search = CovarianceSearch(**SETTINGS).fit(NET, [(IMAGES[:3], None)])
    keyed, noise, timesteps = KeyedNoise(0), np.empty(SHAPE, dtype=np.float32), Draws(8).visit(NET.schedule)
    found = []
    for b, x0 in enumerate(IMAGES[:3]):
        predicted_KD, noise_D = predictions_of_all(x0, f"fit: {b}", 0)
        best = np.square(predicted_KD - noise_D).mean(1).argsort()[:3]
        rows, error = [], []
        for draw, t in enumerate(timesteps):
            keyed.fill(noise, keyed.key(f"fit: {b}"), draw)
            x_t = NET.schedule.add_noise(x0.expand(3, *SHAPE), torch.from_numpy(noise).expand(3, *SHAPE), t.expand(3))
            with torch.no_grad():
                rows.append(Toy.predict(NET, x_t, t.expand(3), torch.from_numpy(best)).flatten(1).numpy())
            error.append(np.square(rows[-1] - noise.ravel()).mean(1))
        winner, second = np.argsort(np.mean(error, 0))[:2]
        d = np.array([one[second] - one[winner] for one in error])
        g = np.array([np.square(one[second] - one[winner]).mean() for one in rows])
        deviation = np.sqrt([4 * one[winner] * apart / 32 for one, apart in zip(error, g, strict=True)])
        left = np.linalg.lstsq((g / deviation)[:, None], d / deviation)[1]  # d by a multiple of g
        found.append(float(left[0]) / 7)
    assert search.inflation == pytest.approx(np.mean(found), abs=0.01)  # it is rounded, and distances are halves
    assert search.calls(100) == 100 + 3 * 8


def test_the_rule_has_what_was_measured_unless_it_was_given_something():
    search = CovarianceSearch(**SETTINGS)
    for given, before, after in ((None, None, FITTED.inflation), (3.0, 3.0, 3.0)):
        classifier = DiffusionClassifier(NET, elimination=LikelihoodRatio(0.02, inflation=given), proposal=search)
        assert classifier.rule == LikelihoodRatio(0.02, inflation=before)
        search.load_state_dict(FITTED.state_dict())
        assert classifier.rule == LikelihoodRatio(0.02, inflation=after)
        search = CovarianceSearch(**SETTINGS)
    assert GradientSearch().inflation == 1
    for proposal in (None, lambda images: [[0, 1]] * len(images)):
        classifier = DiffusionClassifier(NET, elimination=LikelihoodRatio(0.02), proposal=proposal)
        assert classifier.rule == LikelihoodRatio(0.02, inflation=1.0)
    search.load_state_dict({name: value for name, value in FITTED.state_dict().items() if name != "inflation"})
    assert search.inflation == 1


def test_anchors_are_the_pivots_of_a_cholesky_decomposition():
    varies = np.random.default_rng(0).normal(size=(3, 6, 9)).astype(np.float32)  # three values, six images
    left, expected = [one.T @ one for one in varies.astype(np.float64)], []
    for _ in range(4):
        expected.append(int(sum(one.diagonal() for one in left).argmax()))
        k = expected[-1]
        left = [one - np.outer(one[:, k], one[k]) / one[k, k] for one in left]
    assert pivots(torch.from_numpy(varies), 4).tolist() == expected


def test_it_finds_the_best_of_all_candidates_and_counts_its_calls():
    images, calls = IMAGES[60:], len(NET.calls)
    found = propose(FITTED, images)
    assert found.nfe == [12] * 20
    assert sum(len(candidate) for *_, candidate in NET.calls[calls:]) == 240
    best = []  # of all candidates, at the two draws that the search sees
    for b, x0 in enumerate(images):
        nats_K = np.zeros(100)
        for sign in (1, -1):
            predicted_KD, noise_D = predictions_of_all(x0, b, 5, sign)
            nats_K -= np.log(np.square(predicted_KD - noise_D).mean(1))
        best.append(int(nats_K.argmax()))
    assert np.mean([one in some for one, some in zip(best, lists(found), strict=True)]) >= 0.95
    assert np.mean([len(some) for some in lists(found)]) < 30


def test_proposals_depend_on_image_and_id_only_and_are_saved():
    images = IMAGES[60:66]
    found, other = lists(propose(FITTED, images)), CovarianceSearch(**SETTINGS)
    assert lists(propose(FITTED, images[3:], [3, 4, 5])) == found[3:]
    other.load_state_dict(FITTED.state_dict())
    assert lists(propose(other, images)) == found
    assert other.identity() == FITTED.identity() != CovarianceSearch(**SETTINGS).identity()


def test_only_anchors_are_called_and_few_candidates_are_not_searched():
    some, calls = np.arange(0, 100, 3), len(NET.calls)
    found = propose(FITTED, IMAGES[60:61], candidates=[some])
    asked = [int(k) for *_, candidate in NET.calls[calls:] for k in candidate]
    assert asked == 2 * FITTED.state_dict()["anchors"].tolist()
    assert set(lists(found)[0]) <= set(some.tolist())
    few = propose(FITTED, IMAGES[60:61], candidates=[np.arange(12)])
    assert (lists(few), few.nfe) == ([list(range(12))], [0])


def test_broken_draws_do_not_count_and_without_any_all_stay():
    net = Pairs()
    net.broken = int(FITTED.state_dict()["anchors"][0])
    found = propose(FITTED, IMAGES[60:61], net=net)
    assert (lists(found), found.dropped, found.nfe) == ([list(range(100))], [2], [12])
    noise, keyed = np.empty(SHAPE, dtype=np.float32), KeyedNoise(5)
    keyed.fill(noise, keyed.key(0), FIRST_DRAW)
    noises, t = torch.from_numpy(np.stack([noise, -noise])), torch.tensor([600, 600])
    sums = NET.schedule.add_noise(IMAGES[60:61].expand(2, *SHAPE), noises, t).flatten(1).sum(1)
    net.broken_above = float(sums.mean())  # one of the two draws
    one_left = propose(FITTED, IMAGES[60:61], net=net)
    assert (one_left.dropped, one_left.nfe) == ([1], [12])
    assert 0 < len(one_left.candidates[0]) < 100
    net.broken_above = -torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        CovarianceSearch().fit(net, [(IMAGES[:2], None)])


def test_what_is_refused():
    with pytest.raises(ValueError, match="not fitted"):
        propose(CovarianceSearch(), IMAGES[:1])
    with pytest.raises(ValueError, match="fitted to 100 candidates, found 30"):
        propose(FITTED, some_images(1), net=Toy(30))
    with pytest.raises(ValueError, match="1 images to fit to"):
        CovarianceSearch().fit(NET, [(IMAGES[:1], None)])
    with pytest.raises(ValueError, match="fitted to 32 values of x0, found 16"):
        propose(FITTED, IMAGES[:1, :, :2])
    for name, value in {"anchors": 0, "timestep": 1, "temper": 0, "nugget": float("nan")}.items():
        with pytest.raises(ValueError, match=f"covariance search: {name} {value}"):
            CovarianceSearch(**{name: value})
    with pytest.raises(ValueError, match="miss 1"):
        CovarianceSearch(miss=1)
