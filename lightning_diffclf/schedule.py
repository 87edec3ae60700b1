"""Noise schedules: what a timestep means, and how any network output becomes a noise prediction.

One rule serves every model family: ``x_t = alpha(t) * x0 + sigma(t) * noise``. They differ in alpha and sigma, in the
time value the network is given and in what it predicts. The classifier only ever asks for ``to_epsilon``.

Shape suffixes: N rows of a batch, T timesteps of a discrete schedule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError, WrongType

Prediction = Literal["epsilon", "sample", "v_prediction", "velocity", "edm"]

PREDICTIONS: tuple[str, ...] = get_args(Prediction)


def expand_to(values_N: Tensor, like: Tensor) -> Tensor:
    """Append axes of length one to ``values_N`` (N,) until it broadcasts against ``like`` (N, ...)."""
    return values_N.reshape(-1, *[1] * (like.ndim - 1)).to(like.device)


class NoiseSchedule(ABC):
    """Signal and noise level of each timestep, and the meaning of the network's output.

    Make one with :meth:`linear` (DDPM, DiT), :meth:`scaled_linear` (Stable Diffusion 1 and 2), :meth:`cosine`,
    :meth:`rectified_flow` (SD3, FLUX, SiT), :meth:`edm` or :meth:`from_diffusers`.

    Attributes:
        prediction: What the network predicts. ``epsilon``: the noise. ``sample``: x0. ``v_prediction``:
            ``alpha * noise - sigma * x0`` (Salimans & Ho 2022). ``velocity``: ``d x_t / d t`` of a rectified flow.
            ``edm``: the raw network F of Karras et al. 2022, before its preconditioning.
        num_timesteps: Number of distinct timesteps (0 … T-1), or None where time is continuous.

    Example:
        >>> schedule = NoiseSchedule.linear()
        >>> t = torch.tensor([0, 500, 999])
        >>> [round(v, 4) for v in schedule.alpha(t).tolist()]
        [0.9999, 0.2789, 0.0064]
        >>> x0, noise = torch.zeros(3, 1, 2, 2), torch.ones(3, 1, 2, 2)
        >>> schedule.add_noise(x0, noise, t).shape
        torch.Size([3, 1, 2, 2])
    """

    num_timesteps: int | None = None

    def __init__(self, prediction: Prediction, allowed: tuple[str, ...]) -> None:
        if prediction not in allowed:
            raise UserError(f"{type(self).__name__}: prediction is {prediction!r}, expected one of {list(allowed)}")
        self.prediction = prediction

    # --- the published schedules -----------------------------------------------------------------------------------

    @staticmethod
    def linear(
        num_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: Prediction = "epsilon",
    ) -> DiscreteSchedule:
        """Betas linear in the timestep: DDPM (Ho et al. 2020, section 4) and DiT."""
        betas = torch.linspace(beta_start, beta_end, max(0, num_timesteps), dtype=torch.float64)
        return DiscreteSchedule(torch.cumprod(1 - betas, 0), prediction)

    @staticmethod
    def scaled_linear(
        num_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction: Prediction = "epsilon",
    ) -> DiscreteSchedule:
        """Square roots of the betas linear in the timestep: Stable Diffusion 1 and 2 (Rombach et al. 2022)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, max(0, num_timesteps), dtype=torch.float64) ** 2
        return DiscreteSchedule(torch.cumprod(1 - betas, 0), prediction)

    @staticmethod
    def cosine(num_timesteps: int = 1000, prediction: Prediction = "epsilon") -> DiscreteSchedule:
        """Squared cosine with offset 0.008, betas at most 0.999 (Nichol & Dhariwal 2021, equation 17)."""
        u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        return DiscreteSchedule(torch.cumprod(1 - betas, 0), prediction)

    @staticmethod
    def rectified_flow(
        noise_at: Literal[0, 1] = 1,
        time_scale: float = 1.0,
        prediction: Prediction = "velocity",
    ) -> FlowSchedule:
        """Straight line between data and noise, time in [0, 1].

        Args:
            noise_at: The time at which x_t is pure noise: 1 for SD3 and FLUX (alpha = 1-t, sigma = t, velocity
                noise - x0), 0 for SiT (alpha = t, sigma = 1-t, velocity x0 - noise).
            time_scale: The network is given ``time_scale * t`` (1000 for SD3).
            prediction: Usually ``velocity``.
        """
        return FlowSchedule(noise_at, time_scale, prediction)

    @staticmethod
    def edm(
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        prediction: Prediction = "edm",
    ) -> EDMSchedule:
        """Karras et al. 2022: alpha = 1 and the timestep *is* sigma, spaced evenly in ``sigma ** (1/rho)``.

        Args:
            sigma_min: Lowest noise level.
            sigma_max: Highest noise level.
            rho: Warping of the grid (their equation 5).
            sigma_data: Standard deviation of the data.
            prediction: ``edm`` for the raw network F: it is given ``c_in * x_t`` and ``ln(sigma) / 4``. ``sample`` for
                a network D that preconditions itself: it is given x_t and sigma.
        """
        return EDMSchedule(sigma_min, sigma_max, rho, sigma_data, prediction)

    @staticmethod
    def from_diffusers(scheduler: Any) -> NoiseSchedule:
        """Read the schedule out of a diffusers scheduler object (any subclass of its ``SchedulerMixin``).

        Sampling options (spacing, shift, Karras sigmas) do not matter here and are ignored: the classifier spaces its
        own timesteps evenly over the times the network was trained on.

        Raises:
            TypeError: if ``scheduler`` has no diffusers config.
            ValueError: if its noise levels or its prediction type are none that we know.
        """
        config, name = getattr(scheduler, "config", None), type(scheduler).__name__
        if config is None or not hasattr(config, "get"):
            raise WrongType(f"from_diffusers: expected a diffusers scheduler, found {name}")
        if name.startswith("EDM"):
            if config.get("prediction_type") != "epsilon":
                raise UserError(f"{name}: prediction_type {config.get('prediction_type')!r}, expected 'epsilon'")
            return EDMSchedule(config["sigma_min"], config["sigma_max"], config["rho"], config["sigma_data"], "edm")
        if name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction":
            return FlowSchedule(1, float(config["num_train_timesteps"]), "velocity")
        if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
            raise UserError(f"{name}: timestep_type 'continuous' gives the network ln(sigma) / 4, expected 'discrete'")
        if hasattr(scheduler, "alphas_cumprod"):
            return DiscreteSchedule(scheduler.alphas_cumprod.double(), config.get("prediction_type", "epsilon"))
        raise UserError(
            f"from_diffusers: {name} has no alphas_cumprod and is neither a flow-matching nor an EDM scheduler"
        )

    # --- what differs between families -----------------------------------------------------------------------------

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level of each timestep: float32, the shape of ``t``."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level of each timestep: float32, the shape of ``t``."""

    @abstractmethod
    def timesteps(self, count: int) -> Tensor:
        """``count`` timesteps in the middles of equal parts of the time axis, from little noise to much.

        Returns:
            (count,), on the CPU: int64 where time is discrete, else float32, as not every device has float64.

        Raises:
            ValueError: if ``count`` is below 1 or above the number of distinct timesteps.
        """

    @abstractmethod
    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` random timesteps (count,) as the network is trained on them, on the generator's device."""

    def identity(self) -> dict[str, Any]:
        """What results depend on: the attributes that were given."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def network_time(self, t: Tensor) -> Tensor:
        """The time value that the network wants for timestep ``t`` (N,)."""
        return t

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network wants to see of ``x_t`` (N, C, h, w): itself, except under EDM preconditioning."""
        return x_t

    # --- what does not ---------------------------------------------------------------------------------------------

    def network_rows(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What a network is given for ``x_t`` (N, C, h, w) at timestep ``t`` (N,): input and time, int64 or float32."""
        time = self.network_time(t)
        return self.network_input(x_t, t), time.float() if time.is_floating_point() else time

    def log_snr(self, t: Tensor) -> Tensor:
        """Logarithm of the signal-to-noise ratio, ``2 ln(alpha / sigma)``, the shape of ``t``."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noisy input ``alpha(t) * x0 + sigma(t) * noise``; x0 and noise (N, ...), t (N,)."""
        return expand_to(self.alpha(t), x0) * x0 + expand_to(self.sigma(t), x0) * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network would output for ``add_noise(x0, noise, t)``: the inverse of :meth:`to_epsilon`."""
        alpha, sigma = expand_to(self.alpha(t), x0), expand_to(self.sigma(t), x0)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "v_prediction":
            return alpha * noise - sigma * x0
        return self._target(x0, noise, alpha, sigma)

    def to_epsilon(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Noise prediction implied by a network output.

        Args:
            output: (N, C, ...) or, from a network that also predicts a variance, (N, 2C, ...).
            x_t: Noisy input (N, C, ...), before :meth:`network_input`.
            t: Timesteps (N,).

        Returns:
            Predicted noise (N, C, ...) in the dtype that ``output`` and ``x_t`` promote to.
        """
        output = output[:, : x_t.shape[1]]
        if self.prediction == "epsilon":
            return output
        alpha, sigma = expand_to(self.alpha(t), x_t), expand_to(self.sigma(t), x_t)
        if self.prediction == "sample":
            return (x_t - alpha * output) / sigma
        if self.prediction == "v_prediction":  # the denominator is 1 where variance is preserved
            return (sigma * x_t + alpha * output) / (alpha**2 + sigma**2)
        return self._to_epsilon(output, x_t, alpha, sigma)

    def _target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} accepted prediction {self.prediction!r} without defining it")

    def _to_epsilon(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} accepted prediction {self.prediction!r} without defining it")


class DiscreteSchedule(NoiseSchedule):
    """Variance-preserving schedule over the integer timesteps 0 … T-1, given by its cumulative products.

    Args:
        alphas_cumprod: (T,) in (0, 1), falling; ``alpha = sqrt(alphas_cumprod)``, ``sigma = sqrt(1 - alphas_cumprod)``.
        prediction: ``epsilon``, ``sample`` or ``v_prediction``.

    Attributes:
        alphas_cumprod: (T,) float64, on the CPU.
    """

    num_timesteps: int

    def __init__(self, alphas_cumprod: Tensor, prediction: Prediction = "epsilon") -> None:
        super().__init__(prediction, ("epsilon", "sample", "v_prediction"))
        if alphas_cumprod.ndim != 1 or len(alphas_cumprod) == 0:
            raise UserError(f"alphas_cumprod: shape {tuple(alphas_cumprod.shape)}, expected (T,)")
        if not bool(((alphas_cumprod >= 0) & (alphas_cumprod <= 1)).all()) or bool((alphas_cumprod.diff() > 0).any()):
            raise UserError("alphas_cumprod: expected values in [0, 1] that never rise")
        self.alphas_cumprod = alphas_cumprod.double().cpu()
        self.num_timesteps = len(alphas_cumprod)
        self._levels: dict[torch.device, tuple[Tensor, Tensor]] = {}  # (alpha_T, sigma_T) per device: no copy per call

    @property
    def betas(self) -> Tensor:
        """(T,) float64: ``alphas_cumprod`` is the cumulative product of 1 - beta."""
        return 1 - self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])

    def identity(self) -> dict[str, Any]:
        # In float32, which is what is used: the last bits of float64 differ between machines.
        return super().identity() | {"alphas_cumprod": self.alphas_cumprod.float()}

    def _tables(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if t.dtype.is_floating_point or t.dtype == torch.bool:
            raise WrongType(f"t: dtype {t.dtype}, expected integers in 0 … {self.num_timesteps - 1}")
        if t.device not in self._levels:
            levels = self.alphas_cumprod.sqrt().float(), (1 - self.alphas_cumprod).sqrt().float()
            self._levels[t.device] = levels[0].to(t.device), levels[1].to(t.device)
        return self._levels[t.device]

    def alpha(self, t: Tensor) -> Tensor:
        return self._tables(t)[0][t]

    def sigma(self, t: Tensor) -> Tensor:
        return self._tables(t)[1][t]

    def timesteps(self, count: int) -> Tensor:
        if not 1 <= count <= self.num_timesteps:
            raise UserError(f"{count} draws: the schedule allows 1 … {self.num_timesteps} distinct timesteps")
        return (2 * torch.arange(count) + 1) * self.num_timesteps // (2 * count)

    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.num_timesteps, (count,), generator=generator, device=generator.device)


class FlowSchedule(NoiseSchedule):
    """Rectified flow; see :meth:`NoiseSchedule.rectified_flow`."""

    def __init__(
        self, noise_at: Literal[0, 1] = 1, time_scale: float = 1.0, prediction: Prediction = "velocity"
    ) -> None:
        super().__init__(prediction, ("velocity", "epsilon", "sample"))
        if noise_at not in (0, 1):
            raise UserError(f"noise_at: {noise_at!r}, expected 0 or 1")
        if time_scale <= 0:
            raise UserError(f"time_scale: {time_scale}, expected a positive number")
        self.noise_at, self.time_scale = noise_at, time_scale

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t if self.noise_at else t).float()

    def sigma(self, t: Tensor) -> Tensor:
        return (t if self.noise_at else 1 - t).float()

    def timesteps(self, count: int) -> Tensor:
        sigma = _midpoints(count)
        return (sigma if self.noise_at else 1 - sigma).float()

    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, generator=generator, device=generator.device)

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.time_scale

    def _target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return noise - x0 if self.noise_at else x0 - noise

    def _to_epsilon(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x_t + alpha * output if self.noise_at else x_t - alpha * output


class EDMSchedule(NoiseSchedule):
    """Karras et al. 2022; see :meth:`NoiseSchedule.edm`. Equation numbers are theirs."""

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        prediction: Prediction = "edm",
    ) -> None:
        super().__init__(prediction, ("edm", "sample"))
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"sigma_min {sigma_min}, sigma_max {sigma_max}: expected 0 < sigma_min < sigma_max")
        if rho <= 0 or sigma_data <= 0:
            raise UserError(f"rho {rho}, sigma_data {sigma_data}: expected positive numbers")
        self.sigma_min, self.sigma_max, self.rho, self.sigma_data = sigma_min, sigma_max, rho, sigma_data

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    def sigma(self, t: Tensor) -> Tensor:
        return t.float()

    def timesteps(self, count: int) -> Tensor:  # equation 5, at the middles of equal parts
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((low + _midpoints(count) * (high - low)) ** self.rho).float()

    def random_timesteps(self, count: int, generator: torch.Generator) -> Tensor:  # table 1: ln sigma ~ N(-1.2, 1.2²)
        return torch.exp(1.2 * torch.randn(count, generator=generator, device=generator.device) - 1.2)

    def network_time(self, t: Tensor) -> Tensor:
        return t.log() / 4 if self.prediction == "edm" else t

    def network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.prediction != "edm":
            return x_t
        return x_t * expand_to((self.sigma(t) ** 2 + self.sigma_data**2).rsqrt(), x_t)

    def _skip_out(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, sigma * self.sigma_data * total.rsqrt()

    def _target(self, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:  # equation 8
        c_skip, c_out = self._skip_out(sigma)
        return (x0 - c_skip * (x0 + sigma * noise)) / c_out

    def _to_epsilon(self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        c_skip, c_out = self._skip_out(sigma)  # equation 7: D = c_skip x + c_out F; epsilon = (x - D) / sigma
        return ((1 - c_skip) * x_t - c_out * output) / sigma


def _midpoints(count: int) -> Tensor:
    if count < 1:
        raise UserError(f"{count} draws: expected at least 1")
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count
