"""Folders of small photos, one folder for each class, and a small autoencoder: what tests of data sets need."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image


def photos(root: Path, classes=("cat", "dog", "owl"), each=7, size=(12, 10)) -> list[tuple[Path, int]]:
    """Write random images of (width, height) = ``size``; returns path and label of each, in order."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return [(path, label) for label, name in enumerate(sorted(classes)) for path in sorted((root / name).glob("*.png"))]


def autoencoder(folder: Path) -> AutoencoderKL:
    """Write a small random autoencoder: 4 channels, 8 pixels for one value of a latent."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    vae.save_pretrained(folder)
    return vae.eval()
