"""CovarianceSearch: predictions, against normal distributions written out; what it finds, costs and refuses."""

import numpy as np
import pytest
import torch

from lightning_diffclf import DiffusionClassifier, Draws
from lightning_diffclf.classifier import CovarianceSearch
from tests.classifier.toys import SHAPE, Toy, some_images


class Pairs(Toy):
    """100 candidates, whose halves of what is predicted are one of 10 each, as pairs of digits are."""

    def __init__(self) -> None:
        super().__init__(100)
        generator = torch.Generator().manual_seed(1)
        left, right = torch.randn(2, 10, int(np.prod(SHAPE)), generator=generator)
        half = torch.arange(left.shape[1]) < left.shape[1] // 2
        self.table = torch.nn.Parameter(torch.cat([torch.where(half, one, right) for one in left]) * 2)
        self.broken: int | None = None

    def predict(self, x_t, t, candidate):
        output = super().predict(x_t, t, candidate)
        return (
            output
            if self.broken is None
            else torch.where((candidate == self.broken)[:, None, None, None], torch.nan, output)
        )


NET, IMAGES = Pairs(), torch.rand(80, *SHAPE, generator=torch.Generator().manual_seed(2)) * 2 - 1
SETTINGS = {
    "anchors": 12,
    "rounds": 2,
    "each": 4,
    "temper": 1.0,
    "miss": 0.1,
}  # the draw that it sees is what counts here
FITTED = CovarianceSearch(**SETTINGS).fit(NET, IMAGES[:60])


def propose(search, images, ids=None, candidates=None, net=NET):
    classifier = DiffusionClassifier(net, Draws(8, seed=5), proposal=search)
    every = [np.arange(len(net.candidates))] * len(images)
    return search.propose(classifier, images, range(len(images)) if ids is None else ids, candidates or every)


def lists(found):
    return [one.tolist() for one in found.candidates]


def test_what_is_predicted_is_the_conditional_mean_of_a_normal_distribution():
    rng = np.random.default_rng(0)
    search, mean, factor = CovarianceSearch(nugget=0.1), rng.normal(size=7), rng.normal(size=(5, 7))
    search.load_state_dict({"mean": torch.tensor(mean), "factor": torch.tensor(factor)})
    covariance = factor.T @ factor
    noisy = covariance + 0.1 * covariance.diagonal().mean() * np.eye(7)
    known, values = np.array([1, 4, 6]), rng.normal(size=3)
    expected = mean + covariance[:, known] @ np.linalg.inv(noisy[np.ix_(known, known)]) @ (values - mean[known])
    expected[known] = values
    np.testing.assert_allclose(search.predicted(known, values), expected, rtol=1e-5)


def test_it_finds_the_best_of_all_candidates_and_counts_its_calls():
    images, calls = IMAGES[60:], len(NET.calls)
    found = propose(FITTED, images)
    assert found.nfe == [20] * 20
    assert sum(len(candidate) for *_, candidate in NET.calls[calls:]) == 400
    named = [f"covariance: {b}" for b in range(len(images))]  # all candidates, at the draw that the search sees
    decided = [result.candidate for result in DiffusionClassifier(NET, Draws(1, seed=5))(images, named)]
    kept = [one in some for one, some in zip(decided, lists(found), strict=True)]
    assert np.mean(kept) >= 0.9
    assert np.mean([len(some) for some in lists(found)]) < 50


def test_proposals_depend_on_image_and_id_only_and_are_saved():
    images = IMAGES[60:66]
    found, other = lists(propose(FITTED, images)), CovarianceSearch(**SETTINGS)
    assert lists(propose(FITTED, images[3:], [3, 4, 5])) == found[3:]
    other.load_state_dict(FITTED.state_dict())
    assert lists(propose(other, images)) == found
    assert other.identity() == FITTED.identity() != CovarianceSearch(**SETTINGS).identity()


def test_only_candidates_in_play_are_called_and_few_are_not_searched():
    some = np.arange(0, 100, 3)
    calls = len(NET.calls)
    found = propose(FITTED, IMAGES[60:61], candidates=[some])
    assert {int(k) for *_, candidate in NET.calls[calls:] for k in candidate} <= set(some.tolist())
    assert set(lists(found)[0]) <= set(some.tolist())
    few = propose(FITTED, IMAGES[60:61], candidates=[np.arange(20)])
    assert (lists(few), few.nfe) == ([list(range(20))], [0])


@pytest.mark.filterwarnings("ignore:image:RuntimeWarning")
def test_a_broken_error_drops_the_draw_and_all_stay():
    net = Pairs()
    net.broken = int(FITTED._anchors_A[0])
    found = propose(FITTED, IMAGES[60:61], net=net)
    assert (lists(found), found.dropped, found.nfe) == ([list(range(100))], [1], [12])
    with pytest.raises(ValueError, match="NaN or infinite"):
        CovarianceSearch().fit(net, IMAGES[:2])


def test_what_is_refused():
    with pytest.raises(ValueError, match="not fitted"):
        propose(CovarianceSearch(), IMAGES[:1])
    with pytest.raises(ValueError, match="fitted to 100 candidates, found 30"):
        propose(FITTED, some_images(1), net=Toy(30))
    with pytest.raises(ValueError, match="1 images to fit to"):
        CovarianceSearch().fit(NET, IMAGES[:1])
    for name, value in {"anchors": 0, "rounds": -1, "each": 0, "temper": 0, "nugget": float("nan"), "miss": 1}.items():
        with pytest.raises(ValueError, match=f"covariance search: {name} {value}"):
            CovarianceSearch(**{name: value})
