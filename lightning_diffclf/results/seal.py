"""A checksum of a whole Parquet file, inside it: what was damaged since it was written is not read as other numbers.

Parquet's own checksums are of pages, and leave out their headers and the footer, which says where everything is. Ours
is CRC-32 of all bytes, in eight hexadecimal digits of the footer that count as zeros; to other readers it is one more
entry of the metadata.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import replacing

KEY = b"diffclf_crc32"

OPEN = b"0" * 8  # what stands where the digits will be

ENTRY = KEY + b"\x18\x08"  # how the footer has it: the key, and a text of eight bytes

MAGIC = b"PAR1"

MAX_VALUES_PER_BYTE = 64  # equal values take next to no room: a small file may claim to hold more than any memory

MAX_VALUES = 1_000_000  # that a file of any size may hold

CHUNK = 2**22

SMALL = 2**21  # bytes of a file that is read in one go, whatever is wanted of it: to ask for each column takes longer


class Damaged(UserError):
    """A file is not what was written; whoever reads it says which."""


@contextmanager
def sealed_writer(path: Path, schema: pa.Schema, what: str, **settings: Any) -> Iterator[pq.ParquetWriter]:
    """A writer of a file that is complete and has its checksum, or is not there; see :func:`~.files.replacing`.

    Args:
        path: The file.
        schema: Its columns and metadata.
        what: What it is, for errors.
        **settings: Of ``pyarrow.parquet.ParquetWriter``.

    Raises:
        FailedWrite: if it cannot be written.
    """
    described = schema.with_metadata({**(schema.metadata or {}), KEY: OPEN})
    with replacing(path, what) as temporary:
        # Without statistics: nothing asks for them, and a small file is opened in half the time.
        with pq.ParquetWriter(temporary, described, compression="zstd", write_statistics=False, **settings) as out:
            yield out
        with pa.OSFile(str(temporary)) as whole:
            position = _digits(whole)
            assert position is not None
            digits = b"%08x" % _checksum(whole, position)
        with open(temporary, "rb+") as file:
            file.seek(position)
            file.write(digits)


@contextmanager
def sealed_file(path: Path) -> Iterator[pq.ParquetFile]:
    """A file to read, verified once as long as it stays as it is; without a seal, of an earlier version, as it is.

    Raises:
        Damaged: if it is damaged, or claims to hold more than its size allows.
        OSError: if it cannot be read.
    """
    status = path.stat()
    known = str(path), status.st_ino, status.st_size, status.st_mtime_ns
    with pa.OSFile(str(path)) as opened:
        whole = pa.BufferReader(opened.read_buffer()) if status.st_size <= SMALL else opened
        if known not in _verified:
            _check_digits(whole)
        with pq.ParquetFile(whole) as file:
            if known not in _verified:
                _check_claim(file.metadata, status.st_size)
                _verified.add(known)
            yield file


_verified: set[tuple[str, int, int, int]] = set()  # files that were verified by this process


def _check_digits(file: pa.NativeFile) -> None:
    position = _digits(file)
    if position is not None:
        file.seek(position)
        if file.read(len(OPEN)) != b"%08x" % _checksum(file, position):
            raise Damaged(
                f"it is damaged: its checksum is not that of what was written; if a program of others wrote it anew, "
                f"remove {KEY.decode()} from its metadata"
            )


def _check_claim(metadata: pq.FileMetaData, size: int) -> None:
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    values = sum(group.column(number).num_values for group in groups for number in range(group.num_columns))
    values = max(values, metadata.num_rows, *(group.num_rows for group in groups), 0)
    if values > MAX_VALUES + MAX_VALUES_PER_BYTE * size:
        raise Damaged(f"it claims to hold {values:,} values in {size:,} bytes")


def _digits(file: pa.NativeFile) -> int | None:
    """Where in a file the digits are; None if it has none."""
    end = file.size()
    file.seek(max(0, end - 8))
    tail = file.read(8)
    if len(tail) < 8 or tail[4:] != MAGIC:
        raise Damaged("it is damaged or no Parquet file")
    begin = max(0, end - 8 - struct.unpack("<I", tail[:4])[0])
    file.seek(begin)
    found = file.read(end - begin).rfind(ENTRY)
    return None if found < 0 else begin + found + len(ENTRY)


def _checksum(file: pa.NativeFile, position: int) -> int:
    crc, begin = file.seek(0), 0
    while here := memoryview(file.read_buffer(CHUNK)):
        first, last = (min(max(0, place - begin), len(here)) for place in (position, position + len(OPEN)))
        for some in (here[:first], OPEN[: last - first], here[last:]):
            crc = zlib.crc32(some, crc)
        begin += len(here)
    return crc
