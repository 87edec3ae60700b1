"""Proposals: what names the candidates of an image."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, LinearProbe, NoiseSchedule, PairedTest
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


def proposed(probe: LinearProbe, denoiser: nn.Module, images: torch.Tensor) -> list[list[int]]:
    classifier = DiffusionClassifier(denoiser, Draws(4), proposal=probe)
    every = [np.arange(len(denoiser.candidates))] * len(images)
    return [one.tolist() for one in probe.propose(classifier, images, range(len(images)), every).candidates]


def test_only_proposed_candidates_are_tried():
    images = some_images(3)
    lists = [[4, 1], [2], [0, 3, 2]]
    classifier = DiffusionClassifier(Toy(), Draws(6), proposal=lambda batch: lists[: len(batch)])
    expected = DiffusionClassifier(Toy(), Draws(6))(images, candidates=lists)
    for a, b in zip(classifier(images), expected, strict=True):
        assert a.candidates_K.tolist() == b.candidates_K.tolist()
        assert torch.equal(a.scores_K, b.scores_K)
        assert (a.label, a.nfe) == (b.label, b.nfe)
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
    probe = LinearProbe("hidden", timestep=50, top=2).fit(denoiser, [(images[:200], labels[:200])])
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
    before = proposed(LinearProbe("hidden", timestep=50, top=1).fit(denoiser, [(images, labels)]), denoiser, images)
    with torch.no_grad():
        denoiser.hidden.weight.mul_(1000)
        denoiser.hidden.bias.mul_(1000).add_(3e4)
    after = LinearProbe("hidden", timestep=50, top=1).fit(denoiser, [(images, labels)])
    assert proposed(after, denoiser, images) == before


def test_recall_and_top():
    denoiser = WithLayer()
    images, labels = labelled(400)
    fit = [(images[:300].split(100)[i], labels[:300].split(100)[i]) for i in range(3)]
    held, truth = images[300:], labels[300:].tolist()
    recalls = []
    for top in (1, 2, 6, 99):
        probe = LinearProbe("hidden", timestep=50, top=top).fit(denoiser, fit)
        found = proposed(probe, denoiser, held)
        assert {len(one) for one in found} == {min(top, 6)}
        recalls.append(probe.recall(denoiser, held, truth))
        assert recalls[-1] == np.mean([label in one for label, one in zip(truth, found, strict=True)])
    assert 0.5 < recalls[0] < recalls[1] < recalls[2] == recalls[3] == 1


def test_all_candidates_of_a_proposed_class():
    denoiser = WithLayer()
    denoiser.candidates = Candidates(list("abcdef"), [0, 0, 1, 2, 2, 2])
    images, _ = labelled(50)
    labels = torch.arange(50) % 3
    probe = LinearProbe("hidden", timestep=50, top=1).fit(denoiser, [(images, labels)])
    assert {tuple(one) for one in proposed(probe, denoiser, images)} <= {(0, 1), (2,), (3, 4, 5)}


def test_a_fitted_map_can_be_saved_and_proposals_do_not_depend_on_the_batch():
    denoiser = WithLayer()
    images, labels = labelled(60)
    probe = LinearProbe("hidden", timestep=50, top=3).fit(denoiser, [(images, labels)])
    other = LinearProbe("hidden", timestep=50, top=3)
    assert (other.state_dict(), other.fitted) == ({}, False)
    other.load_state_dict(probe.state_dict())
    assert other.fitted
    together = proposed(probe, denoiser, images)
    assert proposed(other, denoiser, images) == together
    assert [proposed(probe, denoiser, one)[0] for one in images.split(1)] == together


def test_only_classes_in_play_are_proposed_and_few_cost_nothing():
    denoiser = WithLayer()
    images, labels = labelled(80)
    probe = LinearProbe("hidden", timestep=50, top=2).fit(denoiser, [(images, labels)])
    classifier = DiffusionClassifier(denoiser, Draws(4), proposal=probe)
    seen = len(denoiser.calls)
    lists = [np.arange(6), np.array([5, 3, 1]), np.array([4, 0])]
    found = probe.propose(classifier, images[:3], range(3), lists)
    whole = LinearProbe("hidden", timestep=50, top=6)
    whole.load_state_dict(probe.state_dict())
    scores = whole._scores(denoiser, images[:3])
    for one, kept, row in zip(lists[:2], found.candidates, scores, strict=False):
        assert kept.tolist() == sorted(sorted(one.tolist(), key=lambda k: -float(row[k]))[:2])
    assert found.candidates[2].tolist() == [4, 0]
    assert found.nfe == [1, 1, 0]
    results = classifier(images[:3], candidates=lists)
    assert [r.candidates_K.tolist() for r in results] == [one.tolist() for one in found.candidates]
    assert [(r.nfe, r.search_nfe) for r in results] == [(9, 1), (9, 1), (8, 0)]
    denoiser.calls.clear()
    probe.propose(classifier, images[:1], [0], [np.array([1, 2])])
    assert seen > 0
    assert denoiser.calls == []


class Blocks(Toy):
    """Layers as large networks have them: lists of blocks, with tokens."""

    def __init__(self, tokens: int = 4, channels: int = 5) -> None:
        super().__init__(6)
        torch.manual_seed(0)
        self.few = nn.ModuleList([nn.Identity()])
        self.blocks = nn.ModuleList([nn.Linear(channels, channels) for _ in range(4)])
        self.shape = tokens, channels
        self.outputs: list[torch.Tensor] = []

    def predict(self, x_t, t, candidate):
        self.seen = t
        hidden = x_t.flatten(1).mean(1)[:, None, None].expand(-1, *self.shape)
        self.outputs = [hidden := block(hidden) for block in self.blocks]
        return super().predict(x_t, t, candidate)


def test_by_default_the_middle_block_at_a_fifth_of_the_time_axis():
    for schedule, t in ((NoiseSchedule.linear(), 200), (NoiseSchedule.rectified_flow(), 0.2)):
        denoiser = Blocks()
        denoiser.schedule = schedule
        features = LinearProbe().features(denoiser, some_images(3))
        assert torch.equal(features, denoiser.outputs[2].flatten(1))
        used = DiffusionClassifier(denoiser, Draws(2)).denoiser.schedule.network_time(torch.tensor([t]))
        torch.testing.assert_close(denoiser.seen.float(), used.float().expand(3), rtol=1e-2, atol=0)


def test_large_outputs_are_averaged_over_positions():
    denoiser = Blocks(tokens=2000)
    torch.testing.assert_close(LinearProbe().features(denoiser, some_images(2)), denoiser.outputs[2].mean(1))
    with pytest.raises(ValueError, match=r"layer: it has more than 8,192 features"):
        LinearProbe().features(Blocks(tokens=2, channels=8200), some_images(1))


def test_bad_probes():
    with pytest.raises(ValueError, match=r"no layer 'blocks\.9' in WithLayer"):
        DiffusionClassifier(WithLayer(), Draws(2), proposal=LinearProbe("blocks.9"))
    with pytest.raises(ValueError, match=r"WithLayer has no list of blocks, expected the name of a layer"):
        DiffusionClassifier(WithLayer(), Draws(2), proposal=LinearProbe())
    for settings, message in (
        ({"top": 0}, "top 0, expected at least 1"),
        ({"images": 0}, "images 0, expected at least 1"),
        ({"ridge": 0.0}, "ridge 0.0, expected a number above 0"),
        ({"ridge": float("nan")}, "ridge nan"),
        ({"timestep": float("inf")}, "timestep inf"),
    ):
        with pytest.raises(ValueError, match=f"probe: {message}"):
            LinearProbe(**settings)
    unfitted = DiffusionClassifier(WithLayer(), Draws(2), proposal=LinearProbe("hidden", top=1))
    with pytest.raises(ValueError, match="not fitted"):
        unfitted(some_images(1))
    with pytest.raises(ValueError, match="no batches"):
        LinearProbe("hidden").fit(WithLayer(), [])
    with pytest.raises(ValueError, match=r"labels 0 … 6 to fit to, expected classes in 0 … 5"):
        LinearProbe("hidden").fit(WithLayer(), [(some_images(7), torch.arange(7))])
    with pytest.raises(ValueError, match="features of the images to fit to are NaN or infinite"):
        LinearProbe("hidden").fit(WithLayer(), [(some_images(2) * torch.nan, torch.arange(2))])
    fitted = LinearProbe("hidden", top=1).fit(WithLayer(), [labelled(40)])
    other = WithLayer()
    other.hidden = nn.Linear(int(np.prod(SHAPE)), 21)
    with pytest.raises(ValueError, match=r"fitted to 20 features and 6 classes, found 21 and 6"):
        DiffusionClassifier(other, Draws(2), proposal=fitted)(some_images(1))

    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    other.hidden = nn.Sequential(Pair())
    other.predict = lambda x_t, t, candidate: other.hidden(x_t)[0]
    with pytest.raises(ValueError, match=r"layer: 'hidden' gives tuple for 2 images, expected a row for each"):
        LinearProbe("hidden").features(other, some_images(2))
    other.predict = lambda x_t, t, candidate: x_t
    with pytest.raises(ValueError, match=r"layer: 'hidden' gives nothing for 2 images"):
        LinearProbe("hidden").features(other, some_images(2))
