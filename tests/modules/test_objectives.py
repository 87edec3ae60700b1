"""Losses beside denoising: closed forms, signs of gradients, and a network whose errors are known."""

import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws, NoiseSchedule, Posterior
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.modules.objectives import (
    Objectives,
    classification_loss,
    contrasted,
    errors_at_one_draw,
    of_another_class,
    separation_loss,
)
from lightning_diffclf.modules.training import StepRandom, keyed_generator, own_first
from tests.modules.test_class_conditional_dit import FLOW, TINY, trainer

CPU = torch.device("cpu")


def step_random(rows: int, seed: int = 0) -> StepRandom:
    return StepRandom(keyed_generator(CPU, seed), rows, slice(None))


# --- classification ------------------------------------------------------------------------------------------------


def test_classification_loss_of_two_classes_is_the_logistic_loss():
    errors = torch.tensor([[0.30, 0.34], [0.50, 0.45]], dtype=torch.float64)
    expected = [math.log1p(math.exp(-64 * 0.04 / 2)), math.log1p(math.exp(64 * 0.05 / 2))]  # D = 64, T = 2
    assert classification_loss(errors, dims=64, temperature=2.0).tolist() == pytest.approx(expected)


def test_classification_loss_is_that_of_the_posterior():
    errors = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).double() / 10
    p = Posterior("sum", temperature=3.0)(errors.numpy(), dims=32)
    found = classification_loss(errors, dims=32, temperature=3.0)
    assert found.tolist() == pytest.approx((-torch.from_numpy(p).log())[:, 0].tolist())


def test_the_gradient_is_the_own_error_less_the_expected_one():
    """In units of the error, the cross-entropy times T / D has the gradient 1 - p for the own class, -p for others."""
    errors = torch.tensor([[0.30, 0.31, 0.40]], dtype=torch.float64, requires_grad=True)
    (2 / 128 * classification_loss(errors, dims=128, temperature=2.0)).sum().backward()
    p = torch.softmax(-64 * errors.detach(), 1)[0]
    torch.testing.assert_close(errors.grad[0], torch.tensor([1.0, 0, 0]).double() - p)
    assert errors.grad[0, 0] > 0 > errors.grad[0, 1] > -1


def test_errors_far_apart_do_not_overflow():
    errors = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    loss = classification_loss(errors, dims=4096, temperature=2.0)
    assert loss.item() == pytest.approx(2048 * 1000)
    loss.backward()
    assert errors.grad.isfinite().all()


# --- separation ----------------------------------------------------------------------------------------------------


def test_separation_raises_wrong_classes_up_to_the_margin_and_nothing_else():
    errors = torch.tensor([[0.1, 0.2, 0.6]], requires_grad=True)
    null = torch.tensor([0.4], requires_grad=True)
    loss = separation_loss(errors, null, margin=0.25)
    assert loss.item() == pytest.approx((0.5 - 0.2) / 2)  # of two wrong classes, one is too good
    loss.backward()
    assert errors.grad.tolist() == [[0.0, -0.5, 0.0]]
    assert null.grad is None


# --- contrastive flow matching -------------------------------------------------------------------------------------


def test_contrasted_by_hand():
    losses, distances, counts = torch.tensor([0.5, 0.7]), torch.tensor([2.0, 3.0]), torch.tensor([True, False])
    assert contrasted(losses, distances, counts, 0.1).tolist() == pytest.approx([0.3, 0.7])
    assert contrasted(losses, distances, counts, 0.0).tolist() == losses.tolist()


def test_other_images_are_of_another_class_and_equally_likely():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    count = 30_000
    generator = torch.Generator().manual_seed(0)
    seen = torch.zeros(6, 6)
    for uniform in torch.rand(count // 6, 6, generator=generator):
        index, found = of_another_class(labels, uniform)
        assert found.all()
        seen[torch.arange(6), index] += 1
    same = labels[:, None] == labels
    assert (seen[same] == 0).all()
    share = seen / seen.sum(1, keepdim=True)
    expected = (~same).float() / (~same).sum(1, keepdim=True)
    torch.testing.assert_close(share, expected, rtol=0, atol=5 * (0.25 / (count / 6)) ** 0.5)
    one, found = of_another_class(torch.tensor([4, 4]), torch.tensor([0.0, 0.99]))
    assert not found.any()
    assert ((one >= 0) & (one < 2)).all()
    ends, found = of_another_class(torch.tensor([0, 1, 1]), torch.tensor([0.0, 0.0, 1.0]))  # 1.0: rounded up
    assert ends.tolist() == [1, 0, 0]


# --- what is compared ----------------------------------------------------------------------------------------------


def test_the_own_class_is_always_among_the_compared_ones():
    labels = torch.arange(500) % 7
    order = own_first(labels, 7, step_random(500))
    assert torch.equal(order[:, 0], labels)
    assert (order.sort(1).values == torch.arange(7)).all()  # each class once
    second = torch.bincount((order[:, 1] - labels) % 7, minlength=7)
    assert second[0] == 0
    assert second[1:].min() > 500 / 6 / 2  # at random


def known(x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Predicts the noise 0.1 · y everywhere."""
    return (0.1 * y).view(-1, 1, 1, 1).expand_as(x_t).float()


def compared(objectives: Objectives, labels: torch.Tensor, num_classes: int, null: int | None = None) -> dict:
    rows = len(labels)
    x0, noise = torch.zeros(rows, 1, 4, 4), torch.zeros(rows, 1, 4, 4)
    t = torch.full((rows,), 500)
    classes = num_classes, null
    return objectives.compare(known, NoiseSchedule.linear(), x0, labels, t, noise, classes, step_random(rows))


def test_errors_at_a_shared_draw_are_those_of_the_classifier():
    torch.manual_seed(0)
    module = ClassConditionalDiT(**TINY | FLOW).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    noise = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    draws = Draws(1, timesteps=torch.tensor([0.3]), noise=noise[:1])
    results = DiffusionClassifier(module, draws=draws)(images, [0, 1])
    asked = torch.arange(10).expand(2, -1)
    found = errors_at_one_draw(module.predict, module.schedule, images, torch.full((2,), 0.3), noise, asked)
    for result, row in zip(results, found, strict=True):
        torch.testing.assert_close(torch.as_tensor(result.scores_K).float(), row.detach(), rtol=1e-4, atol=1e-6)


def test_compared_losses_of_a_network_whose_errors_are_known():
    """The noise is 0, so the error under class y is (0.1 y)²; of two classes, both are compared."""
    labels = torch.tensor([0, 1, 0, 0])
    both = Objectives(classification=2.0, temperature=4.0, compared_classes=5, compared_share=0.5, separation=3.0)
    found = compared(both, labels, num_classes=2, null=2)
    difference = 16 / 4 * 0.01
    entropy = (math.log1p(math.exp(-difference)) + math.log1p(math.exp(difference))) / 2  # of the first two images
    hinge = ((1.1 * 0.04 - 0.01) + (1.1 * 0.04 - 0.0)) / 2
    assert found["classification"].item() == pytest.approx(entropy)
    assert found["separation"].item() == pytest.approx(hinge)
    assert found["add"].item() == pytest.approx(2.0 * 4 / 16 * entropy + 3.0 * hinge)
    assert compared(Objectives(classification=1.0), labels, 2).keys() == {"add", "classification"}


def test_rows_are_bounded():
    seen = []

    def counting(x_t, t, y):
        seen.append(y)
        return known(x_t, t, y)

    labels = torch.arange(32)
    x = torch.zeros(32, 1, 4, 4)
    of = Objectives(classification=1.0, compared_classes=6, compared_share=0.25, separation=1.0)
    of.compare(counting, NoiseSchedule.linear(), x, labels, torch.full((32,), 5), x, (1000, 1000), step_random(32))
    assert [len(rows) for rows in seen] == [8 * (6 + 1)]
    asked = seen[0].view(8, 7)
    assert torch.equal(asked[:, 0], labels[:8])
    assert (asked[:, 6] == 1000).all()
    assert all(len(set(row.tolist())) == 7 for row in asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classification": -1.0}, "classification: -1.0, expected a number from 0 on"),
        ({"temperature": 0.0}, "temperature: 0.0, expected a positive number"),
        ({"compared_classes": 1}, "compared_classes: 1, expected at least 2"),
        ({"compared_share": 0.0}, r"compared_share: 0.0, expected a share in \(0, 1\]"),
        ({"separation": 1.0, "class_dropout_prob": 0.0}, "separation: the network has no null label"),
        ({"contrastive": 0.05}, "contrastive: with epsilon prediction"),
        ({"contrastive": 1.0} | FLOW, "contrastive: 1.0, expected a number below 1"),
        ({"contrastive": 0.05, "class_sets": 0.5} | FLOW, "contrastive: an image on a set of classes"),
        ({"classification": 1.0, "num_classes": 1}, "1 class, expected 2 or more"),
        ({"margin": float("nan")}, "margin: nan"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        ClassConditionalDiT(**TINY | settings)


# --- in training ---------------------------------------------------------------------------------------------------


def weights(steps: int = 2, precision: str = "32-true", **settings) -> tuple[list[torch.Tensor], dict]:
    torch.manual_seed(0)
    module = ClassConditionalDiT(**TINY | FLOW | settings)
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    fitting = trainer(steps, precision=precision)
    fitting.fit(module, DigitsDataModule(batch_size=32))
    return [p.detach().clone() for p in module.parameters()], fitting.callback_metrics


def test_without_weights_nothing_changes_and_with_weights_something_does():
    plain, metrics = weights()
    off, _ = weights(temperature=9.0, compared_classes=3, compared_share=1.0, margin=5.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))
    assert set(metrics) == {"train/loss"}
    for name in ("classification", "separation", "contrastive"):
        other, metrics = weights(**{name: 0.5})
        assert not all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)), name
        logged = "contrast" if name == "contrastive" else name
        assert set(metrics) == {"train/loss", f"train/{logged}"}
        assert metrics[f"train/{logged}"] > 0


def test_all_of_them_in_half_precision():
    _, metrics = weights(precision="bf16-mixed", classification=1.0, separation=1.0, contrastive=0.05)
    assert all(value.isfinite() for value in metrics.values())


def test_images_without_their_class_are_not_contrasted():
    """All labels are dropped: the loss is that without contrast."""
    plain, _ = weights(class_dropout_prob=1.0)
    other, _ = weights(class_dropout_prob=1.0, contrastive=0.5)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_the_classification_loss_falls_where_it_is_trained():
    images, labels = torch.ones(8, 1, 8, 8) * 0.5, torch.arange(8) % 2
    images[labels == 1] *= -1
    torch.manual_seed(0)
    module = ClassConditionalDiT(
        **TINY | FLOW | {"num_classes": 2}, classification=1.0, compared_share=1.0, class_dropout_prob=0.0, lr=1e-2
    )
    losses = []
    module.log_dict = lambda values, **_: losses.append(values["train/classification"].item())
    trainer(60).fit(module, DataLoader([(images, labels)] * 60, batch_size=None))
    assert losses[0] == pytest.approx(math.log(2))  # a new network predicts the same for all classes
    assert sum(losses[-10:]) / 10 < 0.7 * losses[0]
