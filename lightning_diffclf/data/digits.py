"""Handwritten digits, shipped inside scikit-learn: real data that needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf.data.stream import evaluation_loader, some_images, training_loader
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.identity import ByArguments

TEST_SIZE = 360


class InMemoryImages(Dataset[dict[str, Tensor]]):
    """Images in memory; a batch is taken out by one indexing operation for each of its parts.

    Args:
        image: (N, C, H, W).
        label: (N,), int64; None if they have none.
        id: (N,), int64.
    """

    def __init__(self, image: Tensor, label: Tensor | None, id: Tensor) -> None:
        self.parts = {"image": image, "id": id} | ({} if label is None else {"label": label})

    def __len__(self) -> int:
        return len(self.parts["id"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: part[index] for name, part in self.parts.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: part[torch.tensor(indices)] for name, part in self.parts.items()}


class DigitsDataModule(ByArguments, L.LightningDataModule):
    """The 1,797 handwritten digits of scikit-learn (8 × 8 pixels, 17 grey levels), 1,437 to train on and 360 to test.

    The split is fixed and stratified. The 360 test images also serve ``validate`` and ``predict``; nothing is selected
    on them as long as the last checkpoint is used, as the demo does. Batches are mappings with ``image`` (B, 1, 8, 8),
    float32 in [-1, 1], ``label`` (B,) and ``id`` (B,), the row in scikit-learn's data set, both int64. Under DDP,
    evaluation shares are disjoint and complete. Training has no epochs: see :mod:`~lightning_diffclf.data.stream`.

    Args:
        batch_size: Training images in one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Test images in a batch of one process.
        seed: Key of the order of training images.
        left_out: Digits that are none of the classes: the others are classes 0, 1, … in ascending order, and
            ``predict`` sees all images of those left out, without labels, in place of the test images.

    Raises:
        ValueError: if a batch size is below 1, or what is left out are not different digits that leave one.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "batch_size": "of training",
        "eval_batch_size": "results do not depend on how images are batched",
        "seed": "of the order of training images",
    }

    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(
        self, batch_size: int = 256, eval_batch_size: int = 60, seed: int = 0, left_out: Sequence[int] = ()
    ) -> None:
        super().__init__()
        check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        if len(set(left_out)) < len(left_out) or not set(left_out) < set(range(10)):
            raise UserError(f"left_out: {list(left_out)}, expected different digits, fewer than ten")
        self.save_hyperparameters()
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self._digits = [digit for digit in range(10) if digit not in left_out]  # that are classes
        if left_out:
            self.num_classes, self.class_names = len(self._digits), tuple(map(str, self._digits))

    def setup(self, stage: str | None = None) -> None:
        pixels, digits = load_digits(return_X_y=True)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # 0 … 16 to [-1, 1]
        labels = torch.tensor(digits, dtype=torch.int64)
        rows = train_test_split(torch.arange(len(labels)), test_size=TEST_SIZE, random_state=0, stratify=digits)
        class_of = torch.full((10,), -1).index_copy(0, torch.tensor(self._digits), torch.arange(len(self._digits)))
        classes = class_of[labels]
        known = [part[classes[part] >= 0] for part in rows]
        self.train, self.test = (InMemoryImages(images[part], classes[part], part) for part in known)
        others = torch.arange(len(labels))[classes < 0]
        self.outside = None if len(others) == 0 else InMemoryImages(images[others], None, others)

    def contents(self) -> dict[str, Any]:
        if not hasattr(self, "test"):
            self.setup()
        return {"test": self.test.parts} | ({} if self.outside is None else {"outside": self.outside.parts})

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        train = self.train

        def take(indices: list[int], positions: list[int]) -> dict[str, Tensor]:
            return train.__getitems__(indices)

        return training_loader(len(train), take, self.batch_size, self.seed, self.trainer)

    def training_images(self, count: int) -> DataLoader[dict[str, Tensor]]:
        """See :class:`~.protocols.HasTrainingImages`."""
        return some_images(self.train, count, self.eval_batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return evaluation_loader(self.test, self.eval_batch_size, self.trainer)

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        if self.outside is None:
            return self.val_dataloader()
        return evaluation_loader(self.outside, self.eval_batch_size, self.trainer)


class DigitPairsDataModule(DigitsDataModule):
    """Two handwritten digits side by side, 8 × 16 pixels: 100 classes, 10 · left + right, from the same scans.

    Pairs are made of the digits that :class:`DigitsDataModule` trains on, and test pairs of those that it tests on;
    which digits meet is fixed. All classes occur equally often, as far as the numbers of pairs allow. ``id`` is the
    position in the set.

    Args:
        train_pairs: Pairs to train on.
        test_pairs: Pairs to test on.
        batch_size: Training images in one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Test images in a batch of one process.
        seed: Key of the order of training images.

    Raises:
        ValueError: if a number is below 1.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        **DigitsDataModule.CANNOT_CHANGE_RESULTS,
        "train_pairs": "of training; an evaluation that fits a probe to them says so itself",
    }

    num_classes = 100
    class_names = tuple(f"{left}{right}" for left in range(10) for right in range(10))

    def __init__(
        self,
        train_pairs: int = 50_000,
        test_pairs: int = 500,
        batch_size: int = 256,
        eval_batch_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check_at_least(1, train_pairs=train_pairs, test_pairs=test_pairs)
        self.save_hyperparameters()
        self.train_pairs, self.test_pairs = train_pairs, test_pairs

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.train, self.test = _rows(self.train, 2, self.train_pairs, 0), _rows(self.test, 2, self.test_pairs, 1)


class DigitTriplesDataModule(DigitsDataModule):
    """Three handwritten digits in a row, 8 × 24 pixels: 1,000 classes, 100 · left + 10 · middle + right.

    Made as :class:`DigitPairsDataModule` makes pairs, from the same scans.

    Args:
        train_triples: Triples to train on.
        test_triples: Triples to test on.
        batch_size: Training images in one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Test images in a batch of one process.
        seed: Key of the order of training images.

    Raises:
        ValueError: if a number is below 1.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        **DigitsDataModule.CANNOT_CHANGE_RESULTS,
        "train_triples": "of training; an evaluation that fits a probe to them says so itself",
    }

    num_classes = 1000
    class_names = tuple(f"{number:03}" for number in range(1000))

    def __init__(
        self,
        train_triples: int = 200_000,
        test_triples: int = 1000,
        batch_size: int = 256,
        eval_batch_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed)
        check_at_least(1, train_triples=train_triples, test_triples=test_triples)
        self.save_hyperparameters()
        self.train_triples, self.test_triples = train_triples, test_triples

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        self.train, self.test = _rows(self.train, 3, self.train_triples, 0), _rows(self.test, 3, self.test_triples, 1)


def _rows(digits: InMemoryImages, places: int, count: int, seed: int) -> InMemoryImages:
    """Images of ``places`` digits beside each other; the label is the number that they make, in turn 0 … 10^places - 1.

    Args:
        digits: Images of single digits.
        places: Digits in a row.
        count: Images to make.
        seed: Key of which scans meet.
    """
    image, digit = digits.parts["image"], digits.parts["label"]
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 10**places
    by_digit, size = digit.argsort(stable=True), torch.bincount(digit)
    scans = []
    for place in reversed(range(places)):
        wanted = label // 10**place % 10
        pick = (torch.rand(count, generator=generator) * size[wanted]).long()  # which of the scans of that digit
        scans.append(by_digit[size.cumsum(0)[wanted] - 1 - pick])
    return InMemoryImages(torch.cat([image[scan] for scan in scans], dim=3), label, torch.arange(count))
