"""Files of rows, opened for reading whatever their format: Parquet, or the parts of a run, which are Arrow files.

A part is read often and soon gone, and may have ten rows of twenty columns: Parquet takes thirty times as long to take
it apart. So it is in Arrow's IPC file format, as it is in memory: uncompressed, of one record batch. Ours has 16 bytes
more, between the end of its batches and the footer, where readers do not look: ``diffclf:`` and CRC-32 of all else, in
eight hexadecimal digits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_diffclf.files import write_bytes
from lightning_diffclf.results.seal import Damaged, sealed_file

PART_SUFFIX = ".arrow"

MARK = b"diffclf:"  # before the digits

MAGIC = b"ARROW1"

DICTIONARIES, BATCHES = 2, 3  # fields of a footer, as File.fbs has them

HEADER = 2  # of a message: what it is about (Message.fbs)

COMPRESSION = 3  # of a record batch

WIDTHS = {
    "BOOLEAN": 1,
    "INT32": 4,
    "INT64": 8,
    "FLOAT": 4,
    "DOUBLE": 8,
}  # bytes of a value in memory, by Parquet's types


class RowFile(Protocol):
    """An open file.

    Attributes:
        schema: Its columns and metadata.
        group_bytes: What each of its row groups takes in memory, about.
    """

    schema: pa.Schema
    group_bytes: list[int]

    def read(self, group: int, fields: Sequence[pa.Field]) -> pa.Table:
        """Some columns of a row group, in that order."""
        ...


@contextmanager
def opened(path: Path, verify: bool = True) -> Iterator[RowFile]:
    """A file to read.

    Args:
        path: The file.
        verify: Whether a part is checked as a whole; what is read of it is in any case. Others are once a process.

    Raises:
        Damaged: if it is damaged, or claims to hold more than its size allows.
        OSError: if it cannot be read; so do :class:`pyarrow.ArrowException` and the methods of the file.
    """
    if path.suffix == PART_SUFFIX:
        with pa.OSFile(str(path)) as source:
            whole = source.read_buffer()
        if verify:
            _check(memoryview(whole))
        yield _ArrowRows(whole)
    else:
        with sealed_file(path) as file:
            yield _ParquetRows(file)


class _ParquetRows:
    def __init__(self, file: pq.ParquetFile) -> None:
        self._file, self.schema = file, file.schema_arrow
        self.group_bytes = [_bytes_of(file.metadata.row_group(number)) for number in range(file.num_row_groups)]

    def read(self, group: int, fields: Sequence[pa.Field]) -> pa.Table:
        return self._file.read_row_group(group, columns=[field.name for field in fields], use_threads=False)


def _bytes_of(group: pq.RowGroupMetaData) -> int:
    """What a row group takes in memory, about: equal values take next to nothing in the file."""
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(max(c.total_uncompressed_size, c.num_values * WIDTHS.get(c.physical_type, 1)) for c in columns)


class _ArrowRows:
    def __init__(self, whole: pa.Buffer) -> None:
        self._file, self._size = pa.ipc.open_file(whole), whole.size
        self.schema, self.group_bytes = self._file.schema, [self._size]

    def read(self, group: int, fields: Sequence[pa.Field]) -> pa.Table:
        table = self._file.read_all().select([field.name for field in fields])
        for field, column in zip(fields, table.columns, strict=True):
            if column.type != field.type:
                raise Damaged(f"its {field.name} are of type {column.type}, expected {field.type}")
        if len(table) > self._size:
            raise Damaged(f"it claims to hold {len(table):,} rows in {self._size:,} bytes")
        table.validate(full=True)  # others may have written it, and Arrow believes what it reads
        if len(fields) < len(self.schema):  # joined with nothing, they are copied: the whole need not stay in memory
            table = pa.concat_tables([table, table.slice(0, 0)]).combine_chunks()
        return table


def write_part(table: pa.Table, path: Path) -> None:
    """Write a part of a run at once, under a name that ends with :data:`PART_SUFFIX`.

    Raises:
        FailedWrite: if it cannot be written.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table.combine_chunks())
    whole = memoryview(sink.getvalue())
    footer = _footer(whole)
    digits = b"%08x" % _crc(whole[:footer], whole[footer:])
    write_bytes(b"".join([whole[:footer], MARK, digits, whole[footer:]]), path, "results")


def _crc(*pieces: memoryview) -> int:
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return crc


def _footer(whole: memoryview) -> int:
    """Where the footer begins."""
    if len(whole) < 24 or whole[-6:] != MAGIC:
        raise Damaged("it is damaged or no Arrow file")
    return len(whole) - 10 - int.from_bytes(whole[-10:-6], "little")


def _check(whole: memoryview) -> None:
    """Raise Damaged where a part is not what was written, or what we would not write.

    A part of others may have a good checksum: that it is not compressed bounds what it takes in memory.
    """
    footer = _footer(whole)
    seal = max(0, footer - 16)
    if bytes(whole[seal:footer]) != MARK + b"%08x" % _crc(whole[:seal], whole[footer:]):
        raise Damaged("it is damaged: its checksum is not that of what was written")
    try:
        plain = _is_plain(whole, footer)
    except struct.error as error:
        raise Damaged("it is damaged or no Arrow file") from error
    if not plain:
        raise Damaged("it is compressed, expected a part as evaluations write it")


def _is_plain(whole: memoryview, footer: int) -> bool:
    """Whether a file has no dictionaries, and no record batch is compressed."""
    root = _follow(whole, footer)
    blocks = _follow(whole, _field(whole, root, BATCHES))
    (count,) = struct.unpack_from("<I", whole, blocks)
    for block in range(count):
        (message,) = struct.unpack_from("<q", whole, blocks + 4 + 24 * block)
        header = _follow(whole, _field(whole, _follow(whole, message + 8), HEADER))  # after two numbers of 4 bytes
        if _field(whole, header, COMPRESSION) is not None:
            return False
    dictionaries = _field(whole, root, DICTIONARIES)
    return dictionaries is None or struct.unpack_from("<I", whole, _follow(whole, dictionaries)) == (0,)


def _follow(whole: memoryview, place: int | None) -> int:
    """Where the offset at a place of a flatbuffer leads."""
    if place is None:
        raise Damaged("it is no Arrow file of record batches")
    return place + int(struct.unpack_from("<I", whole, place)[0])


def _field(whole: memoryview, table: int, number: int) -> int | None:
    """Where a field of a flatbuffer's table is; None where it has none."""
    vtable = table - struct.unpack_from("<i", whole, table)[0]
    (size,) = struct.unpack_from("<H", whole, vtable)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", whole, vtable + place)[0] if place < size else 0
    return table + int(offset) if offset else None
