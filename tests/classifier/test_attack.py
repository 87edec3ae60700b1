from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, DiffusionLogits
from lightning_diffclf.classifier.attack import APGD, auto_attack, margin_loss
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.errors import UserError
from tests.classifier.toys import SHAPE, Toy


class Linear(nn.Module):
    """Two classes, whose worst case is known in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))

    def forward(self, images):
        return images.flatten(1) @ self.weight


def grey(count: int) -> torch.Tensor:
    """Images far enough from 0 and 1 that a small ball fits."""
    return 0.3 + 0.4 * torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "eps", "dual"), [("linf", 0.05, 1), ("l2", 0.2, 2)])
def test_the_worst_case_of_a_linear_network_is_found(norm, eps, dual):
    network, images = Linear(), grey(6)
    label = network(images).argmax(1)
    found = APGD(eps, norm, steps=30)(network, images, label)
    sign = 1 - 2 * label.double()
    difference = (network.weight[:, 1] - network.weight[:, 0]).double()
    expected = (network(images)[:, 1] - network(images)[:, 0]).double() * sign + eps * difference.norm(dual)
    torch.testing.assert_close(found.losses[-1].double(), expected, atol=2e-3, rtol=0)
    assert torch.equal(found.right, expected < 0)
    order = float("inf") if norm == "linf" else 2
    assert float((found.images - images).flatten(1).norm(order, dim=1).max()) <= eps + 1e-6
    torch.testing.assert_close(margin_loss(network(found.images), label), found.losses[-1])


@pytest.fixture(scope="module")
def white_box():
    """An attack on a diffusion classifier, of images that it answers rightly."""
    network = DiffusionLogits(DiffusionClassifier(Toy(4).requires_grad_(False), draws=5))
    images = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(2))
    label = network(images).argmax(1)
    attack = APGD(0.1, steps=25)
    return network, images, label, attack(network, images, label)


def test_no_gradient_is_masked(white_box):
    """The loss climbs along the attack, and random search in the same ball finds nothing that gradients do not."""
    network, images, label, found = white_box
    start, end = found.losses[0], found.losses[-1]
    assert torch.equal(start, margin_loss(network(images), label))
    assert bool((end > start).all())
    assert bool((found.losses.diff(dim=0) >= 0).all())
    halfway = found.losses[5]
    assert float((end - halfway).mean()) < float((halfway - start).mean())  # it levels off: steps are enough
    generator = torch.Generator().manual_seed(3)
    black_box = start.clone()
    for _ in range(60):
        change = 0.1 * torch.randint(0, 2, images.shape, generator=generator).mul(2).sub(1)
        black_box = torch.maximum(black_box, margin_loss(network((images + change).clamp(0, 1)), label))
    assert bool((black_box <= end).all())


def test_a_black_box_is_not_stronger_on_a_trained_network():
    """Square Attack (Andriushchenko et al. 2020), which sees logits only, fools no digit that APGD does not."""
    square = pytest.importorskip("pyautoattack.square")
    root = Path(__file__).parents[2]
    config = yaml.safe_load((root / "configs" / "dit_digits.yaml").read_text())["model"]["init_args"]
    module = ClassConditionalDiT(**config)
    module.load_state_dict(load_file(root / "benchmarks" / "data" / "digits.safetensors"))
    network = DiffusionLogits(DiffusionClassifier(module.eval().requires_grad_(False), draws=2))
    data = DigitsDataModule()
    data.setup()
    images, label = data.test.parts["image"][:8] / 2 + 0.5, data.test.parts["label"][:8]
    right = network(images).argmax(1) == label
    images, label = images[right], label[right]
    found = APGD(0.07, steps=15)(network, images, label)
    assert 0 < int(found.right.sum()) < len(label)  # there is something to compare
    assert bool((found.losses[-1] > found.losses[0]).all())
    with torch.random.fork_rng():
        attack = square.SquareAttack(network, "Linf", n_queries=100, eps=0.07, resc_schedule=True, device="cpu")
        black_box = attack.perturb(images, label)
    with torch.no_grad():
        lead = margin_loss(network(black_box), label)
    assert not bool(((lead >= 0) & found.right).any())
    assert float((found.losses[-1] - lead).min()) > 0


def test_what_is_found_for_an_image_depends_on_it_alone(white_box):
    """Random starts go by the id of the image, not by its place."""
    network, images, label, _ = white_box
    attack, ids = APGD(0.005, steps=4, restarts=3), list("abcdefgh")
    together = attack(network, images, label, ids)
    assert bool(together.right.any())  # restarts are for these
    order = [5, 0, 3]
    some = attack(network, images[order], label[order], [ids[i] for i in order])
    torch.testing.assert_close(some.losses, together.losses[:, order], atol=1e-5, rtol=1e-5)
    other = attack(network, images[order], label[order], ["x", "y", "z"])
    assert not torch.equal(other.losses[0], some.losses[0])  # of the starts


def test_a_random_network_is_attacked_through_the_mean_of_its_calls():
    """A gradient of one call leads astray, the mean of many does not."""
    generator = torch.Generator().manual_seed(5)
    network, images = Linear(), grey(6)
    label = network(images).argmax(1)

    def noisy(x):
        return network(x) + (x.flatten(1) @ (6 * torch.randn(12, 2, generator=generator)))

    reached = [
        float(margin_loss(network(APGD(0.05, steps=8, eot=eot)(noisy, images, label).images), label).mean())
        for eot in (1, 40)
    ]
    best = float(APGD(0.05, steps=8)(network, images, label).losses[-1].mean())
    assert reached[0] < reached[1] <= best + 1e-6


def test_a_larger_ball_is_not_safer(white_box):
    network, images, label, found = white_box
    smaller = APGD(0.02, steps=15)(network, images, label)
    assert bool((smaller.losses[-1] < found.losses[-1]).all())
    again = APGD(0.02, steps=15)(network, images, label)
    assert torch.equal(again.images, smaller.images)
    several = APGD(0.02, steps=15, restarts=3)(network, images, label)
    assert bool((several.losses[-1] >= smaller.losses[-1]).all())
    torch.testing.assert_close(margin_loss(network(several.images), label), several.losses[-1])


def test_what_cannot_be_attacked_is_said():
    network, images, label = Linear(), grey(2), torch.tensor([0, 1])
    for eps in (8, 0, -0.1, float("nan")):
        with pytest.raises(UserError, match=r"eps: .*in units of images in \[0, 1\]; 8 / 255 is 8 grey levels"):
            APGD(eps)
    with pytest.raises(UserError, match="norm: 'l1', expected 'linf' or 'l2'"):
        APGD(0.1, "l1")
    with pytest.raises(UserError, match=r"images: values in .*, expected \[0, 1\], the unit of eps"):
        APGD(0.1)(network, images * 2 - 1, label)
    for attack in (APGD(100, "l2"), lambda *given: auto_attack(*given, eps=100, norm="l2")):
        with pytest.raises(UserError, match=r"eps: 100, but no two images of \d+ values in \[0, 1\] are further apart"):
            attack(network, images, label)
    with pytest.raises(UserError, match="no gradient path to the images"):
        APGD(0.1)(lambda x: network(x.detach()), images, label)
    for wrong in (2, -1):
        with pytest.raises(UserError, match=rf"labels: {wrong}, expected columns of the logits, 0 … 1"):
            APGD(0.1)(network, images, torch.tensor([0, wrong]))
    for name in ("steps", "restarts", "eot"):
        with pytest.raises(UserError, match=f"{name}: 0, expected at least 1"):
            APGD(0.1, **{name: 0})


def test_auto_attack_takes_the_network():
    pytest.importorskip("pyautoattack")
    network, images = Linear(), grey(6)
    label = network(images).argmax(1)
    logits, weight = network(images), network.weight
    limits = (logits[:, 1] - logits[:, 0]).abs() / (weight[:, 1] - weight[:, 0]).norm(1)  # in closed form
    eps = float(limits.sort().values[2:4].mean())
    changed = auto_attack(network, images, label, eps=eps, version="custom", attacks=["apgd-ce"], seed=0)
    assert torch.equal(network(changed).argmax(1) == label, limits > eps)
    assert torch.equal(APGD(eps)(network, images, label).right, limits > eps)
    assert float((changed - images).abs().max()) <= eps + 1e-6
    before = torch.get_rng_state()
    auto_attack(network, images, label, eps=eps, version="custom", attacks=["apgd-ce"], seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match="eps: 8, expected a positive radius"):
        auto_attack(network, images, label, eps=8)
    with pytest.raises(UserError, match="2 classes, expected at least 4"):
        auto_attack(network, images, label, eps=eps)
    with pytest.raises(UserError, match="labels: 2, expected columns of the logits"):
        auto_attack(network, images, torch.tensor([0, 0, 0, 0, 0, 2]), eps=eps)
    with pytest.raises(UserError, match="no gradient path to the images"):
        auto_attack(lambda x: network(x.detach()), images, label, eps=eps)
