"""The paper's data sets, and your own images in folders, for zero-shot classification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.error import URLError

import lightning as L
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf.data.images import stacked, to_rgb, transform
from lightning_diffclf.data.labelled import Form, labelled_training_loader
from lightning_diffclf.data.protocols import own_preparation, own_size
from lightning_diffclf.data.public_sets import PUBLIC_SETS, FolderImages
from lightning_diffclf.data.shards import ShardImages, Shards
from lightning_diffclf.data.stream import Share, evaluation_loader
from lightning_diffclf.errors import MissingFile, UserError, check_at_least, first_line
from lightning_diffclf.identity import ByArguments


class _Prepared(Dataset[dict[str, Any]]):
    """Images of a data set at their positions, ready for a network; the position in the data set is the id."""

    def __init__(self, source: Any, positions: Sequence[int], prepare: Callable[[Image.Image], Any]) -> None:
        self.source, self.positions, self.prepare = source, list(positions), prepare
        self.root = getattr(source, "root", None)

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = self.positions[index]
        image, label = self.source[position]
        return {"image": self.prepare(to_rgb(image)), "label": int(label), "id": position}


class _Labelled(Dataset[tuple[Image.Image, int]]):
    """A data set to train on: its images in RGB, their positions as ids."""

    def __init__(self, source: Any, root: str) -> None:
        self.source, self.root = source, root

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.source[index]
        return to_rgb(image), int(label)

    def id_of(self, index: int) -> int | str:
        return index


@dataclass(frozen=True)
class _AsTested(Form):
    """Training images are prepared as those of the test set are."""

    prepare: Callable[[Image.Image], Tensor] = to_rgb  # type: ignore[assignment]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.prepare(image)

    def mirrored_at_random(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        return self.prepare(ImageOps.mirror(image) if rng.integers(2) else image)


class ZeroShotDataModule(ByArguments, L.LightningDataModule):
    """A test set: of torchvision by its name, folders of images, or shards; of torchvision's, training images too.

    Images are resized (shortest edge, bicubic), centre cropped, and scaled to [-1, 1]. The id of an image is its
    position in the whole data set, so that subsets agree with it.

    Args:
        name: ``food101``, ``cifar10``, ``cifar100``, ``aircraft``, ``pets``, ``flowers102``, ``stl10``, ``mnist``,
            ``caltech101``, ``eurosat``; ``imagenet`` (also -V2 and -A: folders by WordNet id or number) and
            ``objectnet``, from folders; ``folder``, for images in ``root``, one folder for each class; or
            ``webdataset``, for tar shards (``root``: a pattern or a folder), with ``class_names`` or a CSV of prompts.
        root: Folder of the data.
        size: Height and width of the images; if omitted, images are prepared as the Trainer's module says
            (:class:`~lightning_diffclf.data.protocols.HasPreparation`), or have the size that it was trained on
            (:class:`~lightning_diffclf.data.protocols.HasNativeSize`), or 512 where none says so.
        eval_batch_size: Images in a batch of one process.
        num_workers: Processes that read images.
        download: Let torchvision download what is missing.
        class_names: Names in place of those of the data set, in the order of its classes.
        subset: File with the positions to use, one in each line.
        per_class: So many images of each class, chosen by ``seed``.
        seed: For ``per_class``, and for the order of training images.
        border: Pixels to cut off each side of an image in a folder, before resizing.
        crop: ``covering``: shortest edge resized, centre cropped, as for Stable Diffusion; ``published``: as the
            published DiT networks want it (:func:`~lightning_diffclf.data.images.published_crop`).
        batch_size: Images in one optimizer step of a training, over all processes and accumulated batches. Training
            images are those that torchvision's set has, of ImageNet those in ``train`` beside ``root``; they are
            prepared as those of the test set, and seen without epochs (:mod:`~lightning_diffclf.data.stream`).
        flip: Mirror every other training image.

    Raises:
        ValueError: if the name is unknown, numbers are out of range, or names are not as many as classes.
        FileNotFoundError: from ``setup``, if the data are not there.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
        "download": "nor on how they came here",
        "batch_size": "of training",
        "flip": "of training",
    }

    def __init__(
        self,
        name: str = "folder",
        root: str = "data",
        size: int | tuple[int, int] | None = None,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        download: bool = False,
        class_names: list[str] | None = None,
        subset: str | None = None,
        per_class: int | None = None,
        seed: int = 0,
        border: int = 0,
        crop: Literal["covering", "published"] = "covering",
        batch_size: int = 64,
        flip: bool = False,
    ) -> None:
        super().__init__()
        if name not in ("folder", "webdataset", *PUBLIC_SETS):
            raise UserError(f"data: {name!r}, expected 'folder', 'webdataset' or one of {sorted(PUBLIC_SETS)}")
        if name == "webdataset" and (per_class is not None or subset is not None):
            raise UserError("data: shards are read in order, expected no subset and no per_class with 'webdataset'")
        check_at_least(1, eval_batch_size=eval_batch_size, batch_size=batch_size)
        check_at_least(0, num_workers=num_workers)
        if per_class is not None and (per_class < 1 or subset is not None):
            raise UserError(f"per_class: {per_class}, expected at least 1, and no subset file beside it")
        self.save_hyperparameters(logger=False)  # class_names is an argument of networks too, and may differ
        self.name: str = name
        self.root, self._given_size = root, (size, size) if isinstance(size, int) else size
        self.eval_batch_size, self.num_workers, self.download = eval_batch_size, num_workers, download
        self._names, self.subset, self.per_class, self.seed, self.border = class_names, subset, per_class, seed, border
        self.crop: Any = crop
        self.batch_size, self.flip = batch_size, flip
        self._source: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return own_size(self._given_size, self.trainer)

    @property
    def source(self) -> Any:
        """The data set itself, opened at first use."""
        if self._source is None:
            self._source = self._open()
        return self._source

    def _open(self) -> Any:
        if self.name == "folder":
            return FolderImages(self.root, self.border)
        return self._of_torchvision("images", PUBLIC_SETS[self.name].open)

    def _open_training(self) -> Any:
        """The training images, in the same classes; None if there are none."""
        known = PUBLIC_SETS.get(self.name)
        return None if known is None or known.train is None else self._of_torchvision("training images", known.train)

    def _of_torchvision(self, what: str, opened: Callable[[str, bool], Any]) -> Any:
        try:
            return opened(self.root, self.download)
        except (RuntimeError, URLError) as error:  # torchvision's, for what is not there or does not come
            if not self.download:
                raise MissingFile(
                    f"data: no {what} of {self.name!r} in {self.root!r}; --data.download true gets them, --data.root "
                    "says where they are"
                ) from error
            raise UserError(
                f"data: torchvision did not get the {what} of {self.name!r} ({first_line(error)}); check the "
                f"connection, or put into {self.root!r} what it downloads elsewhere"
            ) from error

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return (3, *self.size)

    @property
    def class_names(self) -> list[str]:
        """Name of each class, as prompts want them."""
        if self.name == "webdataset":
            if self._names is None:
                raise UserError("class_names: none given, expected a name for each class of the shards")
            return self._names
        own = list(self.source.classes if self.name == "folder" else PUBLIC_SETS[self.name].names(self.source))
        if self._names is not None and len(self._names) != len(own):
            raise UserError(f"class_names: {len(self._names)}, expected {len(own)}, as {self.name!r} has classes")
        return list(self._names or own)

    @property
    def network_classes(self) -> list[list[int]] | None:
        """For ImageNet and what is made like it: which of its 1,000 classes each class is; else None."""
        return getattr(self.source, "imagenet", None) if self.name != "webdataset" else None

    def contents(self) -> dict[str, Any]:
        height, width = self.size
        own = own_preparation(self._given_size, self.trainer)
        # The module's own size is the same as one given.
        size = {"size": height if height == width else self.size} if own is None else {"preparation": own}
        if self.name == "webdataset":
            return size | {"source": Shards(self.root)}
        if isinstance(self.source, FolderImages):
            return size | {"source": self.source, "positions": self._positions()}
        known = {"images": len(self.source), "labels": _known_labels(self.source)}
        return size | known | {"positions": self._positions()}

    @property
    def _prepare(self) -> Callable[[Any], Tensor]:
        return own_preparation(self._given_size, self.trainer) or transform(*self.size, self.crop)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches for training; see :func:`~lightning_diffclf.data.labelled.labelled_training_loader`.

        Raises:
            ValueError: if there are no training images.
            FileNotFoundError: if they are not there.
        """
        source = self._open_training()
        if source is None:
            raise UserError(
                f"data: {type(self).__name__} has no training images of {self.name!r} in {self.root!r}; expected "
                "ImageFolderDataModule or ImageNetDataModule, or a set that has some"
            )
        classes, known = getattr(source, "classes", None), getattr(self.source, "classes", None)
        if classes and classes != known:
            raise UserError(
                f"data: training images of classes {list(classes)[:5]}, but {list(known or [])[:5]} are tested"
            )
        form = _AsTested(self.size, prepare=self._prepare)
        images = _Labelled(source, self.root)
        return labelled_training_loader(
            images, form, self.batch_size, self.trainer, self.flip, self.seed, self.num_workers
        )

    def setup(self, stage: str | None = None) -> None:
        prepare = self._prepare
        if self.name == "webdataset":
            share = Share.of(self.trainer)
            self.test: Any = ShardImages(Shards(self.root), prepare, share.rank, share.world_size)
        else:
            self.test = _Prepared(self.source, self._positions(), prepare)

    def _positions(self) -> list[int]:
        count = len(self.source)
        if self.subset is not None:
            if not Path(self.subset).is_file():
                raise MissingFile(f"subset: no file {self.subset!r}")
            lines = Path(self.subset).read_text().split()
            wrong = [line for line in lines if not line.isdecimal() or int(line) >= count]
            if wrong or not lines or len(set(lines)) < len(lines):
                raise UserError(f"subset: {self.subset!r} with {wrong[:3]}, expected different ones of 0 … {count - 1}")
            return [int(line) for line in lines]
        if self.per_class is None:
            return list(range(count))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.seed)).tolist()
        labels, chosen = _labels(self.source), []
        taken: dict[int, int] = {}
        for position in order:
            label = int(labels[position])
            if taken.get(label, 0) < self.per_class:
                taken[label] = taken.get(label, 0) + 1
                chosen.append(position)
        return sorted(chosen)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        if self.name == "webdataset":
            return DataLoader(
                self.test, batch_size=self.eval_batch_size, num_workers=self.num_workers, collate_fn=stacked
            )
        return evaluation_loader(self.test, self.eval_batch_size, self.trainer, self.num_workers, stacked)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.test_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self.test_dataloader()


def _labels(source: Any) -> Sequence[int]:
    """Label of each image, without decoding any where the data set allows it."""
    if isinstance(source, FolderImages):
        return [label for _, label in source.files]
    known = _known_labels(source)
    return [int(source[position][1]) for position in range(len(source))] if known is None else known


def _known_labels(source: Any) -> Sequence[int] | None:
    """Label of each image of a data set of torchvision, where it has them at hand."""
    for name in ("targets", "_labels", "labels", "y"):
        labels = getattr(source, name, None)
        if labels is not None and len(labels) == len(source):
            return list(labels)
    return None
