"""The frozen autoencoder between pixels and the latents that a diffusion model works on."""

from __future__ import annotations

import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.hub import AUTOENCODER
from lightning_diffclf.identity import digest_of_weights


class Autoencoder:
    """An ``AutoencoderKL`` of diffusers, frozen; images and latents are float32 whatever its own dtype.

    Args:
        vae: The network; see :meth:`load`.

    Attributes:
        vae: The network.
        channels: Channels of a latent.
        factor: Pixels for one value of a latent, along each side.
        scaling: Diffusion models see ``(latent - shift) * scaling``.
        shift: See ``scaling``; 0 for all but Stable Diffusion 3 and FLUX.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    @classmethod
    def load(cls, name: str = AUTOENCODER, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Load it from a folder, the folder of a whole pipeline, or a repository on the Hub.

        Raises:
            ValueError: if it is not there or cannot be read; says what to do.
        """
        from diffusers import AutoencoderKL  # slow to import

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
        return cls(vae)

    @cached_property
    def fingerprint(self) -> str:
        """A short name of the weights."""
        return digest_of_weights(self.vae)

    def identity(self) -> dict[str, Any]:
        """What latents depend on."""
        return {"network": self.vae, "scaling": self.scaling, "shift": self.shift}

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
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def to_latents(self, values: Tensor) -> Tensor:
        """Means or samples of the posterior as diffusion models see them."""
        return (values - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as diffusion models see them, to images (B, 3, H, W) in [-1, 1]."""
        values = latents / self.scaling + self.shift
        images: Tensor = self.vae.decode(values.to(self.vae.dtype)).sample
        return images.float().clamp(-1, 1)
