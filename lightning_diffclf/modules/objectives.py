"""What a network may be trained for besides denoising: to tell classes apart, and to know when none of them fits.

Errors are those that the classifier compares: mean squared errors of the predicted noise, of an image under several
classes at one draw (t, ε), which all of them share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.modules.training import StepRandom, own_first
from lightning_diffclf.schedule import NoiseSchedule

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Output of a network (N, C or 2C, h, w) for its input (N, C, h, w), time values (N,) and classes (N,)."""


def errors_at_one_draw(
    predict: Predict, schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor, asked_BK: Tensor
) -> Tensor:
    """Error of each image under each class that it is asked about (B, K), float32: one network call for all.

    Args:
        predict: The network.
        schedule: Its noise schedule.
        x0: Clean inputs (B, C, h, w).
        t: Timestep of each (B,).
        noise: Noise of each (B, C, h, w).
        asked_BK: Classes, int64.
    """
    row_N = torch.arange(len(x0), device=x0.device).repeat_interleave(asked_BK.shape[1])
    x_t, t, noise = schedule.add_noise(x0, noise, t)[row_N], t[row_N], noise[row_N]
    output = predict(*schedule.network_rows(x_t, t), asked_BK.flatten()).float()
    return (schedule.to_epsilon(output, x_t, t) - noise).square().flatten(1).mean(1).view(asked_BK.shape)


def classification_loss(errors_BK: Tensor, dims: int, temperature: float) -> Tensor:
    """Cross-entropy of the posterior by one draw, in nats (B,): logits are ``-dims * error / temperature``.

    If the noise, given the noisy input and the class, were normal around its prediction with unit variance, its log
    density would be ``-dims * error / 2`` and a constant: so a temperature of 2 is the scale of likelihoods. These are
    the logits of :class:`~lightning_diffclf.Posterior` with ``reduction="sum"``.

    Args:
        errors_BK: Error of each image under K classes, its own one first.
        dims: Number of values of x0, D.
        temperature: Positive.

    Example:
        >>> classification_loss(torch.tensor([[0.5, 0.5]]), dims=64, temperature=2.0)  # ln 2
        tensor([0.6931])
    """
    logits_BK = errors_BK * (-dims / temperature)
    return logits_BK.logsumexp(1) - logits_BK[:, 0]


def separation_loss(errors_BK: Tensor, unconditional_B: Tensor, margin: float) -> Tensor:
    """By how much wrong classes explain an image better than they may (B,): ``max(0, (1 + margin) e_∅ - e_k)``.

    A wrong class shall be worse than no class at all, by a share of the error, and then it is left alone: "none of
    these" is told by how much the best class gains on no class. The gradient only raises errors under wrong classes.

    Args:
        errors_BK: Error of each image under K classes, its own one first; the mean is over the others.
        unconditional_B: Error under the null condition; a constant.
        margin: Share, from 0 on.

    Example:
        >>> separation_loss(torch.tensor([[0.1, 0.2, 0.5]]), torch.tensor([0.25]), margin=0.2)
        tensor([0.0500])
    """
    return ((1 + margin) * unconditional_B.detach()[:, None] - errors_BK[:, 1:]).clamp(min=0).mean(1)


def contrasted(losses: Tensor, distances: Tensor, counts: Tensor, weight: float) -> Tensor:
    """Contrastive flow matching (Stoica et al. 2025, arXiv 2506.05350): ``‖v̂ - v‖² - λ ‖v̂ - ṽ‖²`` (B,).

    Args:
        losses: Denoising loss of each image (B,).
        distances: Squared distance, as in the loss, of the prediction to the target ṽ of an image of another class with
            noise of its own (B,).
        counts: Which images have one (B,), bool. Those without a class have none.
        weight: λ.

    Example:
        >>> contrasted(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 2.0]), torch.tensor([True, False]), weight=0.05)
        tensor([0.4000, 0.5000])
    """
    return losses - weight * distances * counts


def of_another_class(labels: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """For each image of a batch, one of another class, all of those equally likely.

    Args:
        labels: Classes (B,), int64.
        uniform: Random numbers in [0, 1) that choose (B,).

    Returns:
        index: Of the other image (B,), int64; any where there is none.
        found: Whether there is one (B,), bool.

    Example:
        >>> of_another_class(torch.tensor([7, 7, 5]), torch.tensor([0.9, 0.1, 0.6]))
        (tensor([2, 2, 1]), tensor([True, True, True]))
    """
    others_BB = labels[:, None] != labels
    count = others_BB.sum(1)
    chosen = (uniform * count).long().clamp(max=(count - 1).clamp(min=0))  # a product may round up to its end
    return ((others_BB.cumsum(1) <= chosen[:, None]).sum(1)).clamp(max=len(labels) - 1), count > 0


@dataclass(frozen=True)
class Objectives:
    """What is added to the denoising loss; each is off where its weight is 0.

    ``loss = denoising + classification · (T / D) · cross-entropy + separation · hinge``, averaged over images. Times
    T / D, the cross-entropy is ``e_own + (T / D) ln Σ_k exp(-D e_k / T)``: the own error less a soft minimum of all, in
    units of the error whatever the size of images, with gradient ``∇e_own - Σ_k p_k ∇e_k``. The contrastive term is in
    the denoising loss itself, see :func:`contrasted`.

    Args:
        classification: Weight of :func:`classification_loss`.
        temperature: Its temperature T.
        compared_classes: Classes of an image that both of these losses compare, the own one and others at random.
        compared_share: Share of each batch that they look at, its first images. With B images in a batch, the network
            sees ``compared_share · B · compared_classes`` rows more.
        contrastive: Weight λ of contrastive flow matching.
        separation: Weight of :func:`separation_loss`.
        margin: Its margin.

    Raises:
        ValueError: if a number is out of its range.
    """

    classification: float = 0.0
    temperature: float = 2.0
    compared_classes: int = 10
    compared_share: float = 0.25
    contrastive: float = 0.0
    separation: float = 0.0
    margin: float = 0.1

    def __post_init__(self) -> None:
        for name in ("classification", "contrastive", "separation", "margin"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{name}: {value}, expected a number from 0 on")
        if not self.contrastive < 1:
            raise UserError(f"contrastive: {self.contrastive}, expected a number below 1, such as 0.05")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature: {self.temperature}, expected a positive number")
        check_at_least(2, compared_classes=self.compared_classes)
        if not 0 < self.compared_share <= 1:
            raise UserError(f"compared_share: {self.compared_share}, expected a share in (0, 1]")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Objectives:
        """Those that a module's arguments say; the others are the defaults."""
        return cls(**{one.name: settings[one.name] for one in fields(cls) if one.name in settings})

    @property
    def compares(self) -> bool:
        """Whether something is added that compares errors under several classes."""
        return self.classification > 0 or self.separation > 0

    def compare(
        self,
        predict: Predict,
        schedule: NoiseSchedule,
        x0: Tensor,
        labels: Tensor,
        t: Tensor,
        noise: Tensor,
        classes: tuple[int, int | None],
        random: StepRandom,
    ) -> dict[str, Tensor]:
        """Mean losses of the images that are looked at, by name, and what they ``add`` to the loss.

        Args:
            predict: The network.
            schedule: Its noise schedule.
            x0: Clean inputs (B, C, h, w).
            labels: Classes (B,), int64.
            t: Timesteps (B,).
            noise: Noise (B, C, h, w).
            classes: How many there are, and the null label, which the separation loss needs.
            random: Of this batch; says which classes are compared.
        """
        num_classes, null = classes
        first = slice(math.ceil(self.compared_share * len(x0)))
        asked_BK = own_first(labels, num_classes, random)[first, : self.compared_classes]
        if self.separation > 0:
            assert null is not None
            asked_BK = torch.cat([asked_BK, torch.full_like(asked_BK[:, :1], null)], dim=1)
        errors_BK = errors_at_one_draw(predict, schedule, x0[first], t[first], noise[first], asked_BK)
        found, dims = {"add": errors_BK.new_zeros(())}, x0[0].numel()
        if self.separation > 0:
            errors_BK, unconditional_B = errors_BK[:, :-1], errors_BK[:, -1]
            found["separation"] = separation_loss(errors_BK, unconditional_B, self.margin).mean()
            found["add"] = found["add"] + self.separation * found["separation"]
        if self.classification > 0:
            found["classification"] = classification_loss(errors_BK, dims, self.temperature).mean()
            found["add"] = found["add"] + self.classification * (self.temperature / dims) * found["classification"]
        return found

    def denoising(
        self,
        losses: Callable[..., dict[str, Tensor]],
        schedule: NoiseSchedule,
        x0: Tensor,
        labels: Tensor,
        t: Tensor,
        noise: Tensor,
        drop: Tensor | None,
        random: StepRandom,
    ) -> dict[str, Tensor]:
        """Mean denoising losses, by name; contrasted, where that is asked for, with other images of the batch.

        Args:
            losses: Gives the losses of each image (B,); given targets of other images, also ``contrast``: the squared
                distances to these.
            schedule: Noise schedule of the network.
            x0: Clean inputs (B, C, h, w).
            labels: Classes (B,), int64.
            t: Timesteps (B,).
            noise: Noise (B, C, h, w).
            drop: Which images are shown without their class (B,), bool; None for none.
            random: Of this batch; says which other images.
        """
        if self.contrastive == 0:
            return {name: value.mean() for name, value in losses().items()}
        index, counts = of_another_class(labels, random.uniform())
        found = losses(schedule.target(x0[index], noise[index], t))
        counts = counts if drop is None else counts & ~drop
        found["loss"] = contrasted(found["loss"], found["contrast"], counts, self.contrastive)
        return {name: value.mean() for name, value in found.items()}
