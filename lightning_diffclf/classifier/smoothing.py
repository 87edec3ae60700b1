"""Certified radius by randomised smoothing: within it, no change of the image changes the smoothed answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from scipy.stats import beta
from torch import Tensor

from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.denoiser import ConditionalDenoiser, evaluating
from lightning_diffclf.errors import UserError, check_at_least

MOST_SIGMA = 2.0  # noise of which no image is left: another unit was meant


@dataclass(frozen=True)
class Certificate:
    """What is certain of a smoothed classifier's answer (Cohen et al. 2019).

    Attributes:
        prediction: The answer; None where the votes do not decide: then nothing is certain.
        radius: Euclidean distance, in units of images in [0, 1], within which no image has another answer; 0 without
            an answer.
        votes: How many of ``n`` noisy images had the answer.
    """

    prediction: int | None
    radius: float
    votes: int


def certify(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    sigma: float,
    *,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    image_id: int | str = 0,
    seed: int = 0,
    batch_size: int = 100,
) -> Certificate:
    """The radius σ Φ⁻¹(p) of an answer that at least a share p of noisy images get (Cohen et al. 2019, theorem 1).

    p is the Clopper-Pearson lower bound, which fails with a probability of at most ``alpha`` over the noise.

    Args:
        network: The base classifier: noisy images (B, C, H, W), of any values, to logits (B, K). Any function will do.
        image: (C, H, W) in [0, 1].
        sigma: Standard deviation of the noise, in units of images in [0, 1].
        n0: Noisy images that choose the answer.
        n: Others that count its votes.
        alpha: Probability that the certificate is wrong.
        image_id: Keys the noise, with ``seed``: a certificate depends on neither batch nor other images.
        seed: See ``image_id``.
        batch_size: Noisy images at once.

    Raises:
        ValueError: if a number is out of range.
    """
    check_smoothing(sigma, n0, n, alpha)
    check_at_least(1, batch_size=batch_size)
    keyed, votes = KeyedNoise(seed), list[int]()
    key = keyed.key(image_id)
    for first in range(0, n0 + n, batch_size):
        count = min(batch_size, n0 + n - first)
        noise = np.empty((count, *image.shape), dtype=np.float32)
        for i in range(count):
            keyed.fill(noise[i], key, first + i)
        with torch.no_grad():
            votes += network(image + sigma * torch.from_numpy(noise).to(image)).argmax(1).tolist()
    answer = int(np.bincount(votes[:n0]).argmax())
    hits = votes[n0:].count(answer)
    share = float(beta.ppf(alpha, hits, n - hits + 1)) if hits else 0.0
    if share <= 0.5:
        return Certificate(None, 0.0, hits)
    return Certificate(answer, sigma * float(ndtri(share)), hits)


def check_smoothing(sigma: float, n0: int, n: int, alpha: float) -> None:
    """Raise ValueError unless these numbers can certify something."""
    check_at_least(1, n0=n0, n=n)
    if not 0 < sigma <= MOST_SIGMA:
        raise UserError(
            f"sigma: {sigma}, expected a standard deviation above 0 and up to {MOST_SIGMA}, in units of images in "
            "[0, 1]; 0.25 is 64 grey levels, and one for images in [-1, 1] is to be halved"
        )
    if not 0 < alpha < 1:
        raise UserError(f"alpha: {alpha}, expected a probability above 0 and below 1")
    least = math.floor(math.log(alpha) / math.log(0.5)) + 1  # as all of them may have the answer
    if n < least:
        raise UserError(f"n: {n}, which certifies nothing with alpha {alpha:g}, expected at least {least}")


def largest_radius(sigma: float, n: int, alpha: float) -> float:
    """The radius where all of ``n`` noisy images have the answer."""
    return sigma * float(ndtri(alpha ** (1 / n)))


class Denoised:
    """A base classifier for smoothing: one step of the denoiser takes the noise away, then ``network`` answers.

    Denoised smoothing (Salman et al. 2020; with diffusion models Carlini et al. 2023). The denoised image is the mean
    of what the denoiser makes of the noisy one under each candidate.

    Args:
        denoiser: Works on pixels: its ``encode`` is the identity.
        network: Images (B, C, H, W) in [0, 1] to logits, such as :class:`~.logits.DiffusionLogits`.
        sigma: Standard deviation of the noise, in units of images in [0, 1].

    Raises:
        ValueError: from a call, if the denoiser works on latents.
    """

    def __init__(self, denoiser: ConditionalDenoiser, network: Callable[[Tensor], Tensor], sigma: float) -> None:
        self.denoiser, self.network = denoiser, network
        schedule = denoiser.schedule
        times = schedule.timesteps(schedule.num_timesteps or 1000)
        wanted = -2 * math.log(2 * sigma)  # log signal-to-noise ratio of images in [-1, 1]
        self.timestep = times[(schedule.log_snr(times) - wanted).abs().argmin()]

    def __call__(self, noisy: Tensor) -> Tensor:
        """Logits (B, K) of noisy images (B, C, H, W)."""
        return self.network(self.denoise(noisy))

    def denoise(self, noisy: Tensor) -> Tensor:
        """What is left of noisy images without the noise, in [0, 1]."""
        schedule, denoiser = self.denoiser.schedule, self.denoiser
        t = self.timestep.to(noisy.device).expand(len(noisy))
        alpha, sigma = (level(t).view(-1, 1, 1, 1) for level in (schedule.alpha, schedule.sigma))
        x_t, total = alpha * (2 * noisy - 1), torch.zeros_like(noisy)
        with evaluating(denoiser):
            x_in, time = schedule.network_rows(x_t, t)
            for k in range(len(denoiser.candidates)):
                output = denoiser.predict(x_in, time, torch.full((len(noisy),), k, device=noisy.device))
                if output.shape[2:] != noisy.shape[2:]:
                    raise UserError(
                        f"smoothing: the denoiser works on {tuple(output.shape[1:])}, images are "
                        f"{tuple(noisy.shape[1:])}; expected one on pixels, where the noise is"
                    )
                total = total + (x_t - sigma * schedule.to_epsilon(output.float(), x_t, t)) / alpha
        return (total / len(denoiser.candidates) / 2 + 0.5).clamp(0, 1)
