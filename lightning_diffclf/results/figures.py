"""Grids of images, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from lightning_diffclf.files import replacing


def save_image_grid(images: Tensor, names: Sequence[str], path: Path) -> None:
    """Images in a grid, one row for each name.

    Args:
        images: (len(names) * columns, C, H, W) in [-1, 1], row by row; C is 1 or 3.
        names: Titles of the rows.
        path: PNG file to write.
    """
    columns = len(images) // len(names)
    figure = Figure(figsize=(0.7 * columns + 0.6, 0.7 * len(names)), layout="constrained")
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    axes = figure.subplots(len(names), columns, squeeze=False)
    for row, name in enumerate(names):
        for column in range(columns):
            ax = axes[row, column]
            ax.imshow(pixels[row * columns + column], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    with replacing(path, "figure") as temporary:
        figure.savefig(temporary, dpi=150, format="png")
