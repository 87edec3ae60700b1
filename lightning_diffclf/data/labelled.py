"""Loaders of labelled images, whatever form they are in: folders, tar shards, latents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf.data.images import covering_crop, published_crop, stacked, to_tensor
from lightning_diffclf.data.latents import Latents
from lightning_diffclf.data.public_sets import FolderImages
from lightning_diffclf.data.shards import ShardImages, Shards, ShardStream, Tally
from lightning_diffclf.data.stream import Share, evaluation_loader, next_step, some_images, training_loader
from lightning_diffclf.errors import UserError


class LabelledImages(Protocol):
    """Images in RGB with their labels, such as :class:`~.public_sets.FolderImages`."""

    root: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...

    def id_of(self, index: int) -> int | str:
        """What an image is called."""
        ...


Source = FolderImages | Shards | Latents


@dataclass(frozen=True)
class Form:
    """What an image becomes.

    Attributes:
        size: Height and width in pixels: of the published crop where it is a square, else of one that just covers it.
        channels: 3 for RGB, 1 for grey.
    """

    size: tuple[int, int]
    channels: int = 3

    def __call__(self, image: Image.Image) -> Tensor:
        """An image in RGB as (channels, size, size) in [-1, 1]."""
        return self._tensor(self._cropped(image))

    def mirrored_at_random(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """The same, every other time mirrored."""
        image = self._cropped(image)
        return self._tensor(ImageOps.mirror(image) if rng.integers(2) else image)

    def _cropped(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        return published_crop(image, height) if height == width else covering_crop(image, height, width)

    def _tensor(self, image: Image.Image) -> Tensor:
        return to_tensor(image.convert("L") if self.channels == 1 else image)


class _Photos(Dataset[dict[str, Any]]):
    """Images of folders to evaluate."""

    def __init__(self, source: LabelledImages, form: Form) -> None:
        self.source, self.form, self.root = source, form, source.root

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.source[index]
        return {"image": self.form(image), "label": label, "id": self.source.id_of(index)}


class _Take:
    """Makes training batches of a finite source; see :class:`~lightning_diffclf.data.stream.Endless`."""

    def __init__(self, source: LabelledImages | Latents, form: Form, flip: bool, seed: int, skip_bad: float) -> None:
        self.source, self.form, self.flip, self.seed = source, form, flip, seed
        self.tally = Tally(skip_bad)

    def __call__(self, indices: list[int], positions: list[int]) -> dict[str, Any]:
        if isinstance(self.source, Latents):
            return self.source.sample(indices, [(self.seed, position) for position in positions], self.flip)
        samples = []
        for index, position in zip(indices, positions, strict=True):
            index, image, label = self._readable(self.source, index)
            rng = np.random.default_rng([self.seed, position])
            tensor = self.form.mirrored_at_random(image, rng) if self.flip else self.form(image)
            samples.append({"image": tensor, "label": label, "id": self.source.id_of(index)})
        return stacked(samples)

    def _readable(self, source: LabelledImages, index: int) -> tuple[int, Image.Image, int]:
        """An image, or the next one that can be read: steps are of the same number of images."""
        while True:
            try:
                image, label = source[index]
            except UserError as error:
                self.tally.bad_image(error)
                index = (index + 1) % len(source)
            else:
                self.tally.images += 1
                return index, image, label


def labelled_training_loader(
    source: Source | LabelledImages,
    form: Form,
    batch_size: int,
    trainer: L.Trainer | None = None,
    flip: bool = True,
    seed: int = 0,
    num_workers: int = 0,
    skip_bad: float = 0.0,
    buffer: int = 2000,
) -> DataLoader[Any]:
    """Loader of one process for endless training.

    Args:
        source: The images.
        form: What they become; latents are what they are.
        batch_size: Images in one optimizer step, over all processes and accumulated batches.
        trainer: Says which step comes next, and how many processes there are.
        flip: Mirror every other image.
        seed: Key of order, flips and posterior samples.
        num_workers: Processes that read images.
        skip_bad: Share of damaged shards and images that is skipped with a warning.
        buffer: Images of shards that each worker mixes.

    Raises:
        ValueError: as :func:`~lightning_diffclf.data.stream.training_loader`; while reading, if more is damaged.
    """
    if not isinstance(source, Shards):
        take = _Take(source, form, flip, seed, skip_bad)
        return training_loader(len(source), take, batch_size, seed, trainer, num_workers)
    share = Share.of(trainer)
    stream = ShardStream(
        source,
        form.mirrored_at_random if flip else partial(_as_it_is, form),
        share.rank,
        share.world_size,
        seed=seed,
        step=next_step(trainer),
        buffer=buffer,
        skip_bad=skip_bad,
    )
    return DataLoader(
        stream,
        batch_size=share.batch_size(batch_size),
        num_workers=num_workers,
        collate_fn=stacked,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def _as_it_is(form: Form, image: Image.Image, rng: np.random.Generator) -> Tensor:
    return form(image)


def labelled_evaluation_loader(
    source: Source, form: Form, batch_size: int, trainer: L.Trainer | None = None, num_workers: int = 0
) -> DataLoader[Any]:
    """Loader of one process for evaluation: each image on one process, none twice, none skipped.

    Args:
        source: The images.
        form: What they become; latents are what they are.
        batch_size: Images in a batch of one process.
        trainer: Says how many processes there are.
        num_workers: Processes that read images.

    Raises:
        ValueError: as :func:`~lightning_diffclf.data.stream.evaluation_loader`; while reading, if an image is damaged.
    """
    if isinstance(source, Latents):
        return evaluation_loader(source, batch_size, trainer)
    if isinstance(source, Shards):
        share = Share.of(trainer)
        images = ShardImages(source, form, share.rank, share.world_size)
        return DataLoader(images, batch_size=batch_size, num_workers=num_workers, collate_fn=stacked)
    return evaluation_loader(_Photos(source, form), batch_size, trainer, num_workers, stacked)


def labelled_images(source: Source, form: Form, count: int, batch_size: int, num_workers: int = 0) -> DataLoader[Any]:
    """Loader of at most ``count`` images to learn from, on one process; see :class:`~.protocols.HasTrainingImages`.

    Args:
        source: The images; of tar shards the first ones, which are mixed in ours.
        form: What they become; latents are what they are.
        count: How many at most; shards are read until there are enough.
        batch_size: Images in a batch.
        num_workers: Processes that read images.
    """
    if isinstance(source, Shards):
        images = ShardImages(source, form)
        return DataLoader(images, batch_size, num_workers=0, collate_fn=stacked)  # workers would take turns
    if isinstance(source, Latents):
        return some_images(source, count, batch_size)
    return some_images(_Photos(source, form), count, batch_size, num_workers, stacked)
