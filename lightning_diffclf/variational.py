"""Terms of the variational bound for a network that predicts the variance of the denoising step along with the noise.

Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models" (arXiv 2102.09672); equation numbers are
theirs. A term of the bound is what one denoising step costs, here in bits per value of x0.

Shape suffixes: N rows of a batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.schedule import DiscreteSchedule, expand_to

VLB_WEIGHT = 0.001  # of the bound, a sum over all timesteps, in the hybrid loss (equation 16)


class _Coefficients(NamedTuple):
    """What one denoising step needs to know of the schedule."""

    x0_from_xt: Tensor  # x0 = x0_from_xt * x_t - x0_from_eps * epsilon (equation 9, solved for x0)
    x0_from_eps: Tensor
    mean_from_x0: Tensor  # mean of q(x_{t-1} | x_t, x0) = mean_from_x0 * x0 + mean_from_xt * x_t (equation 11)
    mean_from_xt: Tensor
    log_beta_tilde: Tensor  # its variance (equation 10): the lower end of the learned range
    log_beta: Tensor  # the upper end


_TABLES: WeakKeyDictionary[DiscreteSchedule, dict[torch.device, Tensor]] = WeakKeyDictionary()  # no copy per call


def _coefficients(schedule: DiscreteSchedule, t: Tensor, like: Tensor) -> _Coefficients:
    """Coefficients at timesteps ``t`` (N,), float32, each of a shape (N, 1, ...) that broadcasts against ``like``."""
    tables = _TABLES.setdefault(schedule, {})
    if t.device not in tables:
        tables[t.device] = _table(schedule).float().to(t.device)
    return _Coefficients(*(expand_to(values_N, like) for values_N in tables[t.device][:, t]))


def _table(schedule: DiscreteSchedule) -> Tensor:
    """All coefficients at all timesteps (6, T), in float64 because ``1 - alphas_cumprod`` cancels at small t."""
    alphas_cumprod, beta = schedule.alphas_cumprod, schedule.betas
    previous = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    if len(beta) < 2 or not bool(((beta > 0) & (beta < 1)).all()):
        raise UserError("variational bound: expected 2 or more timesteps, alphas_cumprod falling at each and never 0")
    beta_tilde = beta * (1 - previous) / (1 - alphas_cumprod)
    beta_tilde[0] = beta_tilde[1]  # the first is 0, which has no logarithm
    return torch.stack(
        _Coefficients(
            x0_from_xt=alphas_cumprod.rsqrt(),
            x0_from_eps=(1 / alphas_cumprod - 1).sqrt(),
            mean_from_x0=previous.sqrt() * beta / (1 - alphas_cumprod),
            mean_from_xt=(1 - beta).sqrt() * (1 - previous) / (1 - alphas_cumprod),
            log_beta_tilde=beta_tilde.log(),
            log_beta=beta.log(),
        )
    )


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation (Page 1977) with which the published bits/dim are computed; off by at most 2e-4."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _discretised_log_likelihood(x0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability of the one of 256 levels in [-1, 1] that ``x0`` lies at (Ho et al. 2020, equation 13), nats."""
    inverse_std = torch.exp(-0.5 * log_variance)
    below = _normal_cdf((x0 - mean - 1 / 255) * inverse_std)
    above = _normal_cdf((x0 - mean + 1 / 255) * inverse_std)
    below = torch.where(x0 < -0.999, 0.0, below)  # the outermost levels own the tails
    above = torch.where(x0 > 0.999, 1.0, above)
    return (above - below).clamp(min=1e-12).log()  # 1e-12, as published: at most 39.9 bits/dim


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)


def bound_terms(
    schedule: DiscreteSchedule, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Terms of the variational bound at each timestep, computed in float32.

    The network's variance output v sets ``ln variance = (1+v)/2 * ln beta + (1-v)/2 * ln beta_tilde`` (equation 15 with
    (1+v)/2 for their v). The x0 that its epsilon implies is not clipped: latents have no fixed range.

    Args:
        schedule: Discrete schedule with epsilon prediction, at least 2 timesteps and no two equal noise levels.
        output: Network output (N, 2C, ...): epsilon, then v, about -1 … 1; any floating dtype.
        x0: Clean inputs (N, C, ...). The likelihood takes them for 256 levels in [-1, 1]; what lies beyond counts
            as the outermost level.
        x_t: Noisy inputs (N, C, ...).
        t: Timesteps (N,), int64 in 0 … T-1.

    Returns:
        kl: ``KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t))``, (N,) float32, bits/dim. At t = 0, where q has no width, it
            is taken with the variance of t = 1; the bound has the likelihood there instead.
        nll: ``-ln p(x0 | x_t)`` as if this were the last step, (N,) float32, bits/dim. The bound has it at t = 0 only.

    Raises:
        ValueError: if ``output`` has no variance or the schedule is none of those.
    """
    if not isinstance(schedule, DiscreteSchedule) or schedule.prediction != "epsilon":
        found = f"{type(schedule).__name__} with {getattr(schedule, 'prediction', None)}"
        raise UserError(f"variational bound: {found}, expected a discrete schedule with epsilon prediction")
    expected = (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])
    if output.shape != expected:
        raise UserError(f"variational bound: output {tuple(output.shape)}, expected {expected}: epsilon and variance")
    epsilon, v = output.float().chunk(2, dim=1)
    x0, x_t = x0.float(), x_t.float()
    c = _coefficients(schedule, t, x_t)

    x0_hat = c.x0_from_xt * x_t - c.x0_from_eps * epsilon
    log_variance = c.log_beta_tilde + (v + 1) / 2 * (c.log_beta - c.log_beta_tilde)
    log_ratio = log_variance - c.log_beta_tilde
    distance = c.mean_from_x0 * (x0 - x0_hat)  # between the means: both have the same share of x_t
    kl = 0.5 * (log_ratio - 1 + torch.exp(-log_ratio) + distance**2 * torch.exp(-log_variance))
    mean = c.mean_from_x0 * x0_hat + c.mean_from_xt * x_t
    return _bits_per_dim(kl), _bits_per_dim(-_discretised_log_likelihood(x0, mean, log_variance))


def hybrid_loss(
    schedule: DiscreteSchedule, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Training loss of a network that learns its variance (equation 16), computed in float32.

    Args:
        schedule: As for :func:`bound_terms`.
        output: Network output (N, 2C, ...).
        x0: Clean inputs (N, C, ...).
        x_t: Noisy inputs (N, C, ...).
        t: Timesteps (N,), int64 in 0 … T-1.
        noise: The noise in ``x_t`` (N, C, ...).

    Returns:
        loss: ``mse + 0.001 * T * vb``, (N,): with T = 1000 just the sum. T times the term of a random timestep stands
            for the whole bound.
        mse: Mean squared error of epsilon, (N,).
        vb: The timestep's term of the bound, (N,), bits/dim: the likelihood at t = 0, else the KL divergence. It trains
            the variance only; epsilon is detached.

    Raises:
        ValueError: as :func:`bound_terms`.
    """
    epsilon, v = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
    kl, nll = bound_terms(schedule, torch.cat([epsilon.detach(), v], dim=1), x0, x_t, t)
    vb = torch.where(t == 0, nll, kl)
    mse = (epsilon.float() - noise.float()).square().flatten(1).mean(1)
    return mse + VLB_WEIGHT * schedule.num_timesteps * vb, mse, vb
