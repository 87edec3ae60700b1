"""Samples of a tar file in webdataset's layout: every one of them, or an error that says what is wrong.

Tar files of others are read as a stream and never unpacked: names are only compared, and what is no plain file is
refused.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from lightning_diffclf.errors import UserError

MAX_MEMBER = 2**28  # bytes; a header may claim any size

NAME = re.compile(r"((?:.*/)?\.*[^./]+)\.([^/]*)", re.DOTALL)  # key and suffix; the key ends at the first inner dot

OWN = re.compile(r"__[^/]*__($|/)")


class Member(tarfile.TarInfo):
    """A member whose header is what it should be.

    ``tarfile`` takes a damaged header anywhere but in the beginning for the end of the file, and says nothing.
    """

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Member:
        """The next member, which must be there until the mark of the end.

        Raises:
            tarfile.ReadError: if its header is damaged or missing.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EOFHeaderError):  # type: ignore[attr-defined]
                raise
            raise tarfile.ReadError(f"{error} at byte {tarfile_.offset}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """A header as it stands, also one that belongs to another.

        Raises:
            tarfile.ReadError: if it claims more than an image may have.
        """
        found = super().frombuf(buf, encoding, errors)
        if found.size > MAX_MEMBER:
            raise tarfile.ReadError(f"{found.name!r} claims {found.size:,} bytes, expected at most {MAX_MEMBER:,}")
        return found


def read_samples(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Samples in order: ``__key__``, and what its members hold by suffix (bytes).

    Members with one key must follow each other. Folders, files without a suffix and webdataset's own (``__…__``) are no
    samples. Names that begin with a dot are.

    Args:
        file: The tar file, maybe compressed.

    Raises:
        tarfile.TarError, OSError, EOFError: if it is damaged, cut off, or goes on after its end.
        ValueError: if a member is a link, a device or too large, or a key occurs again.
    """
    sample: dict[str, Any] = {}
    keys: set[str] = set()
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=Member) as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # which would keep all
            found = NAME.fullmatch(member.name)
            if member.isdir() or found is None or OWN.match(member.name):
                continue
            if not member.isreg() or member.issparse() or not 0 <= member.size <= MAX_MEMBER:
                raise UserError(f"member {member.name!r} is no plain file of at most {MAX_MEMBER:,} bytes")
            key, suffix = found[1], found[2].lower()
            if sample.get("__key__") != key:
                if sample:
                    yield sample
                if key in keys:
                    raise UserError(f"key {key!r} occurs again, expected all members of a sample side by side")
                keys.add(key)
                sample = {"__key__": key}
            if suffix in sample:
                raise UserError(f"member {member.name!r} is there twice")
            content = tar.extractfile(member)
            assert content is not None
            sample[suffix] = content.read()
        while rest := tar.fileobj.read(2**16):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more after the mark of the end")
    if sample:
        yield sample
