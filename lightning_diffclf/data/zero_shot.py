"""The paper's data sets, and your own images in folders, for zero-shot classification."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import lightning as L
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.models._meta import _IMAGENET_CATEGORIES

from lightning_diffclf.data.images import find_images, open_image, stacked, to_rgb, transform
from lightning_diffclf.data.protocols import own_preparation, own_size
from lightning_diffclf.data.shards import ShardImages, Shards
from lightning_diffclf.data.stream import Share, evaluation_loader
from lightning_diffclf.errors import MissingFile, UserError, check_at_least
from lightning_diffclf.identity import ByArguments

CATS = (
    "Abyssinian", "Bengal", "Birman", "Bombay", "British Shorthair", "Egyptian Mau", "Maine Coon", "Persian", "Ragdoll",
    "Russian Blue", "Siamese", "Sphynx",
)  # fmt: skip
IMAGENET_NAMES = list(_IMAGENET_CATEGORIES)
DIGITS = tuple("0123456789")
EUROSAT = (
    "annual crop land", "forest", "brushland or shrubland", "highway or road", "industrial buildings", "pasture land",
    "permanent crop land", "residential buildings", "river", "sea or lake",
)  # fmt: skip


class PublicSet(NamedTuple):
    """A data set of torchvision: how it is opened, and what its classes are called."""

    open: Callable[[str, bool], Any]
    names: Callable[[Any], Sequence[str]]


def _pet(name: str) -> str:
    # The paper's prompts append the species (the American Bulldog has none there).
    species = "cat" if name in CATS else "dog"
    return name if name.lower() == "american bulldog" else f"{name} {species}"


PUBLIC_SETS: dict[str, PublicSet] = {
    "food101": PublicSet(
        lambda root, get: datasets.Food101(root, "test", download=get),
        lambda d: [c.replace("_", " ") for c in d.classes],
    ),
    "cifar10": PublicSet(lambda root, get: datasets.CIFAR10(root, False, download=get), lambda d: d.classes),
    "cifar100": PublicSet(
        lambda root, get: datasets.CIFAR100(root, False, download=get),
        lambda d: [c.replace("_", " ") for c in d.classes],
    ),
    "aircraft": PublicSet(
        lambda root, get: datasets.FGVCAircraft(root, "test", "variant", download=get), lambda d: d.classes
    ),
    "pets": PublicSet(
        lambda root, get: datasets.OxfordIIITPet(root, "test", download=get), lambda d: [_pet(c) for c in d.classes]
    ),
    "flowers102": PublicSet(lambda root, get: datasets.Flowers102(root, "test", download=get), lambda d: d.classes),
    "stl10": PublicSet(lambda root, get: datasets.STL10(root, "test", download=get), lambda d: d.classes),
    "mnist": PublicSet(lambda root, get: datasets.MNIST(root, False, download=get), lambda d: DIGITS),
    "caltech101": PublicSet(
        lambda root, get: datasets.Caltech101(root, download=get), lambda d: [c.replace("_", " ") for c in d.categories]
    ),
    "imagenet": PublicSet(lambda root, get: ImageNetFolders(root), lambda d: d.classes),
    "objectnet": PublicSet(lambda root, get: ObjectNet(root), lambda d: d.classes),
    "eurosat": PublicSet(lambda root, get: datasets.EuroSAT(root, download=get), lambda d: EUROSAT),
}


class FolderImages(Dataset[tuple[Image.Image, int]]):
    """Images in one folder for each class; classes are numbered in the order of the folders' names.

    Args:
        root: Folder that holds the folders.
        border: Pixels to cut off on each side, as ObjectNet's images have a red frame of 2.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it has no folders with images.
    """

    def __init__(self, root: str, border: int = 0) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise MissingFile(f"data: no folder {root!r}")
        self.root, self.border = root, border
        names = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
        if not names:
            raise UserError(f"data: {root!r} has no folders, expected one for each class")
        self.classes = names
        self.files = [(path, c) for c, name in enumerate(names) for path in find_images([str(folder / name)])]

    def identity(self) -> dict[str, Any]:
        """Which files there are, and of which class."""
        files = [(os.path.relpath(path, self.root), label) for path, label in self.files]
        return {"images": len(files), "files": files, "border": self.border}

    def __len__(self) -> int:
        return len(self.files)

    def id_of(self, index: int) -> int | str:
        """Id of an image: its position."""
        return index

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.files[index]
        image = open_image(path)
        if self.border:
            image = image.crop((self.border, self.border, image.width - self.border, image.height - self.border))
        return image, label


class ImageNetFolders(FolderImages):
    """ImageNet's validation set, ImageNet-V2 or ImageNet-A: folders are called by WordNet id, or by number (V2).

    Attributes:
        imagenet: Which of the 1,000 classes each class is, as a list of one.

    Raises:
        ValueError: also if a folder is none of the 1,000 classes.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        known = ImageNetInfo().label_names()
        index = {name: c for c, name in enumerate(known)} | {str(c): c for c in range(1000)}
        strange = [name for name in self.classes if name not in index]
        if strange:
            raise UserError(f"data: folder {strange[0]!r} in {root!r} is no class of ImageNet (WordNet id or 0 … 999)")
        which = [index[name] for name in self.classes]
        if all(name.isdecimal() for name in self.classes):  # "10" sorts before "2"
            order = sorted(range(len(self.classes)), key=lambda c: which[c])
            rank = {c: r for r, c in enumerate(order)}
            self.files = sorted(((path, rank[c]) for path, c in self.files), key=lambda one: (one[1], one[0]))
            which = [which[c] for c in order]
        self.classes = [IMAGENET_NAMES[c] for c in which]
        self.imagenet = [[c] for c in which]


class ObjectNet(FolderImages):
    """The 113 classes of ObjectNet that ImageNet has as well, without the red frame of its images.

    Args:
        root: Folder with ``images/`` and ``mappings/``, as ObjectNet is distributed.

    Raises:
        FileNotFoundError: if one of them is not there.
    """

    def __init__(self, root: str) -> None:
        super().__init__(str(Path(root) / "images"), border=2)
        maps = [
            Path(root) / "mappings" / name
            for name in ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
        ]
        for path in maps:
            if not path.is_file():
                raise MissingFile(f"data: no {str(path)!r}, which belongs to ObjectNet")
        label_of, shared = (json.loads(path.read_text()) for path in maps)
        names = [label_of.get(folder) for folder in self.classes]
        kept = [c for c, name in enumerate(names) if name in shared]
        if not kept:
            raise UserError(f"data: no folder in {root!r} is a class that ImageNet has as well")
        rank = {c: r for r, c in enumerate(kept)}
        self.files = [(path, rank[c]) for path, c in self.files if c in rank]
        self.classes = [str(names[c]) for c in kept]
        self._shared = {name: shared[name].split("; ") for name in self.classes}
        self._mappings = Path(root) / "mappings"

    @property
    def imagenet(self) -> list[list[int]]:
        """Which of ImageNet's 1,000 classes each class is: one or several.

        Raises:
            FileNotFoundError: if a file of the mapping is not there.
            ValueError: if the files do not fit together.
        """
        names, order = self._mappings / "imagenet_to_label_2012_v2", self._mappings / "pytorch_to_imagenet_2012_id.json"
        for path in (names, order):
            if not path.is_file():
                raise MissingFile(f"data: no {str(path)!r}, which belongs to ObjectNet")
        line_of = {name.strip(): line for line, name in enumerate(names.read_text().splitlines())}
        class_of = {line: int(c) for c, line in json.loads(order.read_text()).items()}
        try:
            return [[class_of[line_of[name]] for name in self._shared[one]] for one in self.classes]
        except KeyError as error:
            raise UserError(f"data: {error} of ObjectNet's mapping is no class in {str(names)!r}") from error


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


class ZeroShotDataModule(ByArguments, L.LightningDataModule):
    """A test set for zero-shot classification: of torchvision by its name, folders of images, or shards.

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
        seed: For ``per_class``.
        border: Pixels to cut off each side of an image in a folder, before resizing.
        crop: ``covering``: shortest edge resized, centre cropped, as for Stable Diffusion; ``published``: as the
            published DiT networks want it (:func:`~lightning_diffclf.data.images.published_crop`).

    Raises:
        ValueError: if the name is unknown, numbers are out of range, or names are not as many as classes.
        FileNotFoundError: from ``setup``, if the data are not there.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
        "download": "nor on how they came here",
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
    ) -> None:
        super().__init__()
        if name not in ("folder", "webdataset", *PUBLIC_SETS):
            raise UserError(f"data: {name!r}, expected 'folder', 'webdataset' or one of {sorted(PUBLIC_SETS)}")
        if name == "webdataset" and (per_class is not None or subset is not None):
            raise UserError("data: shards are read in order, expected no subset and no per_class with 'webdataset'")
        check_at_least(1, eval_batch_size=eval_batch_size)
        check_at_least(0, num_workers=num_workers)
        if per_class is not None and (per_class < 1 or subset is not None):
            raise UserError(f"per_class: {per_class}, expected at least 1, and no subset file beside it")
        self.save_hyperparameters()
        self.name: str = name
        self.root, self._given_size = root, (size, size) if isinstance(size, int) else size
        self.eval_batch_size, self.num_workers, self.download = eval_batch_size, num_workers, download
        self._names, self.subset, self.per_class, self.seed, self.border = class_names, subset, per_class, seed, border
        self.crop: Any = crop
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
        try:
            return PUBLIC_SETS[self.name].open(self.root, self.download)
        except RuntimeError as error:  # torchvision's, for what is not there
            raise MissingFile(f"data: no {self.name} in {self.root!r}; set download, or give its root") from error

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

    def setup(self, stage: str | None = None) -> None:
        prepare = own_preparation(self._given_size, self.trainer) or transform(*self.size, self.crop)
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
