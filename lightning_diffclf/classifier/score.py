"""How wrong a prediction is: the error of one (image, candidate, draw), and what it weighs in the score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule
from lightning_diffclf.variational import bound_terms


@dataclass(frozen=True)
class Predictions:
    """N network calls and their results.

    Attributes:
        schedule: Noise schedule of the network.
        output: Network output (N, C or 2C, ...), any floating dtype.
        x0: Clean inputs (N, C, ...), float32.
        x_t: Noisy inputs (N, C, ...), float32.
        t: Timesteps (N,).
        noise: The noise in x_t (N, C, ...), float32.
    """

    schedule: NoiseSchedule
    output: Tensor
    x0: Tensor
    x_t: Tensor
    t: Tensor
    noise: Tensor

    @cached_property
    def epsilon(self) -> Tensor:
        """Predicted noise (N, C, ...), at least float32: in half precision, candidates would tie by rounding."""
        wide = torch.promote_types(self.output.dtype, torch.float32)
        return self.schedule.to_epsilon(self.output.to(wide), self.x_t, self.t)

    @cached_property
    def bound(self) -> tuple[Tensor, Tensor]:
        """Terms of the variational bound: KL and decoder NLL, each (N,) in bits/dim."""
        return bound_terms(cast(DiscreteSchedule, self.schedule), self.output.float(), self.x0, self.x_t, self.t)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


TERMS: dict[str, Callable[[Predictions], Tensor]] = {
    "l2": lambda p: _mean((p.epsilon - p.noise).square()),
    "l1": lambda p: _mean((p.epsilon - p.noise).abs()),
    "huber": lambda p: _mean(F.huber_loss(p.epsilon, p.noise, reduction="none", delta=1.0)),
    "kl": lambda p: p.bound[0],
    "nll": lambda p: p.bound[1],
}


class Loss:
    """A sum of error terms, given by its name.

    ``l2``, ``l1`` and ``huber`` (delta 1) are distances between true and predicted noise, averaged over all values
    of x0. ``kl`` and ``nll`` are terms of the variational bound in bits/dim (Nichol & Dhariwal 2021), for networks that
    predict a variance: the KL divergence of one denoising step, and the likelihood of x0 under the last step.

    Args:
        name: One term, or several joined by ``+``, such as ``l2+kl``.

    Raises:
        ValueError: if a term is unknown or named twice.
    """

    def __init__(self, name: str = "l2") -> None:
        self.name = name
        self.terms = tuple(term.strip() for term in name.split("+"))
        unknown = [term for term in self.terms if term not in TERMS]
        if unknown or len(set(self.terms)) < len(self.terms):
            raise UserError(f"loss: {name!r}, expected one of {list(TERMS)}, or several different ones joined by '+'")

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError if the terms do not exist for ``schedule``."""
        if {"kl", "nll"} & set(self.terms) and not (
            isinstance(schedule, DiscreteSchedule) and schedule.prediction == "epsilon"
        ):
            raise UserError(
                f"loss: {self.name!r} needs a discrete schedule with epsilon prediction, "
                f"found {type(schedule).__name__} with {schedule.prediction}"
            )

    def __call__(self, p: Predictions) -> Tensor:
        """Error of each row (N,), float32."""
        return torch.stack([TERMS[term](p) for term in self.terms]).sum(0)


WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": lambda log_snr, time: torch.ones_like(time),
    "sample": lambda log_snr, time: torch.exp(-log_snr),
    "velocity": lambda log_snr, time: 1 + torch.exp(-log_snr),
    "clark_jaini": lambda log_snr, time: torch.exp(-7 * time - log_snr),
}


def timestep_weights(weights: str | Sequence[float], log_snr_S: Tensor) -> Tensor:
    """What the errors of each draw weigh in the score, mean 1.

    Errors are distances between noises; some weights make them distances in another space (``l2``):

    * ``uniform``: all draws weigh the same, as in the paper. Hard to beat.
    * ``sample``: exp(-λ), with the log signal-to-noise ratio λ: the squared error of the predicted clean image.
    * ``velocity``: 1 + exp(-λ): that of the predicted velocity v of a variance preserving schedule.
    * ``clark_jaini``: exp(-7 t - λ), with time t from 0 (clean) to 1 (Clark & Jaini 2023, whose weights are meant for
      the predicted clean image).

    Args:
        weights: One of these names, or a number for each draw from the cleanest to the noisiest.
        log_snr_S: λ of each draw (S,), in any order.

    Returns:
        (S,) float64, in the order of ``log_snr_S``.

    Raises:
        ValueError: if the name is unknown, or the numbers are not S, not finite, negative or all zero.

    Example:
        >>> timestep_weights([1, 2, 3], torch.tensor([0.0, 5.0, -5.0])).tolist()
        [1.0, 0.5, 1.5]
    """
    count = len(log_snr_S)
    noisiness = log_snr_S.argsort(descending=True, stable=True).argsort()
    if isinstance(weights, str):
        if weights not in WEIGHTS:
            raise UserError(f"weights: {weights!r}, expected one of {list(WEIGHTS)}, or a number for each draw")
        values = WEIGHTS[weights](log_snr_S.double(), (noisiness + 0.5).double() / count)
    else:
        values = torch.as_tensor(weights, dtype=torch.float64)
        if len(values) != count:
            raise UserError(f"weights: {len(values)} numbers for {count} draws")
        values = values[noisiness]
    if not bool(values.isfinite().all()) or float(values.min()) < 0 or float(values.sum()) == 0:
        raise UserError("weights: expected finite numbers from 0 on, not all of them 0")
    return values / values.mean()
