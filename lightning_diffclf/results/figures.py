"""Pictures of an evaluation, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
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
    _save(figure, path)


def save_confusion_matrix(counts_CC: Tensor, names: Sequence[str], path: Path) -> None:
    """Confusion matrix with a row for each true class, coloured by the share of the row; numbers up to 30 classes."""
    counts = counts_CC.cpu().numpy()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(3 + 0.35 * len(names), 14)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=ax, label="share of the true class")
    accuracy = counts.trace() / max(counts.sum(), 1)
    ax.set(xlabel="predicted", ylabel="true", title=f"{counts.sum()} images, accuracy {accuracy:.1%}")
    if len(names) <= 30:
        ax.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 2 else 0)
        ax.set_yticks(range(len(names)), names)
        for row, column in zip(*counts.nonzero(), strict=True):
            color = "white" if share[row, column] > 0.5 else "black"
            ax.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)


def save_timestep_accuracy(timesteps: Tensor, accuracy: Tensor, chance: float, overall: float, path: Path) -> None:
    """Accuracy of each draw alone against its timestep.

    Args:
        timesteps: (S,), any order.
        accuracy: (S,), 0 … 1.
        chance: Accuracy of guessing, 0 … 1.
        overall: Accuracy of all draws together, 0 … 1.
        path: PNG file to write.
    """
    order = timesteps.argsort()
    figure = Figure(figsize=(7, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(timesteps[order].cpu(), accuracy[order].cpu(), marker=".", linewidth=1, label="one draw at this timestep")
    ax.axhline(overall, color="tab:green", linestyle="--", label=f"all {len(timesteps)} draws: {overall:.1%}")
    ax.axhline(chance, color="tab:gray", linestyle=":", label=f"chance: {chance:.1%}")
    ax.set(xlabel="timestep", ylabel="accuracy", ylim=(0, 1.03))
    ax.legend(loc="lower center")
    ax.grid(alpha=0.3)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path, "picture") as temporary:
        figure.savefig(temporary, dpi=150, format="png")
