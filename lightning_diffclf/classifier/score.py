"""How wrong a prediction is: the error of one (image, candidate, draw)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule
from lightning_diffclf.variational import bound_terms


@dataclass(frozen=True)
class Rows:
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
        """Predicted noise (N, C, ...), float32: in half precision, candidates would tie by rounding."""
        return self.schedule.to_epsilon(self.output.float(), self.x_t, self.t)

    @cached_property
    def bound(self) -> tuple[Tensor, Tensor]:
        """Terms of the variational bound: KL and decoder NLL, each (N,) in bits/dim."""
        return bound_terms(cast(DiscreteSchedule, self.schedule), self.output.float(), self.x0, self.x_t, self.t)


def _mean(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)


TERMS: dict[str, Callable[[Rows], Tensor]] = {
    "l2": lambda rows: _mean((rows.epsilon - rows.noise).square()),
    "l1": lambda rows: _mean((rows.epsilon - rows.noise).abs()),
    "huber": lambda rows: _mean(F.huber_loss(rows.epsilon, rows.noise, reduction="none", delta=1.0)),
    "kl": lambda rows: rows.bound[0],
    "nll": lambda rows: rows.bound[1],
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
            raise ValueError(f"loss: {name!r}, expected one of {list(TERMS)}, or several different ones joined by '+'")

    def check(self, schedule: NoiseSchedule) -> None:
        """Raise ValueError if the terms do not exist for ``schedule``."""
        if {"kl", "nll"} & set(self.terms) and not (
            isinstance(schedule, DiscreteSchedule) and schedule.prediction == "epsilon"
        ):
            raise ValueError(
                f"loss: {self.name!r} needs a discrete schedule with epsilon prediction, "
                f"found {type(schedule).__name__} with {schedule.prediction}"
            )

    def __call__(self, rows: Rows) -> Tensor:
        """Error of each row (N,), float32."""
        return torch.stack([TERMS[term](rows) for term in self.terms]).sum(0)
