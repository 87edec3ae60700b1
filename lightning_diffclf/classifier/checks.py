"""Refuses bad input before any network call, with one error that says what was found and what was expected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_diffclf.errors import UserError, WrongType


def check_images(images: Tensor, ids: Sequence[int | str]) -> None:
    """Raise TypeError or ValueError unless ``images`` is (B, C, H, W), floating, finite, with B ids."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = f"dtype {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise WrongType(f"images: {found}, expected a floating point tensor (B, C, H, W), pixels in [-1, 1]")
    if images.ndim != 4:
        raise UserError(f"images: shape {tuple(images.shape)}, expected (B, C, H, W)")
    if 0 in images.shape[1:]:
        raise UserError(f"images: shape {tuple(images.shape)}, expected at least one channel, row and column")
    if len(ids) != len(images):
        raise UserError(f"ids: {len(ids)} for {len(images)} images")
    for one in ids:
        if not isinstance(one, (int, str, np.integer)):
            raise WrongType(f"ids: {one!r}, expected an integer or a string for each image")
    finite_B = images.isfinite().flatten(1).all(1)
    if not bool(finite_B.all()):
        bad = [ids[i] for i in (~finite_B).nonzero().flatten().tolist()]
        raise UserError(
            f"images: NaN or infinity in image {bad[0]!r} and {len(bad) - 1} others, expected finite values"
        )


def resolve_ids(images: Tensor, ids: Iterable[int | str] | None, added: int) -> list[int | str]:
    """Ids of images that were checked with them; running numbers, from ``added`` on, where none are given."""
    numbers = range(added, added + len(images))
    found: list[int | str] = ids.tolist() if isinstance(ids, Tensor) else list(numbers if ids is None else ids)
    check_images(images, found)
    return found


def resolve_candidates(
    candidates: Sequence[Any] | None, num_images: int, known: int, name: str = "candidates"
) -> list[np.ndarray]:
    """Indices of the candidates in play, one int64 array for each image.

    Args:
        candidates: None (all that are known), one list of indices for all images, or one list for each image.
        num_images: Number of images.
        known: Number of candidates that the denoiser knows.
        name: What errors call them.

    Raises:
        ValueError: if a list is empty, has repeated or unknown indices, or there are not as many lists as images.
    """
    if candidates is None:
        return [np.arange(known)] * num_images
    if isinstance(candidates, Tensor):
        candidates = candidates.tolist()
    nested = len(candidates) > 0 and np.ndim(candidates[0]) > 0
    if nested and len(candidates) != num_images:
        raise UserError(f"{name}: {len(candidates)} lists for {num_images} images")
    lists = [np.asarray(c) for c in (candidates if nested else [candidates])]
    for one in lists:
        if one.size == 0:
            raise UserError(f"{name}: none given for an image, expected at least one")
        listed = one.ndim == 1 and np.issubdtype(one.dtype, np.integer)  # a mask is refused
        known_only = listed and one.min() >= 0 and one.max() < known
        if not known_only or len(np.unique(one)) < len(one):
            raise UserError(f"{name}: {one.tolist()!r}, expected distinct indices in 0 … {known - 1}")
    lists = [one.astype(np.int64) for one in lists]
    return lists if nested else lists * num_images


def check_output(output: Any, x_t: Tensor) -> None:
    """Raise ValueError or TypeError unless the network's output fits its input: (N, C or 2C, h, w)."""
    if not isinstance(output, Tensor) or not output.is_floating_point():
        found = f"dtype {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise WrongType(f"denoiser.predict: {found}, expected a floating point tensor shaped like x_t")
    n, channels, *space = x_t.shape
    if output.shape not in {(n, channels, *space), (n, 2 * channels, *space)}:
        raise UserError(
            f"denoiser.predict: output of shape {tuple(output.shape)} for x_t of shape {tuple(x_t.shape)}, "
            f"expected {(n, channels, *space)} or, with a predicted variance, {(n, 2 * channels, *space)}"
        )
