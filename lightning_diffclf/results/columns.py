"""Stored decisions by column: what sums over many images are made of, without an object for each image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_diffclf.classifier.posterior import class_differences
from lightning_diffclf.results.predictions import SCHEMA, Record

Chunk: TypeAlias = Sequence[Record] | pa.Table | pa.RecordBatch
"""Some decisions: as objects, or as columns of predictions.parquet, at least those that are asked for."""


class Lists(NamedTuple):
    """The lists of a column, one after the other.

    Attributes:
        values: All values (N,).
        row: The image of each (N,), int64.
        position: Its place in the list (N,), int64.
        length: Length of each image's list (B,), int64.
    """

    values: np.ndarray
    row: np.ndarray
    position: np.ndarray
    length: np.ndarray


class Columns:
    """Columns of some decisions (B images) as arrays.

    Args:
        chunk: The decisions.
        names: The columns that are needed; the chunk may have others.
    """

    def __init__(self, chunk: Chunk, names: Sequence[str]) -> None:
        names = list(dict.fromkeys(names))
        if isinstance(chunk, (pa.Table, pa.RecordBatch)):
            self.table = pa.table({name: chunk.column(name) for name in names})
        else:
            arrays = [pa.array([getattr(row, name) for row in chunk], SCHEMA.field(name).type) for name in names]
            self.table = pa.table(arrays, names=names)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def pieces(self, most: int) -> list[Columns]:
        """The same images, at most ``most`` together."""
        return [Columns(self.table.slice(a, most), self.table.column_names) for a in range(0, len(self), most)]

    def take(self, chosen_B: np.ndarray) -> Columns:
        """Those images for which ``chosen_B`` (B,), bool, is true."""
        return self if chosen_B.all() else Columns(self.table.filter(pa.array(chosen_B)), self.table.column_names)

    def strings(self, name: str) -> list[str]:
        """A column of text (B,)."""
        return list(self.table[name].to_pylist())

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers or truth values (B,); -1 where a class is unknown."""
        column = self.table[name]
        return np.asarray((column.fill_null(-1) if column.null_count else column).to_numpy())

    def lists(self, name: str) -> Lists:
        """A column of lists."""
        column = self.table[name].combine_chunks() if len(self) else pa.array([], self.table[name].type)
        length = np.asarray(column.value_lengths().to_numpy(), dtype=np.int64)
        row = np.repeat(np.arange(len(length)), length)
        position = np.arange(len(row)) - np.repeat(length.cumsum() - length, length)
        return Lists(np.asarray(column.flatten().to_numpy(zero_copy_only=False)), row, position, length)

    @cached_property
    def dims(self) -> int:
        """Number of values of x0, which all images of a run share; 1 without images."""
        return int(self.table["dims"][0].as_py()) if len(self) else 1

    def candidate_classes(self, classes: Sequence[int], num_classes: int) -> np.ndarray:
        """Whether a class has a candidate (B, num_classes), bool; ``classes`` says whose each candidate is."""
        candidates = self.lists("candidates_K")
        present_BC = np.zeros((len(self), num_classes), dtype=bool)
        present_BC[candidates.row, np.asarray(classes)[candidates.values]] = True
        return present_BC

    def class_differences(self, classes: Sequence[int], num_classes: int) -> Tensor:
        """:func:`~lightning_diffclf.classifier.posterior.class_differences` of all classes (B, num_classes)."""
        candidates, differences = self.lists("candidates_K"), self.lists("differences_K")
        shape = len(self), int(candidates.length.max(initial=0))
        differences_BK = np.full(shape, np.inf)
        class_BK = np.zeros(shape, dtype=np.int64)
        differences_BK[differences.row, differences.position] = differences.values
        class_BK[candidates.row, candidates.position] = np.asarray(classes)[candidates.values]
        return class_differences(torch.from_numpy(differences_BK), torch.from_numpy(class_BK), num_classes)
