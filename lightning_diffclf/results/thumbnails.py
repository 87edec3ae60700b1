"""Small pictures of images, kept with their decisions."""

from __future__ import annotations

import io

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 96  # pixels of the longer side at most: the gallery of a report shows no more


def thumbnail(image: Tensor) -> bytes | None:
    """``image`` (C, H, W) in [-1, 1] as WebP, made smaller if needed; None unless C is 1 or 3 (latents)."""
    if len(image) not in (1, 3):
        return None
    pixels = image.detach().float().cpu()[None]
    scale = SIDE / max(pixels.shape[2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in pixels.shape[2:]]
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
    bytes_HWC = ((pixels[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    # Tiny images are kept exactly: scans of 8 × 8 pixels must not be blurred by a codec.
    Image.fromarray(bytes_HWC[..., 0] if len(image) == 1 else bytes_HWC).save(
        file, "WEBP", quality=80, lossless=max(pixels.shape[2:]) <= 32
    )
    return file.getvalue()
