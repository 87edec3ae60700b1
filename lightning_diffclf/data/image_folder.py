"""Your own images: one folder for each class, divided into training, validation and test images."""

from __future__ import annotations

import copy
import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning as L
from torch.utils.data import DataLoader

from lightning_diffclf.data.images import size_of_image
from lightning_diffclf.data.labelled import (
    Form,
    labelled_evaluation_loader,
    labelled_images,
    labelled_training_loader,
)
from lightning_diffclf.data.latents import Latents, is_latents
from lightning_diffclf.data.public_sets import PARTS, FolderImages
from lightning_diffclf.errors import MissingFile, UserError, check_at_least
from lightning_diffclf.identity import ByArguments

INSTEAD = {"val": "test", "test": "val"}  # where one is missing


class ClassFolders(FolderImages):
    """Images in one folder for each class; their ids are their paths, such as ``cat/1.png``.

    Args:
        root: Folder that holds the folders.
        classes: Names of the folders in the order of the classes, where it is given from elsewhere. Folders may then be
            missing, but there may be no others.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no folders, one of them has no image, or is of no class.
    """

    def __init__(self, root: str, classes: Sequence[str] | None = None) -> None:
        super().__init__(root)
        if classes is None:
            return
        number = {name: c for c, name in enumerate(classes)}
        strange = [name for name in self.classes if name not in number]
        if strange:
            raise UserError(
                f"data: folder {strange[0]!r} in {root!r} is no class that was trained, expected one of "
                f"{list(classes) if len(classes) <= 20 else f'{len(classes)} names, such as {classes[0]!r}'}"
            )
        self.files = [(path, number[self.classes[c]]) for path, c in self.files]
        self.classes = list(classes)

    def id_of(self, index: int) -> str:
        """Id of an image: its path below the folder."""
        return self.files[index][0].relative_to(self.root).as_posix()

    def part(self, positions: Sequence[int]) -> ClassFolders:
        """Some of the images."""
        chosen = copy.copy(self)
        chosen.files = [self.files[position] for position in positions]
        return chosen


def divide(source: ClassFolders, val_share: float, test_share: float) -> dict[str, ClassFolders]:
    """Training, validation and test images, by name: by a digest of their paths, a share of each class.

    The same files are divided in the same way everywhere. Each part that has a share gets one image of each class at
    least.

    Args:
        source: All images.
        val_share: Share of the validation images.
        test_share: Share of the test images.

    Raises:
        ValueError: if a class has too few images.
    """
    of_class: dict[int, list[int]] = {}
    for position, (_, label) in enumerate(source.files):
        of_class.setdefault(label, []).append(position)
    shares = {"test": test_share, "val": val_share, "train": 1 - val_share - test_share}
    least = sum(share > 1e-9 for share in shares.values())
    positions: dict[str, list[int]] = {name: [] for name in PARTS}
    for label, members in of_class.items():
        if len(members) < least:
            raise UserError(
                f"data: class {source.classes[label]!r} in {source.root!r} has {len(members)} images, expected at "
                f"least {least}, one for each part; add some, or set val_share or test_share to 0"
            )
        members.sort(key=lambda position: hashlib.blake2b(source.id_of(position).encode()).digest())
        counts = {name: max(1, round(share * len(members))) if share > 1e-9 else 0 for name, share in shares.items()}
        largest = max(counts, key=lambda name: shares[name])
        counts[largest] += len(members) - sum(counts.values())  # what rounding left over, or took too much
        begin = 0
        for name, count in counts.items():
            positions[name] += members[begin : begin + count]
            begin += count
    return {name: source.part(sorted(chosen)) for name, chosen in positions.items()}


class ImageFolderDataModule(ByArguments, L.LightningDataModule):
    """Your own images, to train a class-conditional network on: one folder for each class.

    ``root`` holds either the folders of the classes, which are then divided by file name, a share of each class for
    each part; or folders ``train`` and ``val``, ``test`` or both, which hold those of the classes (or latents, which
    ``diffclf encode`` made of such a folder). Where one of ``val`` and ``test`` is missing, the other one serves as
    both. Classes are numbered in the order of the folders' names.

    Images are of any format, size and mode; they are resized and cropped at their centre
    (:func:`~lightning_diffclf.data.images.published_crop`), with a warning where small ones are enlarged. Batches are
    mappings with ``image`` (B, channels, H, W) in [-1, 1], or latents (B, C, h, w), ``label`` (B,) and ``id``:
    paths, such as ``cat/1.png``. Training has no epochs (:mod:`~lightning_diffclf.data.stream`): what is seen depends
    on (seed, step) only.

    Args:
        root: Folder of the images.
        size: Height and width of the images in pixels, after resizing; one number if square.
        channels: 3 for RGB, 1 for grey; images are converted.
        classes: Names of the classes' folders in the order of the network's classes; those that are there, in the order
            of their names, at least two, if omitted. The command line keeps them with the checkpoint, so that another
            folder may be evaluated which has not all of them.
        val_share: Share of each class to validate on, where ``root`` has no ``train``.
        test_share: Share of each class to test on, where ``root`` has no ``train``.
        batch_size: Images in one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Images in an evaluation batch of one process.
        num_workers: Processes that read images, for each process that trains.
        flip: Mirror every other training image.
        skip_bad: Share of damaged images that training skips with a warning; above it, an error. Evaluation skips
            nothing.
        seed: Key of order and flips.

    Raises:
        ValueError: if a number is out of range; from ``setup``, if images cannot be used.
        FileNotFoundError: from ``setup``, if there is no folder.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "batch_size": "of training",
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
        "flip": "of training",
        "skip_bad": "of training: evaluations skip nothing",
        "seed": "of training",
    }

    network_classes: list[list[int]] | None = None  # those of the network are those of the folders

    def __init__(
        self,
        root: str = "data",
        size: int | list[int] = 32,
        channels: Literal[1, 3] = 3,
        classes: list[str] | None = None,
        val_share: float = 0.1,
        test_share: float = 0.1,
        batch_size: int = 64,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        flip: bool = False,
        skip_bad: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        if not isinstance(size, int) and len(size) != 2:
            raise UserError(f"size: {list(size)}, expected a number, or height and width")
        check_at_least(1, size=size if isinstance(size, int) else min(size))
        check_at_least(0, num_workers=num_workers)
        if channels not in (1, 3):
            raise UserError(f"channels: {channels}, expected 3 (RGB) or 1 (grey)")
        if classes is not None and len(set(classes)) < max(len(classes), 1):
            raise UserError(f"classes: {classes}, expected different names")
        if not 0 <= skip_bad < 1:
            raise UserError(f"skip_bad: {skip_bad}, expected a share in [0, 1)")
        if min(val_share, test_share) < 0 or not 0 < val_share + test_share <= 1:
            raise UserError(
                f"val_share, test_share: {val_share}, {test_share}, expected shares that are together above 0 and at "
                "most 1"
            )
        self.save_hyperparameters()
        height, width = (size, size) if isinstance(size, int) else size
        self.root, self.form, self.classes = root, Form((height, width), channels), classes
        self.shares = val_share, test_share
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.flip, self.skip_bad, self.seed = flip, skip_bad, seed
        self._parts: dict[str, ClassFolders | Latents] = {}

    def source(self, part: str) -> ClassFolders | Latents:
        """The images of ``train``, ``val`` or ``test``, found at first use.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if they cannot be used.
        """
        if not self._parts:
            self._parts = self._given() if self._is_divided() else self._divided()
        if part not in self._parts:
            raise UserError(f"data: {self.root!r} has no {part!r}, expected it beside {sorted(self._parts)}")
        return self._parts[part]

    def _is_divided(self) -> bool:
        """Whether there is a folder for each part, which holds those of the classes."""
        folder = Path(self.root)
        if not folder.is_dir():
            raise MissingFile(f"data: no folder {self.root!r}, expected one with a folder of images for each class")
        if is_latents(folder):
            raise UserError(f"data: {self.root!r} are latents, expected a folder that has those of 'train' and 'val'")
        names = {one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")}
        parts = sorted(name for name in names.intersection(PARTS) if _holds_a_set(folder / name))
        others = sorted(names.difference(PARTS))
        if parts and others:
            raise UserError(
                f"data: {self.root!r} has {others[0]!r} beside {parts[0]!r}, in which there are folders; expected "
                f"either folders of classes, or {', '.join(map(repr, PARTS))}"
            )
        return bool(parts)

    def _divided(self) -> dict[str, ClassFolders | Latents]:
        found = divide(ClassFolders(self.root, self.classes), *self.shares)
        return {name: found[name if len(found[name]) else INSTEAD.get(name, name)] for name in PARTS}

    def _given(self) -> dict[str, ClassFolders | Latents]:
        there = [part for part in PARTS if (Path(self.root) / part).is_dir()]
        if there == ["train"]:
            raise UserError(f"data: {self.root!r} has only 'train', expected 'val' or 'test' as well")
        if "train" not in there and self.classes is None:
            raise UserError(
                f"data: {self.root!r} has only {there}, expected 'train' as well, or the names of all classes"
            )
        found: dict[str, ClassFolders | Latents] = {}
        classes = self.classes
        for part in there:
            found[part] = one = self._open(Path(self.root) / part, classes)
            classes = classes or (one.index.classes if isinstance(one, Latents) else one.classes)
        return {part: found[part if part in found else INSTEAD[part]] for part in (*there, "val", "test")}

    def _open(self, folder: Path, classes: Sequence[str] | None) -> ClassFolders | Latents:
        if not is_latents(folder):
            return ClassFolders(str(folder), classes)
        latents = Latents(str(folder))
        if (latents.index.size, latents.index.size) != self.form.size:
            raise UserError(
                f"latents: {str(folder)!r} are of images of {latents.index.size} pixels, expected {self.form.size[0]}"
            )
        if classes is not None and latents.index.classes != list(classes):
            raise UserError(f"latents: {str(folder)!r} have other classes than were trained, or another order of them")
        return latents

    @property
    def class_names(self) -> list[str]:
        """Name of each class: that of its folder."""
        if self.classes is not None:
            return list(self.classes)
        source = self.source("train")
        names = list(source.index.classes if isinstance(source, Latents) else source.classes)
        if len(names) < 2:
            raise UserError(
                f"data: only one folder, {names[0]!r}, in {source.root!r}, expected two or more: one for each class"
            )
        return names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image or a latent."""
        source = self.source("train")
        return source.index.shape if isinstance(source, Latents) else (self.form.channels, *self.form.size)

    def latents(self, stage: str | None) -> Sequence[Latents]:
        """The latents that a stage uses."""
        return [one for one in map(self.source, _of_stage(stage)) if isinstance(one, Latents)]

    def contents(self) -> dict[str, Any]:
        return {"val": self.source("val"), "test": self.source("test"), "class_names": self.class_names}

    def setup(self, stage: str | None = None) -> None:
        """Find the images, and look at the head of each file: what is wrong is said before long work."""
        for part in _of_stage(stage):
            source = self.source(part)
            if isinstance(source, ClassFolders) and part == "train":
                check_that_none_is_empty(source)
            if isinstance(source, ClassFolders) and (self.trainer is None or self.trainer.is_global_zero):
                check_images(source, self.form.size, self.skip_bad if part == "train" else 0.0)

    def train_dataloader(self) -> DataLoader[Any]:
        return labelled_training_loader(
            self.source("train"),
            self.form,
            self.batch_size,
            self.trainer,
            flip=self.flip,
            seed=self.seed,
            num_workers=self.num_workers,
            skip_bad=self.skip_bad,
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    def training_images(self, count: int) -> DataLoader[Any]:
        """See :class:`~.protocols.HasTrainingImages`."""
        return labelled_images(self.source("train"), self.form, count, self.eval_batch_size, self.num_workers)

    def _evaluation_loader(self, part: str) -> DataLoader[Any]:
        source = self.source(part)
        return labelled_evaluation_loader(source, self.form, self.eval_batch_size, self.trainer, self.num_workers)


def _of_stage(stage: str | None) -> tuple[str, ...]:
    return {"fit": ("train", "val"), "validate": ("val",), None: PARTS}.get(stage, ("test",))


def _holds_a_set(folder: Path) -> bool:
    return folder.is_dir() and (is_latents(folder) or any(one.is_dir() for one in folder.iterdir()))


def check_that_none_is_empty(source: ClassFolders) -> None:
    """Raise ValueError, which names a class, unless each has an image."""
    there = {label for _, label in source.files}
    missing = [name for label, name in enumerate(source.classes) if label not in there]
    if missing:
        raise UserError(f"data: class {missing[0]!r} has no image in {source.root!r}, expected some to train on")


def check_images(source: ClassFolders, size: tuple[int, int], skip_bad: float = 0.0) -> None:
    """Look at the head of each file.

    Args:
        source: The images.
        size: Height and width in pixels; where images are smaller, a warning says so.
        skip_bad: Share of damaged images that is only warned about.

    Raises:
        ValueError: if there is none, or more are damaged; names the first one.
    """
    if not source.files:
        raise UserError(f"data: no images in {source.root!r}")
    damaged: list[str] = []
    small: list[str] = []
    for path, found in _sizes([path for path, _ in source.files]):
        if isinstance(found, UserError):
            damaged.append(str(found))
        elif found[1] < size[0] or found[0] < size[1]:
            small.append(f"{str(path)!r} ({found[0]} x {found[1]} pixels)")
    count = len(source.files)
    if len(damaged) > skip_bad * count:
        raise UserError(
            f"{damaged[0]}; {len(damaged)} of {count} images are damaged, expected at most a share of {skip_bad:g} "
            "(skip_bad, which is for training images only)"
        )
    for one in damaged:
        print(f"warning: {one}; skipped", file=sys.stderr)
    if small:
        print(
            f"warning: {len(small)} of {count} images are enlarged to {size[1]} x {size[0]}, such as {small[0]}; a "
            "smaller size (--data.size) costs less",
            file=sys.stderr,
        )


def _sizes(paths: Sequence[Path]) -> Iterator[tuple[Path, tuple[int, int] | UserError]]:
    def look(path: Path) -> tuple[int, int] | UserError:
        try:
            return size_of_image(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        yield from zip(paths, pool.map(look, paths), strict=True)
