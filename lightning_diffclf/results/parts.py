"""Files that together are one table, an image a row: read a few megabytes at a time, each image once.

Of a row that is in several files, the first counts. Only the ids of all rows are in memory, as Arrow has them: a few
bytes more than their text.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import TEMPORARY
from lightning_diffclf.results.row_files import RowFile, opened
from lightning_diffclf.results.seal import Damaged, sealed_writer

CHUNK_BYTES = 2**23  # what is read at a time, about; a few times as much is in memory while it is put in order

ROW_GROUP_BYTES = 2**23  # of a file that is written: what its readers have to hold

CHECKED_TOGETHER = 64  # rows that are in several files

AHEAD_BYTES = 2 * CHUNK_BYTES  # read before they are asked for

BATCH_BYTES = CHUNK_BYTES // 4  # read in one go: to change threads takes longer than to read a small part

SPILL_BUFFER = 2**20  # bytes that are written in one go to a temporary file

READERS = 2  # threads that read and decode: for most of that, Arrow lets others work

REMEDY = "remove it, and its images will be evaluated again"  # of a file that cannot be read

T = TypeVar("T")
R = TypeVar("R")

Seen: TypeAlias = Callable[[pa.Table], None]
"""Is given what is written."""


def unseen(table: pa.Table) -> None:
    """Nobody wants to see it."""


class Vanished(Exception):
    """A file that was there is gone or another one: the run has ended meanwhile, and holds its rows in another file.

    No OSError: where one file is made of others, those are of the file that is written.
    """


class _Group(NamedTuple):
    """A row group of a file."""

    path: Path
    stamp: tuple[int, int, int]  # of the file, by which another one of that name is told apart
    there: frozenset[str]  # names of its columns
    number: int
    row_bytes: float  # of a row in memory, about


class _File(NamedTuple):
    """What is found out about a file when it is opened first."""

    schema: pa.Schema
    groups: list[_Group]
    rows: list[pa.Table]  # of each row group, the columns that stay in memory


def _look_into(path: Path, kept: Sequence[pa.Field], remedy: str) -> _File:
    stamp = _stamp(path)
    with _reading(path, remedy) as file:
        there, fields = frozenset(file.schema.names), [file.schema.field("id"), *kept]
        groups, rows = list[_Group](), list[pa.Table]()
        for number, size in enumerate(file.group_bytes):
            rows.append(_rows(file, number, there, fields))
            groups.append(_Group(path, stamp, there, number, size / max(1, len(rows[-1]))))
        return _File(file.schema, groups, rows)


def _rows(file: RowFile, number: int, there: frozenset[str], fields: Sequence[pa.Field]) -> pa.Table:
    """Columns of a row group; one that is not there is null."""
    table, schema = file.read(number, [field for field in fields if field.name in there]), pa.schema(fields)
    if table.schema.equals(schema):  # as all files of this version
        return table.replace_schema_metadata()
    arrays = [table[field.name] if field.name in there else pa.nulls(len(table), field.type) for field in fields]
    return pa.table(arrays, schema=schema)


class Parts:
    """Files with columns in common, among them ``id``.

    Args:
        paths: The files.
        schema: The columns, and the metadata that :meth:`write` gives; a file that lacks a column has null there. That
            of the first file with images if omitted.
        check: Raises UserError where a file is not what was expected; given its path and its schema.
        agree: Raises UserError where two tables disagree about the same images.
        kept: Columns of few bytes, to be read with the ids and stay in memory.
        known: Some of these files, of which nothing has to be found out again.
        remedy: What to do about a file that cannot be read.

    Attributes:
        ids: Id of each row (N,), each image once, in the order of the files.

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
        kept: Sequence[str] = (),
        known: Parts | None = None,
        remedy: str = REMEDY,
    ) -> None:
        self._groups: list[_Group] = []
        self._remedy = remedy
        sizes, ids, rows = [0], list[pa.Array](), list[pa.Table]()
        fields = [field for field in schema or () if field.name in kept]
        files = {} if known is None or fields else known._files()

        def look(path: Path) -> _File:
            file = files.get(path)
            return file if file and file.groups[0].stamp == _stamp(path) else _look_into(path, fields, remedy)

        # ids, and what a file says of itself
        looks = ahead(look, paths, repeat(CHUNK_BYTES / 256))
        for path, file in zip(paths, looks, strict=True):
            check(path, file.schema)
            if schema is None and (any(map(len, file.rows)) or path == paths[-1]):
                schema = file.schema
            self._groups += file.groups
            for some in file.rows:
                sizes.append(len(some))
                ids += some["id"].cast(pa.string()).chunks
                rows += [some] if fields else []
        self.schema, self._starts = schema or pa.schema([]), np.cumsum(sizes)
        self._kept = rows  # of each row group
        encoded = pa.chunked_array(ids, pa.string()).combine_chunks().dictionary_encode("encode")
        self.ids = encoded.dictionary
        self._image_of = image_of = encoded.indices.to_numpy()  # of each row, in the order in which they come first
        self._rows = np.unique(image_of, return_index=True)[1]  # where each comes first
        again = np.flatnonzero(self._rows[image_of] != np.arange(len(image_of)))
        if agree is not None:
            for begin in range(0, len(again), CHECKED_TOGETHER):
                some_again = again[begin : begin + CHECKED_TOGETHER]
                agree(self._take(self._rows[image_of[some_again]]), self._take(some_again))

    def __len__(self) -> int:
        return len(self.ids)

    def tables(self, columns: Sequence[str] | None = None, chosen: np.ndarray | None = None) -> Iterator[pa.Table]:
        """All rows, each image once, a row group at a time in the order of the files; groups without any are not read.

        Args:
            columns: Those to read, in the order of the schema; all if omitted.
            chosen: Whether each row of :attr:`ids` is wanted (N,), bool; all are if omitted.
        """
        rows = self._rows if chosen is None else self._rows[chosen]
        cuts = np.searchsorted(rows, self._starts)
        read = np.flatnonzero(np.diff(cuts)).tolist()
        size_of = [
            self._groups[number].row_bytes * (self._starts[number + 1] - self._starts[number]) for number in read
        ]
        fields = self._fields(columns)
        tables = ahead(lambda number: self._read(number, fields), read, size_of)
        for number, table in zip(read, tables, strict=True):
            here = rows[cuts[number] : cuts[number + 1]] - self._starts[number]
            yield table if len(here) == len(table) else table.take(pa.array(here))

    def ordered(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All rows, each image once, ordered by id, some :data:`CHUNK_BYTES` at a time."""
        rows, begin, size = self._rows[order_by_id(self.ids)], 0, 1
        while begin < len(rows):
            table = self._take(rows[begin : begin + size], columns)
            begin += size
            size = min(8 * size, _rows_of(CHUNK_BYTES, table))  # rows may be larger than those before
            yield table

    def write(self, path: Path, seen: Seen = unseen, **settings: Any) -> None:
        """Write all rows to one file, ordered by id.

        Args:
            path: The file; may be one of the parts.
            seen: Is given all rows as they are written, some :data:`CHUNK_BYTES` at a time, while these are encoded.
            **settings: Of ``pyarrow.parquet.ParquetWriter``.

        Raises:
            FailedWrite: if it cannot be written.
        """
        with sealed_writer(path, self.schema, "results", **settings) as out, ThreadPoolExecutor(1) as beside:
            for table in ahead(_in_order, self._windows(path.parent), repeat(AHEAD_BYTES)):  # one ahead
                written = beside.submit(out.write_table, table, _rows_of(ROW_GROUP_BYTES, table))
                seen(table)
                written.result()
        release_unused()

    def _windows(self, folder: Path) -> Iterator[tuple[pa.Table, np.ndarray]]:
        """As :meth:`ordered`, but no file is read twice: rows wait in a temporary file in ``folder`` for their turn.

        All rows are cut into windows, each of :data:`CHUNK_BYTES` about and after the one before. What is read at a
        time goes to the file in pieces, one for each window; then a window is the pieces of it, and the place of each
        row in all.
        """
        place_of = np.empty(len(self), dtype=np.int64)
        order = order_by_id(self.ids)
        place_of[order] = np.arange(len(self))
        sizes = np.array([group.row_bytes for group in self._groups])[self._group_of(self._rows)]
        window_at = (sizes[order].cumsum() // CHUNK_BYTES).astype(np.int64)
        pieces: dict[int, list[tuple[int, np.ndarray]]] = {window: [] for window in np.unique(window_at).tolist()}
        with tempfile.NamedTemporaryFile(dir=folder, suffix=TEMPORARY) as file:
            # Through Arrow's own files: pieces are many and small, and each of their buffers would be a call of Python.
            with (
                pa.OSFile(file.name, "wb") as plain,
                pa.BufferedOutputStream(plain, SPILL_BUFFER) as sink,
                pa.ipc.new_file(sink, self.schema) as spill,
            ):
                number = end = 0
                for table in together(self.tables()):
                    begin, end = end, end + len(table)
                    by_place = np.argsort(place_of[begin:end])
                    places = place_of[begin:end][by_place]
                    (batch,) = table.combine_chunks().to_batches()
                    mixed = batch.take(pa.array(by_place))
                    for window, first, count in zip(
                        *np.unique(window_at[places], return_index=True, return_counts=True), strict=True
                    ):
                        spill.write_batch(mixed.slice(first, count))
                        pieces[int(window)].append((number, places[first : first + count]))
                        number += 1
            with pa.OSFile(file.name) as source, pa.ipc.open_file(source) as spilled:
                for some in pieces.values():
                    table = pa.Table.from_batches([spilled.get_batch(number) for number, _ in some], self.schema)
                    yield table, np.concatenate([places for _, places in some])

    def _take(self, rows: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows by their numbers over all files, in the order given."""
        wanted, fields = np.asarray(rows), self._fields(columns)
        group_of = self._group_of(wanted)
        by_group = np.argsort(group_of, kind="stable")
        taken = []
        for number in np.unique(group_of):
            here = wanted[by_group[group_of[by_group] == number]] - self._starts[number]
            taken.append(self._read(number, fields).take(pa.array(here)))
        return pa.concat_tables(taken).take(pa.array(np.argsort(by_group)))

    def _group_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of the row group of each row."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _files(self) -> dict[Path, _File]:
        """What was found out about those with rows."""
        found: dict[Path, _File] = {}
        for number, group in enumerate(self._groups):
            file = found.setdefault(group.path, _File(self.schema, [], []))
            file.groups.append(group)
            images = self._image_of[self._starts[number] : self._starts[number + 1]]
            file.rows.append(pa.table({"id": self.ids.take(pa.array(images))}))
        return found

    def _fields(self, columns: Sequence[str] | None) -> list[pa.Field]:
        """Those columns, in the order of the schema; all if None."""
        return [field for field in self.schema if columns is None or field.name in columns]

    def _read(self, number: int, fields: Sequence[pa.Field]) -> pa.Table:
        path, stamp, there, group, _ = self._groups[number]
        names = [field.name for field in fields]
        if self._kept and set(names) <= set(self._kept[number].column_names):
            return self._kept[number].select(names)
        with _reading(path, self._remedy, verify=False) as file:  # it was verified when it was looked into
            if _stamp(path) != stamp:
                raise Vanished(path)
            return _rows(file, group, there, fields)


def has_rows(path: Path) -> bool:
    """Whether a file has any row.

    Raises:
        Vanished: if it is gone.
        UserError: if it cannot be read.
    """
    with _reading(path) as file:
        ids = [file.schema.field("id")]
        return any(len(file.read(number, ids)) for number in range(len(file.group_bytes)))


@contextmanager
def _reading(path: Path, remedy: str = REMEDY, verify: bool = True) -> Iterator[RowFile]:
    """An open file; what goes wrong with it is told with its name."""
    try:
        with opened(path, verify) as file:
            yield file
    except FileNotFoundError as error:
        raise Vanished(path) from error
    except (Damaged, pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"run: {str(path)!r} cannot be read ({error}); {remedy}") from error


def _rows_of(size: int, table: pa.Table) -> int:
    """How many rows as those of ``table`` have so many bytes."""
    return max(1, int(size * len(table) / max(1, table.nbytes)))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        raise Vanished(path) from error
    return status.st_ino, status.st_size, status.st_mtime_ns


def ahead(work: Callable[[T], R], items: Iterable[T], sizes: Iterable[float]) -> Iterator[R]:
    """``work`` of each item, in their order; that of the next ones begins in other threads before it is asked for.

    Small parts of a run are many: threads do a batch of them at a time, and the next batches while what is there is
    counted. If one of a batch fails, none of it is given.

    Args:
        work: What is done.
        items: With what.
        sizes: Bytes of each result, about: of what nobody has asked for yet, there are :data:`AHEAD_BYTES` at most, or
            one batch.
    """
    with ThreadPoolExecutor(READERS) as pool:
        begun, waiting = deque[tuple[Future[list[R]], float]](), 0.0
        for batch, size in _batches(items, sizes):
            while begun and waiting + size > AHEAD_BYTES:
                future, released = begun.popleft()
                waiting -= released
                yield from future.result()
            begun.append((pool.submit(lambda batch: [work(item) for item in batch], batch), size))
            waiting += size
        for future, _ in begun:
            yield from future.result()
    release_unused()


def release_unused() -> None:
    """Give memory back that Arrow holds for threads that have ended: else it stays theirs."""
    pa.default_memory_pool().release_unused()


def _in_order(window: tuple[pa.Table, np.ndarray]) -> pa.Table:
    """Rows in the order of the places that come with them."""
    table, places = window
    return table.take(pa.array(np.argsort(places)))


def _batches(items: Iterable[T], sizes: Iterable[float]) -> Iterator[tuple[list[T], float]]:
    """Items in lists of :data:`BATCH_BYTES` about, and the sum of their sizes."""
    batch, total = list[T](), 0.0
    for item, size in zip(items, sizes, strict=False):
        batch.append(item)
        total += size
        if total >= BATCH_BYTES:
            yield batch, total
            batch, total = [], 0.0
    if batch:
        yield batch, total


def together(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in larger tables, of :data:`CHUNK_BYTES` about: parts of a run may have few rows each."""
    waiting, size = list[pa.Table](), 0
    for table in tables:
        waiting.append(table)
        size += table.get_total_buffer_size()  # found much faster than nbytes, and the same where no table is a slice
        if size >= CHUNK_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def order_by_id(ids: pa.StringArray) -> np.ndarray:
    """Positions (N,) that sort ids: as numbers where all are."""
    if len(pc.filter(ids, pc.match_substring_regex(ids, r"^-?[0-9]{1,18}$"))) == len(ids):
        return np.asarray(pc.array_sort_indices(ids.cast(pa.int64()))).astype(np.int64)
    names = ids.to_pylist()
    if all(name.removeprefix("-").isdecimal() for name in names):  # larger ones, or other digits
        return np.array(sorted(range(len(names)), key=[int(name) for name in names].__getitem__), dtype=np.int64)
    return np.asarray(pc.array_sort_indices(ids)).astype(np.int64)  # UTF-8 sorts as its characters do
