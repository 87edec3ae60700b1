"""MedMNIST: medical images of 28 to 224 pixels in one file for each set (Yang et al. 2023); no package is needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import MissingFile, UserError, first_line

MAX_ARRAY = 2**35  # bytes; the largest set at 224 pixels has 16 GB of training images

ORGANS = (
    "bladder", "left femur", "right femur", "heart", "left kidney", "right kidney", "liver", "left lung", "right lung",
    "pancreas", "spleen",
)  # fmt: skip
CLASSES: dict[str, tuple[str, ...]] = {
    "pathmnist": (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "breastmnist": ("malignant", "normal or benign"),
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte", "neutrophil",
        "platelet",
    ),
    "tissuemnist": (
        "collecting duct or connecting tubule", "distal convoluted tubule", "glomerular endothelial cells",
        "interstitial endothelial cells", "leukocytes", "podocytes", "proximal tubule segments",
        "thick ascending limb",
    ),
    "organamnist": ORGANS, "organcmnist": ORGANS, "organsmnist": ORGANS,
}  # fmt: skip


class MedMNISTImages(Dataset[tuple[Image.Image, int]]):
    """Images of one split of a file of MedMNIST.

    Args:
        path: The file, such as ``pathmnist.npz`` or ``pathmnist_224.npz``.
        split: ``train``, ``val`` or ``test``.

    Attributes:
        classes: Name of each class, by the name of the file; empty if it is unknown.
        targets: Label of each image.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is none of MedMNIST's, of volumes, or has several labels for an image.
    """

    def __init__(self, path: str | Path, split: str = "test") -> None:
        path = Path(path)
        if not path.is_file():
            raise MissingFile(f"data: no file {str(path)!r}, expected one of MedMNIST, such as pathmnist.npz")
        self.root, self.split = str(path), split
        names = f"{split}_images", f"{split}_labels"
        try:
            with np.load(path, allow_pickle=False) as file:
                large = [part.filename for part in file.zip.infolist() if part.file_size > MAX_ARRAY]
                if large:
                    raise UserError(f"{large[0]} has more than {MAX_ARRAY:,} bytes")
                self._images, labels = (file[name] for name in names)
        except Exception as error:  # of a damaged file numpy and zipfile raise what comes
            reason = first_line(error)[:200]
            raise UserError(f"data: {str(path)!r} cannot be read ({reason}), expected {' and '.join(names)}") from error
        shape = self._images.shape
        if self._images.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
            found = f"{self._images.dtype} {shape}"
            raise UserError(f"data: {names[0]} of {str(path)!r} are {found}, expected uint8 (N, H, W) or (N, H, W, 3)")
        if labels.dtype.kind not in "iu" or labels.shape not in ((shape[0],), (shape[0], 1)):
            found = f"{labels.dtype} {labels.shape}"
            raise UserError(f"data: {names[1]} of {str(path)!r} are {found}, expected one whole number for each image")
        self.targets: list[int] = labels.reshape(-1).tolist()
        self.classes = list(CLASSES.get(re.sub(r"_\d+$", "", path.stem), ()))

    def identity(self) -> dict[str, Any]:
        """The images and their labels."""
        return {"images": self._images, "labels": self.targets}

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]), self.targets[index]


class MedMNISTDataModule(ZeroShotDataModule):
    """A set of MedMNIST with one label for each image.

    Files are at https://zenodo.org/records/10519652; ``pip install medmnist`` downloads them too.

    Args:
        path: The file, such as ``data/pathmnist.npz`` or ``data/pathmnist_224.npz``.
        split: Which part is classified.
        class_names: Name of each class, where the file has another name than MedMNIST's, or in place of MedMNIST's.
        size: As for :class:`~.zero_shot.ZeroShotDataModule`, here and below.
        eval_batch_size: Images in a batch of one process.
        num_workers: Processes that prepare images.
        per_class: So many images of each class, chosen by ``seed``.
        seed: For ``per_class``, and for the order of training images.
        batch_size: Images in one optimizer step of a training on those of ``train``, prepared as those of ``split``.
            To validate on others than are tested: ``split: val`` in training, ``test`` in the evaluation.
        flip: Mirror every other training image.

    Raises:
        FileNotFoundError: later, if there is no such file.
        ValueError: if a number is out of range; later, if the file is of another kind, or classes have no names.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "path": "its images are in `source`",
        "split": "its images are in `source`",
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
        "batch_size": "of training",
        "flip": "of training",
    }

    def __init__(
        self,
        path: str,
        split: Literal["train", "val", "test"] = "test",
        class_names: list[str] | None = None,
        size: int | tuple[int, int] | None = None,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        per_class: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        flip: bool = False,
    ) -> None:
        super().__init__(
            "folder",
            path,
            size=size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            class_names=class_names,
            per_class=per_class,
            seed=seed,
            batch_size=batch_size,
            flip=flip,
        )
        self.save_hyperparameters(logger=False)  # class_names is an argument of networks too, and may differ
        self.split = split

    def _open_training(self) -> MedMNISTImages:
        return MedMNISTImages(self.root, "train")

    def _open(self) -> MedMNISTImages:
        source = MedMNISTImages(self.root, self.split)
        source.classes = source.classes or list(self._names or [])
        low, high = min(source.targets, default=0), max(source.targets, default=0)
        if not source.classes:
            raise UserError(f"class_names: none given, and {self.root!r} is no name of MedMNIST: {', '.join(CLASSES)}")
        if low < 0 or high >= len(source.classes):
            raise UserError(f"data: labels {low} … {high} in {self.root!r}, expected 0 … {len(source.classes) - 1}")
        return source

    def contents(self) -> dict[str, Any]:
        return super().contents() | {"source": self.source}
