"""Parquet files that together are one table, an image a row: read a few megabytes at a time, each image once.

Of a row that is in several files, the first counts. Only the ids of all rows are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_diffclf.errors import UserError
from lightning_diffclf.results.seal import Damaged, check_seal, sealed_writer

CHUNK_BYTES = 2**25  # what is read at a time, about; twice as much is in memory while it is put in order

ROW_GROUP_BYTES = 2**24  # of a file that is written: what its readers have to hold

CHECKED_TOGETHER = 64  # rows that are in several files


class Vanished(FileNotFoundError):
    """A file that was there is gone or another one: the run has ended meanwhile, and holds its rows in another file."""


class _Group(NamedTuple):
    """A row group of a file."""

    path: Path
    stamp: tuple[int, int, int]  # of the file, by which another one of that name is told apart
    number: int


class Parts:
    """Files with columns in common, among them ``id``.

    Args:
        paths: The files.
        schema: The columns, and the metadata that :meth:`write` gives; a file that lacks a column has null there. That
            of the first file with images if omitted.
        check: Raises UserError where a file is not what was expected; given its path and its schema.
        agree: Raises UserError where two tables disagree about the same images.

    Attributes:
        ids: Id of each row, each image once, in the order of the files.

    Raises:
        Vanished: from here and all methods, if a file is gone.
        UserError: if a file cannot be read, or what ``check`` and ``agree`` raise.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        schema: pa.Schema | None = None,
        check: Callable[[Path, pa.Schema], None] = lambda path, schema: None,
        agree: Callable[[pa.Table, pa.Table], None] | None = None,
    ) -> None:
        self._groups: list[_Group] = []
        sizes, ids = [0], []
        for path in paths:
            stamp = _stamp(path)
            with _reading(path) as file:
                check(path, file.schema_arrow)
                if schema is None and (file.metadata.num_rows or path == paths[-1]):
                    schema = file.schema_arrow
                for number in range(file.num_row_groups):
                    some = file.read_row_group(number, columns=["id"])["id"].to_pylist()
                    self._groups.append(_Group(path, stamp, number))
                    sizes.append(len(some))
                    ids += some
        self.schema, self._starts = schema or pa.schema([]), np.cumsum(sizes)
        first_of: dict[str, int] = {}
        again = [row for row, image_id in enumerate(ids) if first_of.setdefault(image_id, row) != row]
        if agree is not None:
            for begin in range(0, len(again), CHECKED_TOGETHER):
                some_again = again[begin : begin + CHECKED_TOGETHER]
                agree(self._take([first_of[ids[row]] for row in some_again]), self._take(some_again))
        self.ids, self._rows = list(first_of), np.array(list(first_of.values()), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def tables(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows, each image once, a row group at a time in the order of the files.

        Args:
            columns: Those to read, in the order of the schema; all if omitted.
        """
        for number, (begin, end) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            here = self._rows[np.searchsorted(self._rows, begin) : np.searchsorted(self._rows, end)] - begin
            table = self._read(number, columns)
            yield table if len(here) == len(table) else table.take(pa.array(here))

    def ordered(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows, each image once, ordered by id, some :data:`CHUNK_BYTES` at a time."""
        rows, begin, size = self._rows[order_by_id(self.ids)], 0, 1
        while begin < len(rows):
            table = self._take(rows[begin : begin + size], columns)
            begin += size
            size = min(8 * size, _rows_of(CHUNK_BYTES, table))  # rows may be larger than those before
            yield table

    def write(self, path: Path, **settings: Any) -> None:
        """Write all rows to one file, ordered by id.

        Args:
            path: The file; may be one of the parts.
            **settings: Of ``pyarrow.parquet.ParquetWriter``.

        Raises:
            FailedWrite: if it cannot be written.
        """
        with sealed_writer(path, self.schema, "results", **settings) as out:
            for table in self.ordered():
                out.write_table(table, _rows_of(ROW_GROUP_BYTES, table))

    def _take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows by their numbers over all files, in the order given."""
        wanted = np.asarray(rows)
        group_of = np.searchsorted(self._starts, wanted, side="right") - 1
        by_group = np.argsort(group_of, kind="stable")
        taken = []
        for number in np.unique(group_of):
            here = wanted[by_group[group_of[by_group] == number]] - self._starts[number]
            taken.append(self._read(number, columns).take(pa.array(here)))
        return pa.concat_tables(taken).take(pa.array(np.argsort(by_group)))

    def _read(self, number: int, columns: Sequence[str] | None) -> pa.Table:
        path, stamp, group = self._groups[number]
        fields = [field for field in self.schema if columns is None or field.name in columns]
        with _reading(path) as file:
            if _stamp(path) != stamp:
                raise Vanished(path)
            there = set(file.schema_arrow.names)
            table = file.read_row_group(group, columns=[field.name for field in fields if field.name in there])
        arrays = [table[field.name] if field.name in there else pa.nulls(len(table), field.type) for field in fields]
        return pa.table(arrays, schema=pa.schema(fields))


@contextmanager
def _reading(path: Path) -> Iterator[pq.ParquetFile]:
    """An open Parquet file; what goes wrong with it is told with its name."""
    try:
        check_seal(path)
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError as error:
        raise Vanished(path) from error
    except (Damaged, pa.ArrowException, OSError) as error:
        raise UserError(
            f"run: {str(path)!r} cannot be read ({error}); remove it, and its images will be evaluated again"
        ) from error


def _rows_of(size: int, table: pa.Table) -> int:
    """How many rows as those of ``table`` have so many bytes."""
    return max(1, int(size * len(table) / max(1, table.nbytes)))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise Vanished(path) from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def order_by_id(ids: Sequence[str]) -> np.ndarray:
    """Positions (N,) that sort ids: as numbers where all are."""
    numeric = all(i.removeprefix("-").isdecimal() for i in ids)
    return np.array(sorted(range(len(ids)), key=lambda row: int(ids[row]) if numeric else ids[row]), dtype=np.int64)
