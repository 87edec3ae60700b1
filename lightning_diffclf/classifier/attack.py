"""Attacks on a network of images in [0, 1], such as DiffusionLogits: the smallest change that we find to fool it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.noise import KeyedNoise

Norm = Literal["linf", "l2"]

LEAST_CLASSES = 4  # of AutoAttack: its targeted loss is a ratio of differences of four logits


@dataclass(frozen=True)
class Attacked:
    """What an attack found.

    Attributes:
        images: The image that fooled the network, or the one with the largest loss (B, C, H, W), in [0, 1].
        right: Whether the network still answers rightly (B,), bool.
        losses: The largest loss found so far, before the first step and after each (S + 1, B), over all restarts.
    """

    images: Tensor
    right: Tensor
    losses: Tensor


@dataclass(frozen=True)
class APGD:
    """Adaptive projected gradient descent (Croce & Hein 2020, algorithm 1): no step size to tune.

    It climbs the margin loss max_{k ≠ y} z_k - z_y of logits z, which is above 0 where the network is fooled. The
    logits of a diffusion classifier are large, so that the cross-entropy of a sure answer has no gradient in float32.

    Args:
        eps: Radius of the ball around each image, in units of images in [0, 1]: 8 / 255 is 8 grey levels. In images in
            [-1, 1], it is twice as much.
        norm: ``linf`` or ``l2``: what the ball is a ball of.
        steps: Gradients of each restart, after that of its start.
        restarts: Starting points; the first is the image itself, the others are random, for images that are still
            answered rightly.
        seed: Key of the starting points, with the id of the image.
        eot: Calls of the network that a gradient is the mean of: more than one for a network that is random
            (expectation over transformations, Athalye et al. 2018).

    Raises:
        ValueError: if ``eps`` is not positive, or so large that its unit must be another; or a count is below 1.
    """

    eps: float
    norm: Norm = "linf"
    steps: int = 100
    restarts: int = 1
    seed: int = 0
    eot: int = 1

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        check_at_least(1, steps=self.steps, restarts=self.restarts, eot=self.eot)

    def __call__(
        self, network: nn.Module, images: Tensor, label_B: Tensor, ids: Sequence[int | str] | None = None
    ) -> Attacked:
        """Attack images (B, C, H, W) in [0, 1] of classes ``label_B`` (B,), all at once.

        What is found for an image does not depend on the others, but for rounding.

        Args:
            network: Images in [0, 1] to logits (B, K).
            images: (B, C, H, W) in [0, 1].
            label_B: Columns of the logits that are right (B,), int64.
            ids: Of the images, which key their random starts; their positions if omitted.

        Raises:
            ValueError: if ``images`` are not in [0, 1], the ball holds all of them, there are fewer than two classes,
                or no gradient arrives.
        """
        check_unit_range(images)
        check_diameter(images, self.eps, self.norm)
        ids = range(len(images)) if ids is None else ids
        found = self._climb(network, images, images, label_B)
        for restart in range(1, self.restarts):
            left = found.right.nonzero()[:, 0].tolist()
            if not left:
                break
            some = images[left]
            start = self._project(
                some, some + self.eps * self._step(self._noise(some, [ids[i] for i in left], restart))
            )
            found = _better(found, self._climb(network, some, start, label_B[left]), left)
        return found

    def _noise(self, images: Tensor, ids: Sequence[int | str], restart: int) -> Tensor:
        keyed, noise = KeyedNoise(self.seed), np.empty(tuple(images.shape), dtype=np.float32)
        for one, image_id in zip(noise, ids, strict=True):
            keyed.fill(one, keyed.key(image_id), restart)
        return torch.from_numpy(noise).to(images)

    def _climb(self, network: nn.Module, images: Tensor, start: Tensor, label_B: Tensor) -> Attacked:
        loss_B, gradient = loss_and_gradient(network, start, label_B, self.eot)
        best, best_B, best_gradient, losses = start.clone(), loss_B.clone(), gradient, [loss_B]
        now, before = start, start
        size_B = torch.full_like(loss_B, 2 * self.eps)
        rises_B, last = torch.zeros_like(loss_B), 0
        reduced_B, best_then_B = torch.ones_like(loss_B, dtype=torch.bool), loss_B.clone()
        checkpoints = _checkpoints(self.steps)
        for step in range(1, self.steps + 1):
            aim = self._project(images, now + _wide(size_B) * self._step(gradient))
            keep = 1.0 if step == 1 else 0.75
            after = self._project(images, now + keep * (aim - now) + (1 - keep) * (now - before))
            before, now, previous_B = now, after, loss_B
            loss_B, gradient = loss_and_gradient(network, now, label_B, self.eot)
            rises_B += loss_B > previous_B
            better_B = loss_B > best_B
            best, best_gradient = (
                torch.where(_wide(better_B), new, old) for new, old in ((now, best), (gradient, best_gradient))
            )
            best_B = torch.maximum(loss_B, best_B)
            losses.append(best_B)
            if step in checkpoints:
                halve_B = rises_B < 0.75 * (step - last)
                halve_B |= ~reduced_B & (best_B <= best_then_B)
                size_B = torch.where(halve_B, size_B / 2, size_B)
                now, gradient, before = (
                    torch.where(_wide(halve_B), new, old)
                    for new, old in ((best, now), (best_gradient, gradient), (best, before))
                )
                loss_B = torch.where(halve_B, best_B, loss_B)
                rises_B, last, reduced_B, best_then_B = torch.zeros_like(rises_B), step, halve_B, best_B
        return Attacked(best, best_B < 0, torch.stack(losses))

    def _step(self, gradient: Tensor) -> Tensor:
        """The direction of length one that raises the loss most."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / gradient.flatten(1).norm(dim=1).clamp_min(1e-20).view(-1, 1, 1, 1)

    def _project(self, images: Tensor, changed: Tensor) -> Tensor:
        """Into the ball around ``images`` and [0, 1]."""
        change = changed - images
        if self.norm == "linf":
            change = change.clamp(-self.eps, self.eps)
        else:
            length = change.flatten(1).norm(dim=1).clamp_min(1e-20)
            change = change * _wide((self.eps / length).clamp_max(1))
        return (images + change).clamp(0, 1)


def check_eps(eps: float, norm: Norm) -> None:
    """Raise ValueError unless ``eps`` can be a radius in units of images in [0, 1]."""
    if norm not in ("linf", "l2"):
        raise UserError(f"norm: {norm!r}, expected 'linf' or 'l2'")
    if not 0 < eps < math.inf or (norm == "linf" and eps > 1):
        raise UserError(
            f"eps: {eps}, expected a positive radius in units of images in [0, 1]; 8 / 255 is 8 grey levels, and a "
            "radius for images in [-1, 1] is to be halved"
        )


def check_diameter(images: Tensor, eps: float, norm: Norm) -> None:
    """Raise ValueError if the ball of radius ``eps`` around an image holds every image: another unit was meant."""
    values = images[0].numel()
    if norm == "l2" and eps > values**0.5:
        raise UserError(
            f"eps: {eps}, but no two images of {values} values in [0, 1] are further apart than {values**0.5:.4g}; "
            "expected a radius in that unit"
        )


def auto_attack(
    network: nn.Module, images: Tensor, label_B: Tensor, eps: float, norm: Norm = "linf", **settings: Any
) -> Tensor:
    """AutoAttack (Croce & Hein 2020): its images (B, C, H, W). Needs the extra ``attack`` (pyautoattack).

    Args:
        network: Images in [0, 1] to logits, the same each time. With ``version="rand"`` it may be random.
        images: (B, C, H, W) in [0, 1].
        label_B: Their classes (B,), int64.
        eps: As of :class:`APGD`.
        norm: As of :class:`APGD`.
        **settings: For ``pyautoattack.AutoAttack``, such as ``version``, ``attacks`` and ``seed``. Its noise is drawn
            for all images together: what is found for one depends on the others.

    Raises:
        ValueError: if ``eps`` cannot be a radius of them, ``images`` are not in [0, 1], no gradient arrives, there are
            fewer than four classes, or the package is missing.
    """
    check_eps(eps, norm)
    check_unit_range(images)
    check_diameter(images, eps, norm)
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise UserError("auto_attack: needs pyautoattack, expected `pip install lightning-diffclf[attack]`") from error
    loss_and_gradient(network, images[:1], label_B[:1])  # says what is missing, in our words
    attack = AutoAttack(network, eps=eps, norm={"linf": "Linf", "l2": "L2"}[norm], device=images.device, **settings)
    with torch.no_grad():
        classes = network(images[:1]).shape[1]
    check_labels(label_B, classes)
    if classes < LEAST_CLASSES and ",".join(attack.attacks_to_run) != "apgd-ce":
        raise UserError(
            f"auto_attack: {classes} classes, expected at least {LEAST_CLASSES}: its losses rank four logits"
        )
    for one in (attack.apgd_targeted, attack.fab):
        one.n_target_classes = min(one.n_target_classes, classes - 1)
    with torch.random.fork_rng():  # it seeds the generators of everybody
        found: Tensor = attack.run_standard_evaluation(images, label_B)[0]  # and what the network answers
    return found


def margin_loss(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    """How far the largest other logit is above that of the label (B,)."""
    own_BK = torch.nn.functional.one_hot(label_B, logits_BK.shape[1]).bool()
    return logits_BK.masked_fill(own_BK, -torch.inf).amax(1) - logits_BK.gather(1, label_B[:, None])[:, 0]


def loss_and_gradient(network: nn.Module, images: Tensor, label_B: Tensor, calls: int = 1) -> tuple[Tensor, Tensor]:
    """Margin loss (B,) and its gradient by the images (B, C, H, W), the means of some calls of the network.

    Raises:
        ValueError: if there are fewer than two classes, a label is none of them, or no gradient arrives at the images.
    """
    images = images.detach().requires_grad_()
    losses, gradients = [], []
    for _ in range(calls):
        with torch.enable_grad():
            logits_BK = network(images)
            if logits_BK.shape[1] < 2:
                raise UserError(f"attack: {logits_BK.shape[1]} class, expected at least two")
            if not logits_BK.requires_grad:
                raise UserError(
                    "attack: the logits have no gradient path to the images, expected a differentiable network"
                )
            check_labels(label_B, logits_BK.shape[1])
            loss_B = margin_loss(logits_BK, label_B)
            (gradient,) = torch.autograd.grad(loss_B.sum(), images)
        losses.append(loss_B.detach())
        gradients.append(gradient)
    return torch.stack(losses).mean(0), torch.stack(gradients).mean(0)


def check_labels(label_B: Tensor, classes: int) -> None:
    """Raise ValueError unless every label is a column of the logits."""
    for label in label_B[(label_B < 0) | (label_B >= classes)][:1].tolist():
        raise UserError(f"labels: {label}, expected columns of the logits, 0 … {classes - 1}")


def check_unit_range(images: Tensor) -> None:
    """Raise ValueError unless images are in [0, 1], the unit of all distances here."""
    low, high = (float(end) for end in images.aminmax())
    if not (low >= 0 and high <= 1):
        raise UserError(f"images: values in [{low:.4g}, {high:.4g}], expected [0, 1], the unit of eps")


def _checkpoints(steps: int) -> set[int]:
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:] if share <= 1}


def _better(first: Attacked, second: Attacked, places: Sequence[int]) -> Attacked:
    """Of each image, the one with the larger loss; ``second`` has those at some places of ``first``."""
    images, right, losses = first.images.clone(), first.right.clone(), first.losses.clone()
    takes = _wide(second.losses[-1] > first.losses[-1, places])
    images[places] = torch.where(takes, second.images, first.images[places])
    right[places] &= second.right
    losses[:, places] = torch.maximum(first.losses[:, places], second.losses)
    return Attacked(images, right, losses)


def _wide(values_B: Tensor) -> Tensor:
    return values_B.view(-1, 1, 1, 1)
