"""What a training goes by: noise schedules by name, random numbers by key, the learning rate by step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

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


def optimization(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any], steps: Callable[[], float]) -> Any:
    """AdamW and its learning rate by step, as Lightning takes them.

    Args:
        parameters: What is trained.
        settings: ``lr``, ``betas``, ``weight_decay``, ``warmup_steps`` and ``decay``.
        steps: Says how many optimizer steps there will be; asked only where the rate decays.

    Raises:
        ValueError: if the rate decays, but training has no end.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["lr"], betas=tuple(settings["betas"]), weight_decay=settings["weight_decay"]
    )
    decay = settings["decay"]
    total = steps() if decay != "none" else math.inf
    if decay != "none" and not math.isfinite(total):
        raise UserError(f"decay: {decay!r} needs an end, set trainer.max_steps")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings["warmup_steps"], total, decay)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
