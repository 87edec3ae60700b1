"""From noise to data, by diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.noise import KeyedNoise
from lightning_diffclf.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""What ``schedule.network_input`` makes of noisy inputs (B, C, H, W), and a time value, as ``schedule.network_time``
gives it (), to outputs (B, C, H, W)."""


def initial_noise(shape: Sequence[int], ids: Sequence[int | str], seed: int = 0) -> Tensor:
    """Noise (B, C, H, W), float32, of which each image's (C, H, W) depends on its id and the seed only.

    Args:
        shape: (C, H, W).
        ids: An id of each image (B,).
        seed: Key of the noise.
    """
    noise, keyed = np.empty((len(ids), *shape), dtype=np.float32), KeyedNoise(seed)
    for out, image_id in zip(noise, ids, strict=True):
        keyed.fill(out, keyed.key(image_id), 0)
    return torch.from_numpy(noise)


def denoise(predict: Predict, schedule: NoiseSchedule, noise: Tensor, steps: int = 50, clip: bool = False) -> Tensor:
    """Images or latents (B, C, H, W): by DDIM (Song et al. 2021), or Euler's method along the path of a flow or of EDM.

    Args:
        predict: The network, float32 to float32.
        schedule: What its output means: a discrete schedule, a flow that predicts velocities, or EDM's preconditioning.
        noise: Where to begin (B, C, H, W), float32.
        steps: Calls of ``predict``.
        clip: Clip what DDIM takes for the image to [-1, 1] at each step: for pixels.

    Raises:
        ValueError: if ``steps`` is out of range, or the schedule is none of those.
    """
    if not 1 <= steps <= 1000:
        raise UserError(f"steps: {steps}, expected 1 … 1000")
    if isinstance(schedule, FlowSchedule) and schedule.prediction == "velocity":
        return _by_flow(predict, schedule, noise, steps)
    if isinstance(schedule, DiscreteSchedule):
        return _by_ddim(predict, schedule, noise, steps, clip)
    if isinstance(schedule, EDMSchedule) and schedule.prediction == "edm":
        return _by_edm(predict, schedule, noise, steps)
    found = f"a {type(schedule).__name__} that predicts {schedule.prediction!r}"
    raise UserError(f"sampling from {found}, expected a discrete schedule, a flow with 'velocity', or one with 'edm'")


def _by_ddim(predict: Predict, schedule: DiscreteSchedule, x_t: Tensor, steps: int, clip: bool) -> Tensor:
    from diffusers import DDIMScheduler  # slow to import

    scheduler = DDIMScheduler(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=schedule.betas.float().numpy(),
        clip_sample=clip,
        prediction_type=schedule.prediction,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    for time in scheduler.timesteps:
        x_t = scheduler.step(predict(x_t, schedule.network_time(time)), time, x_t).prev_sample
    return x_t


def _by_flow(predict: Predict, schedule: FlowSchedule, x_t: Tensor, steps: int) -> Tensor:
    from diffusers import FlowMatchEulerDiscreteScheduler  # slow to import

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())  # and 0 at the end
    for sigma, time in zip(scheduler.sigmas, scheduler.timesteps, strict=False):
        # The scheduler's velocity is along sigma, which falls with time where noise is at 0.
        t, sign = (sigma, 1) if schedule.noise_at else (1 - sigma, -1)
        x_t = scheduler.step(sign * predict(x_t, schedule.network_time(t)), time, x_t).prev_sample
    return x_t


def _by_edm(predict: Predict, schedule: EDMSchedule, noise: Tensor, steps: int) -> Tensor:
    from diffusers import EDMEulerScheduler  # slow to import

    scheduler = EDMEulerScheduler(schedule.sigma_min, schedule.sigma_max, schedule.sigma_data, rho=schedule.rho)
    scheduler.set_timesteps(steps)  # its times are ln(sigma) / 4 already, as the network's are
    x_t = noise * schedule.sigma_max
    for time in scheduler.timesteps:
        x_t = scheduler.step(predict(scheduler.scale_model_input(x_t, time), time), time, x_t).prev_sample
    return x_t
