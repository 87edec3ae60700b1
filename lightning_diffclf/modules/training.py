"""What a training goes by: noise schedules by name, random numbers by key, the learning rate by step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch

from lightning_diffclf.errors import UserError
from lightning_diffclf.schedule import NoiseSchedule


def schedule_named(name: str, prediction: Any = None) -> NoiseSchedule:
    """A noise schedule by its name, and what a network predicts on it: velocities of flows, else noise, if omitted.

    Raises:
        ValueError: if the name is unknown, or the prediction is not defined for it.
    """
    if name == "rectified_flow":  # the network embeds times of 0 … 1000, as in SD3
        return NoiseSchedule.rectified_flow(time_scale=1000.0, prediction=prediction or "velocity")
    if name == "sit":
        return NoiseSchedule.rectified_flow(noise_at=0, time_scale=1.0, prediction=prediction or "velocity")
    makers: dict[str, Callable[..., NoiseSchedule]] = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
    }
    if name not in makers:
        raise UserError(f"schedule: {name!r}, expected one of {[*makers, 'rectified_flow', 'sit']}")
    return makers[name](prediction=prediction or "epsilon")


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on ``device`` whose state depends on nothing but ``key``."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def learning_rate_factor(step: int, warmup_steps: int, total: float, decay: str) -> float:
    """Factor on the learning rate: rising over ``warmup_steps``, then constant or falling to zero at ``total``.

    Example:
        >>> [learning_rate_factor(step, 2, 6, "linear") for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "none":
        return 1.0
    share = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return 1 - share if decay == "linear" else (1 + math.cos(math.pi * share)) / 2
