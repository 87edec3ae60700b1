"""Where in an image candidates are wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier import DiffusionClassifier
from lightning_diffclf.classifier.score import Predictions
from lightning_diffclf.denoiser import evaluating
from lightning_diffclf.noise import KeyedNoise


@torch.no_grad()
def error_map(
    classifier: DiffusionClassifier, image: Tensor, image_id: int | str, candidates: Sequence[int], draws: int = 16
) -> Tensor:
    """Where in the image candidates are wrong: squared error of the noise at each position.

    Args:
        classifier: What classified it.
        image: (C, H, W), as ``denoiser.encode`` takes it in a batch.
        image_id: Its id.
        candidates: Indices of K candidates.
        draws: So many of its draws are averaged, which are the first ones that classification spends.

    Returns:
        (K, h, w) float32 on the CPU, the mean over draws and the channels of x0.
    """
    schedule, noise = classifier.denoiser.schedule, classifier.draws.noise
    timesteps_R = classifier.timesteps_S[:draws]
    with evaluating(classifier.denoiser):
        x0 = classifier.denoiser.encode(image[None]).float()
        if noise is None:
            keyed = KeyedNoise(classifier.draws.seed)
            noise_RD = np.empty((len(timesteps_R), x0.numel()), dtype=np.float32)
            for draw, out_D in enumerate(noise_RD):
                classifier.draws.fill(keyed, out_D, keyed.key(image_id), draw)
            noise = torch.from_numpy(noise_RD).view(-1, *x0.shape[1:])
        shape = len(timesteps_R), len(candidates)
        draw_N = torch.arange(shape[0]).repeat_interleave(shape[1])
        candidate_N = torch.as_tensor(candidates).repeat(shape[0]).to(x0.device)
        maps = []
        for rows in torch.arange(len(draw_N)).split(classifier.microbatch):
            t, noise_N = timesteps_R[draw_N[rows]].to(x0.device), noise[draw_N[rows]].to(x0.device)
            x0_N = x0.expand(len(rows), *x0.shape[1:])
            x_t = schedule.add_noise(x0_N, noise_N, t)
            output = classifier.predict(*schedule.network_rows(x_t, t), candidate_N[rows.to(x0.device)])
            epsilon = Predictions(schedule, output, x0_N, x_t, t, noise_N).epsilon
            maps.append((epsilon - noise_N).square().mean(1).cpu())
    return torch.cat(maps).unflatten(0, shape).mean(0)
