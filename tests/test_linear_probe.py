"""Proposals: what names the candidates of an image."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, NoiseSchedule, PairedTest
from lightning_diffclf.linear_probe import LinearProbe
from tests.classifier.toys import SHAPE, Toy, some_images


class WithLayer(Toy):
    """A denoiser whose hidden layer separates classes."""

    def __init__(self, num_candidates: int = 6) -> None:
        super().__init__(num_candidates)
        torch.manual_seed(0)
        self.hidden = nn.Linear(int(np.prod(SHAPE)), 20)

    def predict(self, x_t, t, candidate):
        self.seen = x_t, t, candidate
        self.hidden(x_t.flatten(1)).relu()
        return super().predict(x_t, t, candidate)


def labelled(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(6, (count,), generator=generator)
    return means[labels] + 2.5 * torch.randn(count, *SHAPE, generator=generator), labels


def test_only_proposed_candidates_are_tried():
    images = some_images(3)
    lists = [[4, 1], [2], [0, 3, 2]]
    classifier = DiffusionClassifier(Toy(), Draws(6), proposal=lambda batch: lists[: len(batch)])
    expected = DiffusionClassifier(Toy(), Draws(6))(images, candidates=lists)
    for a, b in zip(classifier(images), expected, strict=True):
        assert a.candidates_K.tolist() == b.candidates_K.tolist()
        assert torch.equal(a.scores_K, b.scores_K)
        assert (a.prediction, a.nfe) == (b.prediction, b.nfe)
    for result in classifier(images, candidates=[1, 2]):  # what a call names comes first
        assert result.candidates_K.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("proposed", "message"),
    [
        ([[0, 5]], r"proposal: \[0, 5\].*0 … 4"),
        ([[-1]], r"proposal: .*0 … 4"),
        ([[]], "proposal"),
        ([[1, 1]], "proposal"),
        ([[0], [1]], "proposal"),
    ],
)
def test_unknown_candidates_are_refused_before_any_call(proposed, message):
    denoiser = Toy()
    with pytest.raises(ValueError, match=message):
        DiffusionClassifier(denoiser, Draws(6), proposal=lambda batch: proposed)(some_images(1))
    assert denoiser.calls == []


def test_calls_of_the_proposal_count():
    class Costly:
        nfe = 4

        def __call__(self, images):
            return torch.tensor([[0, 1]]).expand(len(images), 2)

    results = list(DiffusionClassifier(Toy(), Draws(5), proposal=Costly())(some_images(2)))
    assert [r.nfe for r in results] == [14, 14]
    limited = DiffusionClassifier(Toy(), Draws(5), proposal=Costly(), budget=9, elimination=PairedTest())
    assert all(r.nfe <= 9 for r in limited(some_images(2)))
    with pytest.raises(ValueError, match=r"budget: 5 .* expected at least 6: one for each, and those of the proposal"):
        DiffusionClassifier(Toy(), Draws(5), proposal=Costly(), budget=5)(some_images(1))


def test_the_probe_is_ridge_regression_on_the_layers_output():
    denoiser = WithLayer()
    images, labels = labelled(300)
    probe = LinearProbe(denoiser, "hidden", timestep=50, top=2).fit([(images[:200], labels[:200])])
    x_t, t, candidate = denoiser.seen
    schedule = NoiseSchedule.linear()
    torch.testing.assert_close(x_t, schedule.alpha(torch.tensor([50])).view(1, 1, 1, 1) * images[:200])  # no noise
    assert set(t.tolist()) == {50}
    assert set(candidate.tolist()) == {0}
    features = denoiser.hidden(x_t.flatten(1)).detach().double().numpy()
    one_hot = np.eye(6)[labels[:200]]
    # scikit-learn's penalty is on a sum over images, ours on their mean, in units of the features' mean variance.
    expected = Ridge(alpha=200 * 1e-2 * features.var(0).mean()).fit(features, one_hot)
    weight = np.concatenate([expected.coef_.T, expected.intercept_[None]])
    np.testing.assert_allclose(probe.state_dict()["weight"].numpy(), weight, rtol=1e-3, atol=1e-5)


def test_the_probe_does_not_depend_on_the_unit_of_features():
    denoiser, (images, labels) = WithLayer(), labelled(200)
    before = LinearProbe(denoiser, "hidden", timestep=50, top=1).fit([(images, labels)])(images)
    with torch.no_grad():
        denoiser.hidden.weight.mul_(1000)
        denoiser.hidden.bias.mul_(1000).add_(3e4)
    assert LinearProbe(denoiser, "hidden", timestep=50, top=1).fit([(images, labels)])(images) == before


def test_recall_and_top():
    denoiser = WithLayer()
    images, labels = labelled(400)
    fit = [(images[:300].split(100)[i], labels[:300].split(100)[i]) for i in range(3)]
    held, truth = images[300:], labels[300:].tolist()
    recalls = []
    for top in (1, 2, 6, 99):
        probe = LinearProbe(denoiser, "hidden", timestep=50, top=top).fit(fit)
        proposed = probe(held)
        assert {len(one) for one in proposed} == {min(top, 6)}
        recalls.append(probe.recall(held, truth))
        assert recalls[-1] == np.mean([label in one for label, one in zip(truth, proposed, strict=True)])
    assert 0.5 < recalls[0] < recalls[1] < recalls[2] == recalls[3] == 1


def test_all_candidates_of_a_proposed_class():
    denoiser = WithLayer()
    denoiser.candidates = Candidates(list("abcdef"), [0, 0, 1, 2, 2, 2])
    images, _ = labelled(50)
    labels = torch.arange(50) % 3
    probe = LinearProbe(denoiser, "hidden", timestep=50, top=1).fit([(images, labels)])
    assert {tuple(one) for one in probe(images)} <= {(0, 1), (2,), (3, 4, 5)}


def test_a_fitted_map_can_be_saved_and_proposals_do_not_depend_on_the_batch():
    denoiser = WithLayer()
    images, labels = labelled(60)
    probe = LinearProbe(denoiser, "hidden", timestep=50, top=3).fit([(images, labels)])
    other = LinearProbe(denoiser, "hidden", timestep=50, top=3)
    assert other.state_dict() == {}
    other.load_state_dict(probe.state_dict())
    assert other(images) == probe(images) == [probe(one)[0] for one in images.split(1)]


def test_bad_probes():
    with pytest.raises(ValueError, match=r"no layer 'blocks\.9' in WithLayer"):
        LinearProbe(WithLayer(), "blocks.9", timestep=50)
    with pytest.raises(ValueError, match="top 0, expected at least 1"):
        LinearProbe(WithLayer(), "hidden", timestep=50, top=0)
    with pytest.raises(RuntimeError, match="not fitted"):
        LinearProbe(WithLayer(), "hidden", timestep=50)(some_images(1))
    with pytest.raises(ValueError, match="no batches"):
        LinearProbe(WithLayer(), "hidden", timestep=50).fit([])
