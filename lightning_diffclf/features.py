"""What a layer inside a denoiser makes of an image: features for classifiers that are fitted or trained on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffclf.errors import UserError


def layer_named(network: Any, name: str | None) -> tuple[str, nn.Module]:
    """A part of a network by its name, as ``named_modules()`` has it; the middle of it if omitted.

    The middle is the part ``mid_block`` of a UNet, else the middle one of the longest list of blocks.

    Returns:
        Its name, and the part.

    Raises:
        ValueError: if there is no such part.
    """
    parts = dict(network.named_modules()) if isinstance(network, nn.Module) else {}
    if name is None and "mid_block" in parts:
        name = "mid_block"
    if name is None:
        blocks = [(len(part), at) for at, part in parts.items() if isinstance(part, nn.ModuleList) and len(part)]
        if not blocks:
            raise UserError(f"layer: {type(network).__name__} has no list of blocks, expected the name of a layer")
        most = max(count for count, _ in blocks)
        name = next(f"{at}.{count // 2}" for count, at in blocks if count == most)
    if name not in parts:
        raise UserError(f"layer: no layer {name!r} in {type(network).__name__}, which has {[*parts][1:8]} …")
    return name, parts[name]


def timestep_at(schedule: Any, share: float) -> float:
    """The timestep of a schedule that has this share of the time axis before it, from the image to the noise.

    Example:
        >>> from lightning_diffclf.schedule import NoiseSchedule
        >>> timestep_at(NoiseSchedule.linear(), 0.1)
        100.0
    """
    grid = schedule.timesteps(schedule.num_timesteps or 1000)
    grid = grid[schedule.log_snr(grid).argsort(descending=True)]
    return float(grid[int(share * len(grid))])


def layer_output(denoiser: Any, layer: tuple[str, nn.Module], x0: Tensor, timestep: float) -> Tensor:
    """What a layer makes of clean inputs, scaled as at a timestep but without noise: they depend on the image alone.

    Args:
        denoiser: A :class:`~lightning_diffclf.denoiser.ConditionalDenoiser`; it is told its first candidate.
        layer: A part of its network, as :func:`layer_named` has it.
        x0: What ``denoiser.encode`` gives (B, C, h, w), float32.
        timestep: Timestep of its schedule.

    Returns:
        Of each input a row (B, …), of the network's dtype.

    Raises:
        ValueError: if what the layer gives is no tensor with a row for each image.
    """
    schedule = denoiser.schedule
    t = torch.full((len(x0),), timestep, device=x0.device).to(schedule.timesteps(1).dtype)
    x_t = schedule.add_noise(x0, torch.zeros_like(x0), t)
    found: list[Any] = []
    name, part = layer
    hook = part.register_forward_hook(lambda layer, inputs, output: found.append(output))
    try:
        first = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)  # one condition for all
        denoiser.predict(*schedule.network_rows(x_t, t), first)
    finally:
        hook.remove()
    if not found or not isinstance(found[0], Tensor) or found[0].ndim < 2 or len(found[0]) != len(x0):
        shape = tuple(getattr(found[0], "shape", ())) or type(found[0]).__name__ if found else "nothing"
        raise UserError(
            f"layer: {name!r} gives {shape} for {len(x0)} images, expected a row for each; name another layer"
        )
    return found[0]
