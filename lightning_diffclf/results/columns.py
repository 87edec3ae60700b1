"""Stored decisions by column: what sums over many images are made of, without an object for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_diffclf.classifier.posterior import class_differences
from lightning_diffclf.results.predictions import SCHEMA, Record

CELLS = 2**18  # numbers in an array

Chunk: TypeAlias = "Sequence[Record] | pa.Table | pa.RecordBatch | Columns"
"""Some decisions: as objects, or as columns of predictions.parquet, at least those that are asked for."""


@dataclass(frozen=True)
class Lists:
    """The lists of a column, one after the other.

    Attributes:
        values: All values (N,).
        length: Length of each image's list (B,), int64.
    """

    values: np.ndarray
    length: np.ndarray

    @cached_property
    def row(self) -> np.ndarray:
        """The image of each value (N,), int64."""
        return np.repeat(np.arange(len(self.length)), self.length)

    @cached_property
    def position(self) -> np.ndarray:
        """Its place in the list (N,), int64."""
        return np.arange(len(self.values)) - np.repeat(self.length.cumsum() - self.length, self.length)

    @property
    def minimum(self) -> np.ndarray:
        """The lowest value of each image (B,); no list may be empty."""
        return np.asarray(np.minimum.reduceat(self.values, self.length.cumsum() - self.length))

    def padded(self, fill: float, kind: type) -> np.ndarray:
        """A row for each image (B, K), K the length of the longest list; ``fill`` where an image has fewer."""
        shape = len(self.length), int(self.length.max(initial=0))
        if len(self.values) == shape[0] * shape[1]:
            return self.values.astype(kind).reshape(shape)
        found_BK: np.ndarray = np.full(shape, fill, kind)
        found_BK[self.row, self.position] = self.values
        return found_BK


class Tried(NamedTuple):
    """The classes that have a candidate, and where the best one of each stands; W is no more than is needed.

    Attributes:
        classes_BW: Class of each place (B, W), int64; -1 for a place without any.
        differences_BW: As :func:`~lightning_diffclf.classifier.posterior.class_differences` has them (B, W), float64;
            infinite for a place without a class.
    """

    classes_BW: np.ndarray
    differences_BW: np.ndarray

    def has(self, class_B: np.ndarray) -> np.ndarray:
        """Where each image has a class of its own (B, W), bool."""
        return np.asarray(self.classes_BW == class_B[:, None])

    def take(self, chosen_B: np.ndarray) -> Tried:
        """Those of some images, given as ``chosen_B`` (B,), bool, or by their positions."""
        return Tried(self.classes_BW[chosen_B], self.differences_BW[chosen_B])

    def spread(self, num_classes: int) -> np.ndarray:
        """The differences with a place for each class (B, num_classes), float32; infinite for classes without any."""
        found_BC = np.full((len(self.classes_BW), num_classes + 1), np.inf, np.float32)
        np.put_along_axis(found_BC, self.classes_BW, self.differences_BW, axis=1)  # -1 is the last: of no class
        return found_BC[:, :-1]


class Counts(Protocol):
    """What is counted over all decisions, in the columns ``COLUMNS``."""

    @property
    def COLUMNS(self) -> Sequence[str]: ...

    def update(self, chunk: Chunk) -> None: ...


def show(chunk: Chunk, counts: Sequence[Counts]) -> None:
    """Let all of ``counts`` count some decisions, whose arrays are made once."""
    for columns in Columns(chunk, [name for one in counts for name in one.COLUMNS]).pieces():
        for one in counts:
            one.update(columns)


class Columns:
    """Columns of some decisions (B images) as arrays, each of which is made once, when it is asked for first.

    Args:
        chunk: The decisions.
        names: The columns that are needed; the chunk may have others.
    """

    def __init__(self, chunk: Chunk, names: Sequence[str]) -> None:
        names = list(dict.fromkeys(names))
        self.table: pa.Table
        self._labelled: Columns | None = None
        self._lists: dict[str, Lists] = {}
        self._tried: dict[tuple[tuple[int, ...], int], Tried] = {}
        if isinstance(chunk, Columns):
            self.table = chunk.table.select(names)
        elif isinstance(chunk, (pa.Table, pa.RecordBatch)):
            self.table = pa.table({name: chunk.column(name) for name in names})
        else:
            arrays = [pa.array([getattr(row, name) for row in chunk], SCHEMA.field(name).type) for name in names]
            self.table = pa.table(arrays, names=names)

    @classmethod
    def of(cls, chunk: Chunk, names: Sequence[str]) -> Columns:
        """The same; what has columns already may have others, and keeps the arrays that were made of them."""
        return chunk if isinstance(chunk, Columns) else cls(chunk, names)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def pieces(self) -> list[Columns]:
        """The same images, so many together that arrays over their candidates have :data:`CELLS` numbers at most."""
        longest = pc.max(pc.list_value_length(self.table["candidates_K"])).as_py() if len(self) else 1
        most = max(1, CELLS // max(1, longest))
        if len(self) <= most:
            return [self]
        return [Columns(self.table.slice(a, most), self.table.column_names) for a in range(0, len(self), most)]

    def take(self, chosen_B: np.ndarray) -> Columns:
        """Those images for which ``chosen_B`` (B,), bool, is true."""
        return self if chosen_B.all() else Columns(self.table.filter(pa.array(chosen_B)), self.table.column_names)

    @property
    def labelled(self) -> Columns:
        """Those with a label."""
        if self._labelled is None:
            labelled = self.take(self.numbers("label") >= 0)
            if labelled is self:  # which does not hold itself: it would stay in memory for longer
                return self
            self._labelled = labelled
        return self._labelled

    def strings(self, name: str) -> list[str]:
        """A column of text (B,)."""
        return list(self.table[name].to_pylist())

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers or truth values (B,); -1 where a class is unknown."""
        column = self.table[name]
        return np.asarray((column.fill_null(-1) if column.null_count else column).to_numpy())

    def lists(self, name: str) -> Lists:
        """A column of lists."""
        if name not in self._lists:
            self._lists[name] = self._read_lists(name)
        return self._lists[name]

    def _read_lists(self, name: str) -> Lists:
        column = self.table[name].combine_chunks() if len(self) else pa.array([], self.table[name].type)
        length = np.asarray(column.value_lengths().to_numpy(), dtype=np.int64)
        return Lists(np.asarray(column.flatten().to_numpy(zero_copy_only=False)), length)

    @cached_property
    def dims(self) -> int:
        """Number of values of x0, which all images of a run share; 1 without images."""
        return int(self.table["dims"][0].as_py()) if len(self) else 1

    def class_differences(self, classes: Sequence[int], num_classes: int) -> np.ndarray:
        """:func:`~lightning_diffclf.classifier.posterior.class_differences` of all classes (B, num_classes).

        Args:
            classes: Class index of each candidate of the denoiser.
            num_classes: Number of classes C.
        """
        differences_BK = self.lists("differences_K").padded(np.inf, np.float64)
        class_BK = np.asarray(classes)[self.lists("candidates_K").padded(0, np.int64)]
        return class_differences(differences_BK, class_BK, num_classes)

    def tried(self, classes: Sequence[int], num_classes: int) -> Tried:
        """The classes that have a candidate; arguments as of :meth:`class_differences`.

        There is a place for each candidate where no two are of one class, or where images have fewer candidates than
        there are classes; otherwise one for each class.
        """
        key = tuple(classes), num_classes
        if key not in self._tried:
            self._tried[key] = self._find_tried(classes, num_classes)
        return self._tried[key]

    def _find_tried(self, classes: Sequence[int], num_classes: int) -> Tried:
        candidates = self.lists("candidates_K")
        class_BK = np.append(np.asarray(classes), -1)[candidates.padded(-1, np.int64)]
        if len(set(classes)) == len(classes):  # nothing to compare: the candidates of an image are distinct
            differences_BK = self.lists("differences_K").padded(np.inf, np.float64)
            return Tried(class_BK, np.fmin(differences_BK, np.inf, out=differences_BK))  # of NaN and infinity, infinity
        if class_BK.shape[1] >= num_classes:
            tried_BA = np.zeros((len(self), num_classes + 1), dtype=bool)  # the last for what pads
            row_B1 = np.arange(len(self))[:, None]
            tried_BA.reshape(-1)[np.where(class_BK < 0, num_classes, class_BK) + row_B1 * (num_classes + 1)] = True
            classes_BC = np.where(tried_BA[:, :-1], np.arange(num_classes), -1)
            return Tried(classes_BC, self.class_differences(classes, num_classes))
        differences_BK = np.nan_to_num(
            self.lists("differences_K").padded(np.inf, np.float64), nan=np.inf, posinf=np.inf
        )
        order_BK = np.lexsort((differences_BK, class_BK), axis=1)
        class_BK, differences_BK = (np.take_along_axis(a, order_BK, axis=1) for a in (class_BK, differences_BK))
        again = class_BK[:, 1:] == class_BK[:, :-1]  # a worse candidate of the same class
        class_BK[:, 1:][again], differences_BK[:, 1:][again] = -1, np.inf
        return Tried(class_BK, differences_BK)
