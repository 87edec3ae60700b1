"""Images made worse on purpose, in five severities: noise, blur, pixels, JPEG, brightness, contrast.

After ImageNet-C (Hendrycks & Dietterich 2019), by torchvision's transforms, and for images of any size. All but blur
have the severities of ImageNet-C; blur goes by the size of the image, since that of ImageNet-C would leave nothing of
small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_diffclf.errors import UserError
from lightning_diffclf.noise import KeyedNoise

SMALL = 32  # pixels: of the blur of larger images, the width grows with their shorter side


def _noise(image: Tensor, sigma: float, noise: Tensor) -> Tensor:
    return image + sigma * noise


def _blur(image: Tensor, sigma: float, noise: Tensor) -> Tensor:
    sigma *= max(1.0, min(image.shape[1:]) / SMALL)
    reach = min(int(np.ceil(3 * sigma)), min(image.shape[1:]) - 1)  # the border is a mirror, so no further
    return functional.gaussian_blur(image, [2 * reach + 1] * 2, [sigma] * 2)


def _pixelate(image: Tensor, share: float, noise: Tensor) -> Tensor:
    size = list(image.shape[1:])
    coarse = functional.resize(image, [max(1, round(share * side)) for side in size], antialias=True)
    return functional.resize(coarse, size, interpolation=functional.InterpolationMode.NEAREST)


def _jpeg(image: Tensor, quality: float, noise: Tensor) -> Tensor:
    pixels = (image * 255).round().to(torch.uint8).cpu()
    return functional.jpeg(pixels, int(quality)).to(image.device) / 255


def _brightness(image: Tensor, more: float, noise: Tensor) -> Tensor:
    return image + more


def _contrast(image: Tensor, factor: float, noise: Tensor) -> Tensor:
    mean = image.mean((1, 2), keepdim=True)
    return mean + factor * (image - mean)


KINDS: Mapping[str, tuple[Callable[[Tensor, float, Tensor], Tensor], tuple[float, ...]]] = {
    "gaussian_noise": (_noise, (0.08, 0.12, 0.18, 0.26, 0.38)),  # deviation; images in 0 … 1, here and below
    "gaussian_blur": (_blur, (0.4, 0.6, 0.8, 1.0, 1.2)),  # deviation in pixels
    "pixelate": (_pixelate, (0.6, 0.5, 0.4, 0.3, 0.25)),  # share of the resolution that is left
    "jpeg": (_jpeg, (25, 18, 15, 10, 7)),  # quality
    "brightness": (_brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),  # what is added
    "contrast": (_contrast, (0.4, 0.3, 0.2, 0.1, 0.05)),  # factor on what differs from the mean
}  # what is done, and how much of it at each severity


@dataclass(frozen=True)
class Corruption:
    """Makes the images of a batch worse; the same image always in the same way, whatever its batch.

    Args:
        kind: One of :data:`KINDS`.
        severity: 1 … 5.

    Raises:
        ValueError: if there is none of this kind, or severity.

    Example:
        >>> Corruption.parse("brightness/5")(torch.zeros(1, 3, 4, 4), ["a"]).unique()
        tensor([1.])
    """

    kind: str
    severity: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.severity not in range(1, 6):
            raise UserError(f"corruption: {self.kind}/{self.severity}, expected one of {', '.join(KINDS)}, and /1 … /5")

    @classmethod
    def parse(cls, text: str) -> Corruption:
        """Of ``KIND/SEVERITY``."""
        kind, _, severity = text.partition("/")
        return cls(kind, int(severity) if severity.isascii() and severity.isdecimal() else 0)

    def __call__(self, images: Tensor, ids: Sequence[int | str]) -> Tensor:
        """Images (B, C, H, W) in [-1, 1], of 1 or 3 channels, to as many of these.

        Args:
            images: The images.
            ids: Of each: what its noise is keyed by.

        Raises:
            ValueError: if the images are latents.
        """
        if images.shape[1] not in (1, 3) or float(images.abs().amax()) > 1.001:
            raise UserError(f"corruption: images of shape {tuple(images.shape)}, expected pixels in [-1, 1]")
        change, amounts = KINDS[self.kind]
        keyed, amount = KeyedNoise(), amounts[self.severity - 1]
        changed = []
        for image, image_id in zip(images.float(), ids, strict=True):
            noise = np.empty(tuple(image.shape), dtype=np.float32)
            if change is _noise:
                keyed.fill(noise, keyed.key(f"corruption/{image_id}"), 0)  # not the noise of its draws
            changed.append(change((image + 1) / 2, amount, torch.from_numpy(noise).to(image.device)))
        return torch.stack(changed).clamp(0, 1) * 2 - 1
