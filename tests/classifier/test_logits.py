import weakref

import pytest
import torch
from torch import nn

from lightning_diffclf import (
    Candidates,
    ClassConditionalDiT,
    DiffusionClassifier,
    DiffusionLogits,
    Draws,
    NoiseSchedule,
)
from lightning_diffclf import ZeroShotStableDiffusion as ZeroShot
from lightning_diffclf.classifier.logits import SHARED_ID, _noise
from lightning_diffclf.errors import UserError
from tests.classifier.toys import SHAPE, Toy, some_images

DIT = {"input_size": 4, "in_channels": 1, "num_classes": 5, "hidden_size": 16, "depth": 2, "num_heads": 2}


def dit() -> ClassConditionalDiT:
    torch.manual_seed(0)
    module = ClassConditionalDiT(**DIT, latents=False, learn_sigma=False, schedule="rectified_flow")
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.3)  # the last layer begins at zero
    return module.requires_grad_(False)


def engine_scores(classifier: DiffusionClassifier, images: torch.Tensor) -> torch.Tensor:
    """Each image by itself, under the id whose noise logits use."""
    return torch.stack([classifier(one[None], ids=[SHARED_ID])[0].scores_K for one in images])


@pytest.mark.parametrize("loss", ["l2", "l1+huber"])
def test_logits_are_the_engines_scores(loss):
    images = some_images(3)
    for denoiser in (Toy(), Toy(schedule=NoiseSchedule.rectified_flow())):
        weights = torch.linspace(1, 3, 9).tolist()
        classifier = DiffusionClassifier(denoiser, draws=9, loss=loss, weights=weights, reduction="mean", microbatch=4)
        torch.testing.assert_close(
            -classifier.logits(images).double(), engine_scores(classifier, images), atol=1e-6, rtol=0
        )


def test_the_softmax_of_logits_is_the_posterior():
    classifier = DiffusionClassifier(Toy(), draws=7, temperature=2.5)
    images = some_images(2)
    expected = torch.stack([classifier(one[None], ids=[SHARED_ID])[0].probabilities_K for one in images])
    torch.testing.assert_close(classifier.logits(images).softmax(1).double(), expected, atol=1e-6, rtol=0)


def test_logits_of_an_image_depend_on_it_alone():
    images, classifier = some_images(5), DiffusionClassifier(Toy(), draws=6, microbatch=8)
    together = classifier.logits(images)
    for i in (4, 1):
        torch.testing.assert_close(classifier.logits(images[i : i + 1]), together[i : i + 1])
    assert torch.equal(classifier.logits(images), together)  # the same each time
    other = DiffusionClassifier(Toy(), draws=6, seed=1).logits(images)
    assert float((other - together).detach().abs().min()) > 1e-4
    fixed = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    given = DiffusionClassifier(Toy(), Draws(6, noise=fixed), reduction="mean")
    torch.testing.assert_close(
        -given.logits(images).double(), torch.stack([r.scores_K for r in given(images)]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("ensemble", ["best", "mean"])
def test_candidates_of_a_class_have_one_logit(ensemble):
    denoiser = Toy(4)
    alone = DiffusionClassifier(denoiser, draws=5, reduction="mean").logits(some_images(3))
    denoiser.candidates = Candidates(list("abcd"), [1, 0, 1, 2], list("xyz"))
    several = DiffusionClassifier(denoiser, draws=5, ensemble=ensemble, reduction="mean").logits(some_images(3))
    of_two = alone[:, [0, 2]]
    expected = of_two.mean(1) if ensemble == "mean" else of_two.amax(1)
    torch.testing.assert_close(several, torch.stack([alone[:, 1], expected, alone[:, 3]], 1))
    chosen = DiffusionClassifier(denoiser, draws=5, candidates=[3, 1], reduction="mean").logits(some_images(3))
    torch.testing.assert_close(chosen, alone[:, [1, 3]])


@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_gradients_are_those_of_finite_differences(loss):
    classifier = DiffusionClassifier(Toy(3).double(), draws=3, loss=loss, microbatch=2)
    images = some_images(2).double().requires_grad_()
    assert classifier.logits(images).dtype == torch.float64
    assert torch.autograd.gradcheck(classifier.logits, (images,))


def test_gradients_are_those_of_a_plain_loop():
    """Of a network that is left in training mode, whose dropout must not come back in the backward pass."""
    module = dit()
    classifier = DiffusionClassifier(module, draws=4, reduction="mean", microbatch=3)
    module.train()
    images = (torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1).requires_grad_()
    (found,) = torch.autograd.grad(classifier.logits(images)[:, 2].sum(), images)
    assert module.training
    module.eval()
    total = 0.0
    for draw, t in enumerate(classifier.timesteps_S):
        noise = _noise(classifier, images, draw)
        x_t = (1 - t) * images + t * noise
        velocity = module.net(x_t, module.schedule.network_time(t.expand(2)), torch.tensor([2, 2]))
        total = total - ((x_t + (1 - t) * velocity - noise) ** 2).mean((1, 2, 3)).sum() / 4
    (expected,) = torch.autograd.grad(total, images)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_weights_have_gradients_too():
    denoiser = Toy(3)
    logits = DiffusionClassifier(denoiser, draws=3).logits(some_images(2))
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert float(denoiser.table.grad.abs().min()) > 0


def test_gradients_pass_through_an_autoencoder():
    torch.manual_seed(0)
    zero_shot = ZeroShot("assets/sd_digits", "a photo of a {}", ["one", "two"], dtype="float32")
    classifier = DiffusionClassifier(zero_shot, draws=2, reduction="mean")
    images = (torch.rand(1, 3, *zero_shot.native_size) * 1.6 - 0.8).requires_grad_()
    logits = classifier.logits(images)
    (gradient,) = torch.autograd.grad(logits[0, 0], images)
    torch.testing.assert_close(-logits.detach().double(), engine_scores(classifier, images.detach()), atol=1e-6, rtol=0)
    zero_shot = ZeroShot("assets/sd_digits", "a photo of a {}", ["one", "two"], dtype="float32")
    for part in zero_shot.denoiser.modules():
        part.double()
    asked, exactly = images.detach().double().requires_grad_(), DiffusionClassifier(zero_shot, classifier.recipe).logits
    assert torch.autograd.gradcheck(exactly, (asked,), fast_mode=True)
    (exact,) = torch.autograd.grad(exactly(asked)[0, 0], asked)
    torch.testing.assert_close(gradient, exact.float(), atol=1e-6, rtol=1e-3)


class Counted(Toy):
    """Knows how many of its activations are alive at most."""

    def __init__(self) -> None:
        super().__init__(3)
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def predict(self, x_t, t, candidate):
        hidden = torch.tanh(x_t.flatten(1) @ self.weight + self.table[candidate] * (t / 1000)[:, None])
        for one in (x_t, hidden):
            self.alive.add(one)
        self.most = max(self.most, len(self.alive))
        return hidden.view_as(x_t)


def nodes(start: torch.Tensor) -> int:
    """Operations that autograd remembers."""
    left, seen = [start.grad_fn], set()
    while left:
        one = left.pop()
        if one is not None and one not in seen:
            seen.add(one)
            left += [before for before, _ in one.next_functions]
    return len(seen)


def test_memory_does_not_grow_with_the_draws():
    """Neither activations, nor the graph."""
    most, graphs = [], []
    for draws in (2, 10, 40):
        denoiser = Counted()
        images = some_images(2).requires_grad_()
        logits = DiffusionClassifier(denoiser, draws=draws, microbatch=4).logits(images)
        graphs.append(nodes(logits))
        logits.sum().backward()
        assert images.grad is not None
        most.append(denoiser.most)
    assert most[0] == most[1] == most[2] <= 4
    assert graphs[0] == graphs[1] == graphs[2]


class Detached(Toy):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.requires_grad_(False)

    def encode(self, images):
        return images.detach() if self.where == "encode" else images

    def predict(self, x_t, t, candidate):
        return super().predict(x_t.detach(), t, candidate)


def test_no_gradient_path_is_said():
    images = some_images(1).requires_grad_()
    with pytest.raises(UserError, match=r"logits: no gradient path from the images through denoiser.encode"):
        DiffusionClassifier(Detached("encode"), draws=2).logits(images)
    with torch.no_grad():
        DiffusionClassifier(Detached("encode"), draws=2).logits(images)  # nobody asked for one
    logits = DiffusionClassifier(Detached("predict"), draws=2).logits(images)
    with pytest.raises(UserError, match=r"logits: no gradient path from the images through denoiser.predict"):
        logits.sum().backward()


def test_a_plain_network_of_images_from_0_to_1():
    module = dit()
    classifier = DiffusionClassifier(module, draws=3)
    network = DiffusionLogits(classifier)
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    assert torch.equal(network(images), classifier.logits(images * 2 - 1))
    assert {id(one) for one in network.parameters()} == {id(one) for one in module.parameters()}
    for wrong in (images * 2 - 1, images * 255):
        with pytest.raises(UserError, match=r"images: values in .*, expected \[0, 1\]"):
            network(wrong)
