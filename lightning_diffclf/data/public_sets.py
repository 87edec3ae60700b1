"""The paper's data sets and others of torchvision, and images in folders: how they are opened, their classes' names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import ImageNetInfo
from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets
from torchvision.models._meta import _IMAGENET_CATEGORIES

from lightning_diffclf.data.images import find_images, open_image
from lightning_diffclf.errors import MissingFile, UserError

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

PARTS = ("train", "val", "test")  # of a data set, as folders are called


class PublicSet(NamedTuple):
    """A data set of torchvision.

    Attributes:
        open: Opens its test images in a folder; whether to download them.
        names: What its classes are called.
        train: Opens its training images; None if it has no such part.
    """

    open: Callable[[str, bool], Any]
    names: Callable[[Any], Sequence[str]]
    train: Callable[[str, bool], Any] | None = None


def _pet(name: str) -> str:
    # The paper's prompts append the species (the American Bulldog has none there).
    species = "cat" if name in CATS else "dog"
    return name if name.lower() == "american bulldog" else f"{name} {species}"


PUBLIC_SETS: dict[str, PublicSet] = {
    "food101": PublicSet(
        lambda root, get: datasets.Food101(root, "test", download=get),
        lambda d: [c.replace("_", " ") for c in d.classes],
        lambda root, get: datasets.Food101(root, "train", download=get),
    ),
    "cifar10": PublicSet(
        lambda root, get: datasets.CIFAR10(root, False, download=get),
        lambda d: d.classes,
        lambda root, get: datasets.CIFAR10(root, True, download=get),
    ),
    "cifar100": PublicSet(
        lambda root, get: datasets.CIFAR100(root, False, download=get),
        lambda d: [c.replace("_", " ") for c in d.classes],
        lambda root, get: datasets.CIFAR100(root, True, download=get),
    ),
    "aircraft": PublicSet(
        lambda root, get: datasets.FGVCAircraft(root, "test", "variant", download=get),
        lambda d: d.classes,
        lambda root, get: datasets.FGVCAircraft(root, "trainval", "variant", download=get),
    ),
    "pets": PublicSet(
        lambda root, get: datasets.OxfordIIITPet(root, "test", download=get),
        lambda d: [_pet(c) for c in d.classes],
        lambda root, get: datasets.OxfordIIITPet(root, "trainval", download=get),
    ),
    "flowers102": PublicSet(
        lambda root, get: datasets.Flowers102(root, "test", download=get),
        lambda d: d.classes,
        lambda root, get: ConcatDataset([datasets.Flowers102(root, part, download=get) for part in ("train", "val")]),
    ),
    "stl10": PublicSet(
        lambda root, get: datasets.STL10(root, "test", download=get),
        lambda d: d.classes,
        lambda root, get: datasets.STL10(root, "train", download=get),
    ),
    "mnist": PublicSet(
        lambda root, get: datasets.MNIST(root, False, download=get),
        lambda d: DIGITS,
        lambda root, get: datasets.MNIST(root, True, download=get),
    ),
    "caltech101": PublicSet(
        lambda root, get: datasets.Caltech101(root, download=get), lambda d: [c.replace("_", " ") for c in d.categories]
    ),
    "imagenet": PublicSet(
        lambda root, get: ImageNetFolders(root),
        lambda d: d.classes,
        lambda root, get: ImageNetFolders(str(Path(root).parent / "train")),
    ),
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
        ValueError: if it has no folders with images, or those of a data set's parts, which hold those of the classes.
    """

    form = "one with a folder of images for each class"

    def __init__(self, root: str, border: int = 0) -> None:
        folder = Path(root)
        if not folder.is_dir():
            raise MissingFile(f"data: no folder {root!r}, expected {self.form}")
        self.root, self.border = root, border
        names = sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith("."))
        if not names:
            raise UserError(f"data: {root!r} has no folders, expected one for each class")
        if set(names) <= set(PARTS) and all(any(one.is_dir() for one in (folder / name).iterdir()) for name in names):
            found = ", ".join(map(repr, names))
            raise UserError(
                f"data: {root!r} has the parts of a data set ({found}), expected one folder for each class, such as "
                f"those in {str(folder / names[0])!r}"
            )
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

    form = (
        "ImageNet's validation images in a folder for each WordNet id (image-net.org, an account), or those of "
        "ImageNet-V2 (github.com/modestyachts/ImageNetV2) or -A (github.com/hendrycks/natural-adv-examples)"
    )

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

    form = "images/ and mappings/ as objectnet.dev gives them (its terms forbid training on them)"

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
