"""Logits that can be differentiated by the images: for attacks, certificates, and whatever else takes a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_diffclf.classifier.checks import check_images, check_output
from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.classifier.score import Predictions
from lightning_diffclf.denoiser import evaluating
from lightning_diffclf.errors import UserError

if TYPE_CHECKING:
    from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier

SHARED_ID = "every image"  # whose noise all images see


class Differentiable:
    """A classifier whose scores are differentiable functions of the images."""

    def logits(self: DiffusionClassifier, images: Tensor, noise_key: str = SHARED_ID) -> Tensor:  # type: ignore[misc]
        """A logit for each class, differentiable by the images, and by weights that require gradients.

        Every image sees the same draws, whatever its id, content and batch: those that the engine gives an image with
        the id ``noise_key``, or :attr:`Draws.noise`. All of them count: no rule, budget or proposal. The softmax of
        logits is the recipe's posterior. A class with several candidates has the error of its best one, or their mean,
        as the recipe's ``ensemble`` says.

        The backward pass computes each micro-batch of a draw again, so that memory does not grow with the draws; a
        gradient costs a third more than without. Gradients pass through ``denoiser.encode``, and have none themselves.

        Args:
            images: (B, C, H, W) floating point, what ``denoiser.encode`` takes, on the network's device. In float64,
                with a network in float64, errors are float64 too.
            noise_key: Another one is other draws.

        Returns:
            (B, K) for the K classes in play, in ascending order; float32.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if images have the wrong shape or values, or, here or in the backward pass, no gradient reaches
                them though they ask for one.
        """
        check_images(images, range(len(images)))
        denoiser = self.denoiser
        with evaluating(denoiser):
            x0 = denoiser.encode(images)
        if images.requires_grad and torch.is_grad_enabled() and not x0.requires_grad:
            raise _no_path("denoiser.encode")
        candidate_K = torch.as_tensor(self.recipe.candidates or range(len(denoiser.candidates)), device=x0.device)
        image_N = torch.arange(len(x0), device=x0.device).repeat_interleave(len(candidate_K))
        weights = denoiser.parameters() if isinstance(denoiser, nn.Module) else ()
        mean_N: Tensor = _MeanError.apply(
            x0, self, noise_key, image_N, candidate_K.repeat(len(x0)), *(one for one in weights if one.requires_grad)
        )
        mean_BK = mean_N.view(len(x0), len(candidate_K))
        posterior, dims = self.recipe.posterior, x0[0].numel()
        scale = (dims if posterior.reduction == "sum" else 1) / posterior.temperature
        class_K = torch.tensor(denoiser.candidates.classes, device=x0.device)[candidate_K]
        return -by_class(mean_BK, class_K, self.recipe.ensemble) * scale


class _MeanError(torch.autograd.Function):
    """Mean weighted error of each row over all draws (N,); the backward pass goes through the draws again.

    Nothing of a draw outlives it. ``torch.utils.checkpoint`` would keep the graph of each, without its tensors: for a
    small network that is a megabyte.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x0: Tensor,
        c: DiffusionClassifier,
        noise_key: str,
        image_N: Tensor,
        candidate_N: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x0, image_N, candidate_N, *weights)
        device = x0.device.type
        ctx.classifier, ctx.noise_key = c, noise_key
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        mean_N = x0.new_zeros(len(image_N))
        for draw, share, rows in _micro_batches(c, len(image_N)):
            mean_N[rows] += share * _errors(c, x0, draw, image_N[rows], candidate_N[rows], noise_key)
        return mean_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> Any:
        c, (x0, image_N, candidate_N, *weights) = ctx.classifier, ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]]
        asked = [one for one, needed in zip([x0.detach().requires_grad_(), *weights], needs, strict=True) if needed]
        x0 = asked[0] if needs[0] else x0
        found = [torch.zeros_like(one) for one in asked]
        device, dtype, enabled = ctx.autocast
        for draw, share, rows in _micro_batches(c, len(image_N)):
            with torch.enable_grad(), torch.autocast(device, dtype, enabled):
                errors_N = _errors(c, x0, draw, image_N[rows], candidate_N[rows], ctx.noise_key)
            if not errors_N.requires_grad:
                raise _no_path("denoiser.predict")
            parts = torch.autograd.grad(errors_N, asked, share * gradient_N[rows], allow_unused=True)
            for total, part in zip(found, parts, strict=True):
                if part is not None:
                    total += part
        left = iter(found)
        first, *others = (next(left) if needed else None for needed in needs)
        return first, None, None, None, None, *others


def _micro_batches(c: DiffusionClassifier, rows: int) -> Iterator[tuple[int, float, slice]]:
    """Draw, what it weighs in the mean, and rows of each call of the network."""
    weights_S = c.terms.weights_S / len(c.terms.weights_S)
    for draw, share in enumerate(weights_S.tolist()):
        for first in range(0, rows, c.microbatch):
            yield draw, share, slice(first, first + c.microbatch)


def _errors(
    c: DiffusionClassifier,
    x0: Tensor,
    draw: int,
    image_N: Tensor,
    candidate_N: Tensor,
    noise_key: str = SHARED_ID,
) -> Tensor:
    """Error of each (image, candidate) row at one draw (N,)."""
    schedule, denoiser = c.denoiser.schedule, c.denoiser
    image_M, pair_N = image_N.unique(return_inverse=True)
    x0_M, t_M = x0[image_M], c.timesteps_S[draw].to(x0.device).expand(len(image_M))
    noise_M = _noise(c, x0, draw, noise_key).expand_as(x0_M)
    x_t_M = schedule.add_noise(x0_M, noise_M, t_M)
    x_in_M, time_M = schedule.network_rows(x_t_M, t_M)
    with evaluating(denoiser):  # here, because the backward pass comes back at another time
        output = denoiser.predict(x_in_M[pair_N], time_M[pair_N], candidate_N)
    x_t = x_t_M[pair_N]
    check_output(output, x_t)
    with torch.autocast(x0.device.type, enabled=False):
        return c.loss(Predictions(schedule, output, x0_M[pair_N], x_t, t_M[pair_N], noise_M[pair_N]))


def _noise(c: DiffusionClassifier, x0: Tensor, draw: int, noise_key: str = SHARED_ID) -> Tensor:
    """The noise of a draw (C, h, w), as x0 is."""
    if c.draws.noise is not None:
        return c.draws.noise[draw].to(x0)
    keyed, noise = KeyedNoise(c.draws.seed), np.empty(tuple(x0.shape[1:]), dtype=np.float32)
    c.draws.fill(keyed, noise, keyed.key(noise_key), draw)
    return torch.from_numpy(noise).to(x0)


def by_class(scores_BK: Tensor, class_K: Tensor, ensemble: str) -> Tensor:
    """The score of each class in play (B, C), where lower is better, in ascending order of the classes.

    Args:
        scores_BK: Of the candidates (B, K).
        class_K: Class of each candidate (K,), int64.
        ensemble: ``best`` or ``mean``: what counts of several candidates of a class.
    """
    known, class_K = class_K.unique(return_inverse=True)
    if len(known) == len(class_K):
        return scores_BK[:, class_K.argsort()]
    reduce, empty = ("mean", 0.0) if ensemble == "mean" else ("amin", torch.inf)
    empty_BC = scores_BK.new_full((len(scores_BK), len(known)), empty)
    return empty_BC.scatter_reduce(1, class_K.expand_as(scores_BK), scores_BK, reduce, include_self=False)


def _no_path(name: str) -> UserError:
    return UserError(
        f"logits: no gradient path from the images through {name}, expected it to work without no_grad, detach and "
        "inference mode"
    )


class DiffusionLogits(nn.Module):
    """A diffusion classifier as a plain network: images in [0, 1] to logits, the same each time.

    What RobustBench, AutoAttack, foolbox and ART take. Nothing in it is random or optimised, so that an attack on it
    needs no expectation over transformations. With ``fresh`` it is a random defence: each call sees other draws.

    Args:
        classifier: The classifier; its recipe says how many draws.
        noise_key: Id whose draws all images see; with another one, it is another network.
        fresh: Take other draws at each call: those of ``"NOISE_KEY, call 0"``, ``"NOISE_KEY, call 1"``, …

    Raises:
        ValueError: if ``fresh`` is asked for and the draws have fixed noise; from a call, if images are not in [0, 1].

    Example:
        >>> network = DiffusionLogits(classifier)  # doctest: +SKIP
        >>> logits_BK = network(images)  # doctest: +SKIP
    """

    def __init__(self, classifier: DiffusionClassifier, noise_key: str = SHARED_ID, fresh: bool = False) -> None:
        super().__init__()
        if fresh and classifier.draws.noise is not None:
            raise UserError("fresh: true, but the draws have fixed noise, expected draws without")
        self.classifier, self.noise_key, self.fresh = classifier, noise_key, fresh
        self.calls = 0
        if isinstance(classifier.denoiser, nn.Module):
            self.denoiser: nn.Module = classifier.denoiser  # so that .to(), .eval() and parameters reach it

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1]; see :meth:`DiffusionClassifier.logits`."""
        low, high = (float(end) for end in images.detach().aminmax())
        if not (low >= -1e-3 and high <= 1 + 1e-3):
            raise UserError(f"images: values in [{low:.4g}, {high:.4g}], expected [0, 1]")
        noise_key = f"{self.noise_key}, call {self.calls}" if self.fresh else self.noise_key
        self.calls += 1
        return self.classifier.logits(images * 2 - 1, noise_key)
