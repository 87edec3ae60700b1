"""Data sets of the Hugging Face Hub in Parquet: images, labels and names of classes in files of one form.

That is how ``datasets`` keeps them, which is not needed to read them: a column of images (their bytes), a column of
labels, and in the file's metadata what the labels are called. A file of others is data: nothing it names is opened.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import Dataset

from lightning_diffclf.data.images import decode_image
from lightning_diffclf.data.tar import MAX_MEMBER
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import MissingFile, UserError, first_line

MAX_ROWS = 50_000_000  # a few bytes may claim any number
MAX_GROUP = 2**35  # bytes of a row group, as it says itself
TRAINING = "train"  # the split that is trained on
BATCH = 16  # rows that are in memory at once

FEATURES = b"huggingface"  # where ``datasets`` says in a file what its columns are


def find_parquet(source: str, split: str, config: str | None = None, revision: str | None = None) -> list[Path]:
    """The files of a split, in order: of a folder, of a data set on the Hub, or one file.

    A file belongs to a split if its name or that of its folder says so: ``data/test-00000-of-00002.parquet``,
    ``default/test/0000.parquet``.

    Args:
        source: Folder, file, or ``OWNER/NAME`` of a data set on the Hub.
        split: Such as ``test``.
        config: Folder of one of several data sets in the same repository.
        revision: Branch, tag or commit; ``refs/convert/parquet`` has data sets that are kept in another form.

    Raises:
        FileNotFoundError: if there are none.
    """
    root = Path(source)
    if root.is_file():
        return [root]
    if not root.is_dir():
        root = _download(source, split, revision)
    files = sorted(root.rglob("*.parquet"))
    said = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
    found = [path for path in files if said.search(path.relative_to(root).as_posix())]
    if config is not None:
        found = [path for path in found if path.relative_to(root).parts[0] == config]
    if not found:
        there = [path.relative_to(root).as_posix() for path in files[:3]]
        raise MissingFile(
            f"data: {source!r} has no Parquet files of split {split!r} (config {config!r}); found {there}"
        )
    return found


def _download(name: str, split: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # slow to import

    patterns = [f"*{split}*.parquet", f"*{split}/*.parquet"]
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # of the Hub: errors of requests are OSErrors, of names ValueErrors
        raise MissingFile(
            f"data: no folder {name!r}, and the Hub did not give a data set of that name ({first_line(error)})"
        ) from error


class ParquetImages(Dataset[tuple[Image.Image, int]]):
    """Images of Parquet files, in their order; made for being read from the first to the last.

    Args:
        files: The files, all with the same columns.
        image: Column of images: their bytes, or a structure with ``bytes``.
        label: Column of labels: whole numbers, or names.

    Attributes:
        classes: Name of each class; the labels' own where they are names, else as the metadata say; empty if unknown.
        targets: Label of each image.

    Raises:
        ValueError: if a file cannot be read, lacks a column, or has labels that are none.
    """

    def __init__(self, files: list[Path], image: str = "image", label: str = "label") -> None:
        self.root, self.files, self.image = str(files[0].parent), files, image
        self._ends: list[int] = []  # of each row group, in images
        self._groups: list[tuple[int, int]] = []  # file and number of each
        tables = [self._look(number, label) for number in range(len(files))]
        values = pa.chunked_array([chunk for table in tables for chunk in table.chunks])
        self.classes = self._names(values, label)
        if pa.types.is_integer(values.type):
            self.targets: list[int] = values.to_pylist()
        else:
            place = {name: c for c, name in enumerate(self.classes)}
            self.targets = [place[name] for name in values.to_pylist()]
        self._reader: tuple[int, int, int, Iterator[Any], list[Any]] | None = None

    def identity(self) -> dict[str, Any]:
        """Which images there are, by files and their row groups, and their labels."""
        return {"files": [path.name for path in self.files], "rows": self._ends, "labels": self.targets}

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None}  # of this process

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        what = f"image: row {index} of {self.root!r}"
        row = self._row(index)
        content = row.get("bytes") if isinstance(row, dict) else row
        if not isinstance(content, bytes) or not 0 < len(content) <= MAX_MEMBER:
            raise UserError(f"{what} has no bytes in column {self.image!r}, expected an image in the file itself")
        return decode_image(BytesIO(content), what), self.targets[index]

    def _look(self, number: int, label: str) -> pa.ChunkedArray:
        """Labels of a file; notes its row groups."""
        path = self.files[number]
        try:
            with pq.ParquetFile(path) as file:
                metadata, names = file.metadata, file.schema_arrow.names
                missing = [name for name in (self.image, label) if name not in names]
                if missing:
                    raise UserError(f"it has no column {missing[0]!r}, but {', '.join(map(repr, names[:10]))}")
                rows = metadata.num_rows + (self._ends[-1] if self._ends else 0)
                if rows > MAX_ROWS:
                    raise UserError(f"{rows:,} rows, expected at most {MAX_ROWS:,}")
                for group in range(metadata.num_row_groups):
                    found = metadata.row_group(group)
                    if found.total_byte_size > MAX_GROUP:
                        raise UserError(f"row group {group} of more than {MAX_GROUP:,} bytes")
                    self._ends.append((self._ends[-1] if self._ends else 0) + found.num_rows)
                    self._groups.append((number, group))
                values: pa.ChunkedArray = file.read(columns=[label])[label]
        except UserError as error:
            raise UserError(f"data: {str(path)!r} cannot be read ({error})") from error
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise UserError(f"data: {str(path)!r} cannot be read ({first_line(error)[:200]})") from error
        if values.null_count or not (pa.types.is_integer(values.type) or pa.types.is_string(values.type)):
            raise UserError(
                f"data: column {label!r} of {str(path)!r} is {values.type} with {values.null_count} empty values, "
                "expected whole numbers or names"
            )
        return values

    def _names(self, values: pa.ChunkedArray, label: str) -> list[str]:
        if pa.types.is_string(values.type):
            return sorted(pc.unique(values).to_pylist())
        with pq.ParquetFile(self.files[0]) as file:
            kept = (file.schema_arrow.metadata or {}).get(FEATURES, b"{}")
        try:
            names = json.loads(kept)["info"]["features"][label]["names"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return []
        return [str(name) for name in names] if isinstance(names, list) else []

    def _row(self, index: int) -> Any:
        """What the column of images has in a row; goes on from the last one that was asked for."""
        group = bisect_right(self._ends, index)
        start = self._ends[group - 1] if group else 0
        if self._reader is None or self._reader[:2] != (os.getpid(), group) or index < self._reader[2]:
            self._reader = (os.getpid(), group, start, self._batches(group), [])
        pid, _, first, batches, rows = self._reader
        try:
            while index >= first + len(rows):
                first, rows = first + len(rows), next(batches)
        except (pa.ArrowException, OSError, StopIteration) as error:
            path = self.files[self._groups[group][0]]
            raise UserError(f"data: {str(path)!r} cannot be read ({first_line(error)[:200]})") from error
        self._reader = (pid, group, first, batches, rows)
        return rows[index - first]

    def _batches(self, group: int) -> Iterator[list[Any]]:
        number, part = self._groups[group]
        with pq.ParquetFile(self.files[number]) as file:
            for batch in file.iter_batches(BATCH, row_groups=[part], columns=[self.image]):
                yield batch.column(0).to_pylist()


class ParquetDataModule(ZeroShotDataModule):
    """A data set of the Hub in Parquet, or a folder of such files: to be classified, or to train on.

    Training reads images of the split ``train`` in any order, and for each its row group from the beginning:
    ``datasets`` writes row groups of 100 images; of much larger ones it would take long.

    Args:
        source: ``OWNER/NAME`` of a data set on the Hub, a folder of ``.parquet`` files, or one file.
        split: Which of its splits.
        image: Column of images.
        label: Column of labels.
        config: Folder of one of several data sets in the same repository.
        revision: Branch, tag or commit of the repository; ``refs/convert/parquet`` where its files are of another form.
        class_names: Names in place of those in the files.
        size: As for :class:`~.zero_shot.ZeroShotDataModule`, here and below.
        eval_batch_size: Images in a batch of one process.
        num_workers: Processes that read images.
        subset: File with the positions to use, one in each line.
        per_class: So many images of each class, chosen by ``seed``.
        seed: For ``per_class``, and for the order of training images.
        crop: ``covering`` or ``published``.
        batch_size: Images in one optimizer step of a training on those of ``train``, prepared as those of the test set.
        flip: Mirror every other training image.

    Raises:
        ValueError: if a number is out of range; later, if a file cannot be read, or classes have no names.
        FileNotFoundError: later, if there are no files of the split.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
        "batch_size": "of training",
        "flip": "of training",
    }

    def __init__(
        self,
        source: str,
        split: str = "test",
        image: str = "image",
        label: str = "label",
        config: str | None = None,
        revision: str | None = None,
        class_names: list[str] | None = None,
        size: int | tuple[int, int] | None = None,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        subset: str | None = None,
        per_class: int | None = None,
        seed: int = 0,
        crop: Literal["covering", "published"] = "covering",
        batch_size: int = 64,
        flip: bool = False,
    ) -> None:
        super().__init__(
            "folder",
            source,
            size=size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            class_names=class_names,
            subset=subset,
            per_class=per_class,
            seed=seed,
            crop=crop,
            batch_size=batch_size,
            flip=flip,
        )
        self.save_hyperparameters(logger=False)  # class_names is an argument of networks too, and may differ
        self._where = source, split, config, revision
        self._columns = image, label

    def _open_training(self) -> ParquetImages:
        source, _, config, revision = self._where
        if Path(source).is_file():
            raise UserError(
                f"data: {source!r} is one file, expected a folder or repository with one for {TRAINING!r} too"
            )
        return ParquetImages(find_parquet(source, TRAINING, config, revision), *self._columns)

    def _open(self) -> ParquetImages:
        source = ParquetImages(find_parquet(*self._where), *self._columns)
        if not source.classes and self._names is None:
            raise UserError(f"class_names: none given, and {source.root!r} does not say what its labels are called")
        source.classes = source.classes or list(self._names or [])
        low, high, count = min(source.targets, default=0), max(source.targets, default=0), len(source.classes)
        if not source.targets or low < 0 or high >= count:
            found = f"labels {low} … {high} of {len(source):,} images in {source.root!r}"
            raise UserError(f"data: {found}, expected some of 0 … {count - 1}")
        return source

    def contents(self) -> dict[str, Any]:
        return super().contents() | {"source": self.source}
