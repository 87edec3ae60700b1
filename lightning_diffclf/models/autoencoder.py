"""The frozen autoencoder between pixels and the latents that a diffusion model works on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.hub import AUTOENCODER, local_file
from lightning_diffclf.identity import digest_of_weights
from lightning_diffclf.models.ldm_autoencoder import ldm_autoencoder
from lightning_diffclf.models.weight_files import read_file


@dataclass(frozen=True)
class LatentScale:
    """How a network was trained to see an autoencoder's latents, where the autoencoder does not say it.

    Attributes:
        mean: Of each channel (C,), float32: is taken off.
        scaling: Of each channel (C,), float32: multiplies what is left.
        zero_to_one: Whether the autoencoder is given pixels in [0, 1], as EDM2 has it, in place of [-1, 1].
    """

    mean: Tensor
    scaling: Tensor
    zero_to_one: bool = False


class Autoencoder:
    """An ``AutoencoderKL`` of diffusers, frozen; images and latents are float32 whatever its own dtype, float64 apart.

    Args:
        vae: The network; see :meth:`load`.
        scale: How its latents are seen; as its configuration says if omitted.

    Attributes:
        vae: The network.
        scale: As given; it takes the place of ``scaling`` and ``shift``.
        channels: Channels of a latent.
        factor: Pixels for one value of a latent, along each side.
        scaling: Diffusion models see ``(latent - shift) * scaling``.
        shift: See ``scaling``; 0 for all but Stable Diffusion 3 and FLUX.

    Raises:
        ValueError: if ``scale`` is of another number of channels.
    """

    def __init__(self, vae: Any, scale: LatentScale | None = None) -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)
        self.scale = scale
        if scale is not None and not scale.mean.shape == scale.scaling.shape == (self.channels,):
            raise UserError(f"latents: statistics of {scale.mean.numel()} channels, expected {self.channels}")

    @classmethod
    def load(
        cls, name: str = AUTOENCODER, dtype: torch.dtype = torch.float32, scale: LatentScale | None = None
    ) -> Autoencoder:
        """Load it from a folder, the folder of a whole pipeline, a repository on the Hub, or a file.

        A file (of the Hub: ``hf://OWNER/REPOSITORY/FILE``) is in the layout of
        :mod:`~lightning_diffclf.models.ldm_autoencoder`.

        Raises:
            ValueError: if it is not there or cannot be read; says what to do.
        """
        from diffusers import AutoencoderKL  # slow to import

        if (file := local_file(name)).is_file():
            found = read_file(file)
            weights = found["state_dict"] if isinstance(found.get("state_dict"), dict) else found
            return cls(ldm_autoencoder(weights, name).to(dtype), scale)
        subfolder = "vae" if (Path(name) / "vae" / "config.json").is_file() else None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # older versions know no other
                vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder, torch_dtype=dtype)
        except (OSError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if Path(name).exists():
                raise UserError(f"vae: {name!r} cannot be loaded ({reason})") from error
            raise UserError(
                f"vae: no folder {name!r}, and the Hub did not give it ({reason}). Check the name; or, without "
                f"a network, give a folder with a downloaded one (that of the published DiT networks is {AUTOENCODER})"
            ) from error
        return cls(vae, scale)

    @cached_property
    def fingerprint(self) -> str:
        """A short name of the weights."""
        return digest_of_weights(self.vae)

    def identity(self) -> dict[str, Any]:
        """What latents depend on."""
        own = {"network": self.vae, "scaling": self.scaling, "shift": self.shift}
        return own if self.scale is None else own | {"scale": self.scale}

    def to(self, device: torch.device | str) -> Autoencoder:
        """Move the network; returns itself."""
        if self.vae.device != torch.device(device):
            self.vae.to(device)
        return self

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior of images (B, 3, H, W) in [-1, 1]: (B, C, h, w) each, unscaled.

        Differentiable by the images, where these ask for gradients.

        Raises:
            ValueError: if the images are not RGB, or their sides are no multiples of :attr:`factor`.
        """
        if images.shape[1] != 3 or images.shape[2] % self.factor or images.shape[3] % self.factor:
            raise UserError(
                f"images: shape {tuple(images.shape)}, expected (B, 3, H, W), sides multiples of {self.factor}"
            )
        pixels = (images + 1) / 2 if self.scale is not None and self.scale.zero_to_one else images
        posterior = self.vae.encode(pixels.to(self.vae.dtype)).latent_dist
        kind = torch.promote_types(self.vae.dtype, torch.float32)
        return posterior.mean.to(kind), posterior.std.to(kind)

    def to_latents(self, values: Tensor) -> Tensor:
        """Means or samples of the posterior as diffusion models see them."""
        shift, scaling = self._scale(values.device)
        return (values - shift) * scaling

    def _scale(self, device: torch.device) -> tuple[float | Tensor, float | Tensor]:
        """Shift and scaling: numbers, or one of each channel (C, 1, 1)."""
        if self.scale is None:
            return self.shift, self.scaling
        return self.scale.mean.to(device)[:, None, None], self.scale.scaling.to(device)[:, None, None]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as diffusion models see them, to images (B, 3, H, W) in [-1, 1]."""
        shift, scaling = self._scale(latents.device)
        values = latents / scaling + shift
        images: Tensor = self.vae.decode(values.to(self.vae.dtype)).sample.float()
        return (images * 2 - 1 if self.scale is not None and self.scale.zero_to_one else images).clamp(-1, 1)
