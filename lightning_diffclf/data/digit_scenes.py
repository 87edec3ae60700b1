"""Scenes with one or two handwritten digits, and captions that say what they show: no download."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diffclf.data.digits import DigitsDataModule, InMemoryImages

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
HEIGHT, WIDTH = 8, 16  # pixels of a scene; a digit takes 8 × 8 of them


class Scenes(NamedTuple):
    """Images (N, 3, 8, 16) in [-1, 1] and a caption for each."""

    images: Tensor
    captions: list[str]


def one_digit(digits: Tensor, offset: Tensor) -> Tensor:
    """Scenes (N, 3, 8, 16) with one digit each.

    Args:
        digits: Scans (N, 1, 8, 8) in [-1, 1].
        offset: Column where the digit begins (N,), 0 … 8.
    """
    column = torch.arange(WIDTH)[None] - offset[:, None]  # of the digit
    inside = (column >= 0) & (column < HEIGHT)
    index = column.clamp(0, HEIGHT - 1)[:, None, None].expand(-1, 1, HEIGHT, -1)
    scenes = torch.where(inside[:, None, None], digits.gather(3, index), -1.0)
    return scenes.expand(-1, 3, -1, -1).contiguous()


def two_digits(left: Tensor, right: Tensor) -> Tensor:
    """Scenes (N, 3, 8, 16) of two scans (N, 1, 8, 8) side by side."""
    return torch.cat([left, right], dim=3).expand(-1, 3, -1, -1).contiguous()


def caption_of_one(digit: int) -> str:
    """What a scene with one digit shows."""
    return f"a photo of a {WORDS[digit]}"


def caption_of_two(first: int, second: int, relation: str = "left of") -> str:
    """What a scene with two digits shows: ``first`` stands ``relation`` ``second``."""
    return f"a photo of a {WORDS[first]} {relation} a {WORDS[second]}"


def random_scenes(digits: InMemoryImages, count: int, generator: torch.Generator) -> Scenes:
    """Half of them with one digit, half with two, whose caption begins with the left or with the right one."""
    scans, labels = digits.parts["image"], digits.parts["label"]
    pick = torch.randint(len(scans), (2, count), generator=generator)
    offset = torch.randint(WIDTH - HEIGHT + 1, (count,), generator=generator)
    kind = torch.rand(count, generator=generator)
    single = one_digit(scans[pick[0]], offset)
    double = two_digits(scans[pick[0]], scans[pick[1]])
    captions = []
    for a, b, k in zip(labels[pick[0]].tolist(), labels[pick[1]].tolist(), kind.tolist(), strict=True):
        if k < 0.5:
            captions.append(caption_of_one(a))
        elif k < 0.75:
            captions.append(caption_of_two(a, b))
        else:
            captions.append(caption_of_two(b, a, "right of"))
    return Scenes(torch.where((kind < 0.5)[:, None, None, None], single, double), captions)


class DigitScenesDataModule(DigitsDataModule):
    """The digits of :class:`DigitsDataModule`, each in a scene of its own: (B, 3, 8, 16), in [-1, 1], ids as there.

    Where a digit stands is fixed. 1,437 are to train on, with labels, and 360 to test. The text-to-image model that
    comes with the package was trained on other scenes, with captions: those of :func:`random_scenes`, by
    ``scripts/make_sd_digits.py``.

    Args:
        batch_size: Training images in one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Test images in a batch of one process.
        seed: Key of the order of training images.

    Raises:
        ValueError: if a batch size is below 1.
    """

    class_names = WORDS

    def __init__(self, batch_size: int = 256, eval_batch_size: int = 60, seed: int = 0) -> None:
        super().__init__(batch_size, eval_batch_size, seed)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.train, self.test = _in_scenes(self.train, seed=1), _in_scenes(self.test, seed=0)


def _in_scenes(digits: InMemoryImages, seed: int) -> InMemoryImages:
    """Each digit in a scene of its own, at a place that ``seed`` keys."""
    parts = digits.parts
    offset = torch.randint(WIDTH - HEIGHT + 1, (len(digits),), generator=torch.Generator().manual_seed(seed))
    return InMemoryImages(one_digit(parts["image"], offset), parts["label"], parts["id"])
