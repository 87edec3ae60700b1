"""ImageNet to train on and to evaluate: as folders of images, tar shards, or latents made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader

from lightning_diffclf.data.labelled import (
    Form,
    Source,
    labelled_evaluation_loader,
    labelled_images,
    labelled_training_loader,
)
from lightning_diffclf.data.latents import Latents, is_latents
from lightning_diffclf.data.public_sets import IMAGENET_NAMES, FolderImages, ImageNetFolders
from lightning_diffclf.data.shards import Shards, is_remote
from lightning_diffclf.errors import MissingFile, UserError, check_at_least
from lightning_diffclf.identity import ByArguments


def open_source(path: str, skip_bad: float = 0.0) -> Source:
    """What is at ``path``: latents, shards, or a folder for each class.

    Folders that are all called by WordNet id, or by number 0 … 999, are classes of ImageNet; others are numbered in the
    order of their names.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if it cannot be used.
    """
    folder = Path(path)
    if is_remote(path) or "{" in path or path.endswith(".tar") or (folder.is_dir() and any(folder.glob("*.tar"))):
        return Shards(path, skip_bad)
    if not folder.is_dir():
        raise MissingFile(
            f"data: no {path!r}, expected a folder with one folder for each class, tar shards (diffclf shards makes "
            "some) or latents (diffclf encode)"
        )
    if is_latents(folder):
        return Latents(path)
    names = {one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")}
    imagenet = {*ImageNetInfo().label_names(), *map(str, range(1000))}
    return ImageNetFolders(path) if names and names <= imagenet else FolderImages(path)


def classes_of(source: Source) -> list[str]:
    """Name of each class; empty if unknown."""
    if isinstance(source, FolderImages):
        return list(source.classes)
    return list(source.index.classes) if source.index is not None else []


def network_classes_of(source: Source) -> list[list[int]] | None:
    """Which of ImageNet's 1,000 classes each class is; None if it is not known, or each is itself."""
    groups: list[list[int]] | None = getattr(source, "imagenet", None)
    if isinstance(source, (Shards, Latents)) and source.index is not None:
        groups = source.index.network_classes
    return None if groups == [[c] for c in range(len(IMAGENET_NAMES))] else groups


class ImageNetDataModule(ByArguments, L.LightningDataModule):
    """ImageNet, or any labelled images in the same form, to train a class-conditional network on.

    ``train`` and ``val`` are each one of: a folder with a folder of images for each class; tar shards (a folder or a
    pattern, see :mod:`~lightning_diffclf.data.shards`); latents (:mod:`~lightning_diffclf.data.latents`). Batches are
    mappings with ``image`` (B, 3, size, size) in [-1, 1], or latents (B, C, h, w), ``label`` and ``id``.

    Training has no epochs (:mod:`~lightning_diffclf.data.stream`): folders and latents are seen in an order that
    depends on (seed, step) only, also by another number of processes; shards by a stream that begins anew where a run
    is resumed.

    Args:
        train: What to train on.
        val: What to evaluate on; also for ``test`` and ``predict``.
        size: Side of the images, in pixels.
        batch_size: Images in one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Images in an evaluation batch of one process.
        num_workers: Processes that read images, for each process that trains.
        flip: Mirror every other training image.
        skip_bad: Share of damaged or missing shards, and of damaged images, that training skips with a warning; above
            it, an error. Evaluation skips nothing.
        buffer: Images that each worker mixes when it trains from shards.
        seed: Key of order, flips and posterior samples.

    Raises:
        ValueError: if a number is out of range; from ``setup``, if data cannot be used.
        FileNotFoundError: from ``setup``, if data are not there.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "train": "of training; an evaluation that fits a probe to it says so itself",
        "batch_size": "of training",
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
        "flip": "of training",
        "skip_bad": "of training: evaluations skip nothing",
        "buffer": "of training",
        "seed": "of training",
    }

    def __init__(
        self,
        train: str = "data/imagenet/train",
        val: str = "data/imagenet/val",
        size: int = 256,
        batch_size: int = 256,
        eval_batch_size: int = 16,
        num_workers: int = 8,
        flip: bool = True,
        skip_bad: float = 0.0,
        buffer: int = 2000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, size=size, batch_size=batch_size, eval_batch_size=eval_batch_size, buffer=buffer)
        check_at_least(0, num_workers=num_workers)
        if not 0 <= skip_bad < 1:
            raise UserError(f"skip_bad: {skip_bad}, expected a share in [0, 1)")
        self.save_hyperparameters()
        self.paths = {"train": train, "val": val}
        self.size, self.batch_size, self.eval_batch_size = size, batch_size, eval_batch_size
        self.num_workers = num_workers
        self.flip, self.skip_bad, self.buffer, self.seed = flip, skip_bad, buffer, seed
        self._sources: dict[str, Source] = {}

    def source(self, part: str) -> Source:
        """The data of ``train`` or ``val``, opened at first use.

        Raises:
            FileNotFoundError: if they are not there.
            ValueError: if they cannot be used, or are latents of another size.
        """
        if part not in self._sources:
            source = open_source(self.paths[part], self.skip_bad if part == "train" else 0.0)
            if isinstance(source, Latents) and source.index.size != self.size:
                raise UserError(
                    f"latents: {self.paths[part]!r} are of images of {source.index.size} pixels, expected {self.size}"
                )
            self._sources[part] = source
        return self._sources[part]

    @property
    def class_names(self) -> list[str]:
        """Name of each class of ``val``; empty if unknown."""
        return classes_of(self.source("val"))

    @property
    def network_classes(self) -> list[list[int]] | None:
        """Which of ImageNet's 1,000 classes each class of ``val`` is, where it has fewer; else None."""
        return network_classes_of(self.source("val"))

    def contents(self) -> dict[str, Any]:
        return {"source": self.source("val")}

    def latents(self, stage: str | None) -> Sequence[Latents]:
        """The latents that a stage uses."""
        parts = ["train", "val"] if stage == "fit" else ["val"]
        return [source for source in map(self.source, parts) if isinstance(source, Latents)]

    @property
    def num_classes(self) -> int | None:
        """Number of classes of ``train``; None if unknown."""
        return len(classes_of(self.source("train"))) or None

    def setup(self, stage: str | None = None) -> None:
        for part in ("train", "val") if stage == "fit" else ("val",):
            self.source(part)

    def train_dataloader(self) -> DataLoader[Any]:
        return labelled_training_loader(
            self.source("train"),
            Form((self.size, self.size)),
            self.batch_size,
            self.trainer,
            flip=self.flip,
            seed=self.seed,
            num_workers=self.num_workers,
            skip_bad=self.skip_bad,
            buffer=self.buffer,
        )

    def training_images(self, count: int) -> DataLoader[Any]:
        """See :class:`~.protocols.HasTrainingImages`; of tar shards the first images, which are mixed in ours."""
        source = self.source("train")
        here, there = classes_of(source), classes_of(self.source("val"))
        if here and there and here != there:
            found = f"{len(here)} classes in {self.paths['train']!r}, {len(there)} in {self.paths['val']!r}"
            raise UserError(f"data: {found}, expected the same ones to learn from")
        return labelled_images(source, Form((self.size, self.size)), count, self.eval_batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        source, form = self.source("val"), Form((self.size, self.size))
        return labelled_evaluation_loader(source, form, self.eval_batch_size, self.trainer, self.num_workers)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()
