"""Files that are whole or not there, and folders that one process writes to at a time."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from lightning_diffclf.errors import FailedWrite, MissingFile, UserError

TEMPORARY = ".tmp"  # how names end of files that are not complete yet

LOCK = ".lock"  # the file in a folder that says who writes to it

PATIENCE = 5.0  # seconds until a locked folder is refused: a process that was killed may take a moment to end

# --- writing -----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path, what: str = "file") -> Iterator[Path]:
    """Another path to write to, in the same folder; what was written there becomes ``path`` at once, at the end.

    It is on the disk before it gets its name, so ``path`` is complete or what it was before, also after a kill or a
    crash of the machine. After an error, what was written is removed: on a full disk it would take the room of others.

    Args:
        path: The file; its folder is made if needed.
        what: What it is, for errors.

    Raises:
        FailedWrite: for an OSError, inside as well: a full disk, no permission.

    Example:
        >>> with replacing("numbers.txt") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("1 2 3")
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):  # there is an error to tell already
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise FailedWrite(
                f"{what}: {str(path)!r} cannot be written ({error}); what was written before is complete"
            ) from error
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes left half written in ``folder``; only for who alone writes to such files."""
    for path in folder.glob(f"{pattern}{TEMPORARY}"):
        path.unlink(missing_ok=True)


def write_bytes(data: bytes, path: str | Path, what: str = "file") -> None:
    """Write a file; see :func:`replacing`."""
    with replacing(path, what) as temporary:
        temporary.write_bytes(data)


def write_text(text: str, path: str | Path, what: str = "file") -> None:
    """Write a text file in UTF-8; see :func:`replacing`."""
    write_bytes(text.encode(), path, what)


def write_json(values: Any, path: str | Path, indent: int | None = None, what: str = "file") -> None:
    """Write a JSON file; see :func:`replacing`."""
    write_text(json.dumps(values, indent=indent) + "\n", path, what)


# --- reading -----------------------------------------------------------------------------------------------------


def read_json(path: str | Path, what: str = "file") -> Any:
    """What a JSON file holds.

    Raises:
        MissingFile: if it is not there.
        UserError: if it cannot be read or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingFile(f"{what}: no file {str(path)!r}") from error
    except (OSError, ValueError, RecursionError) as error:  # the latter of what is nested too deeply
        raise UserError(f"{what}: {str(path)!r} cannot be read ({str(error)[:200]})") from error


CHECKSUM = "checksum"  # the entry of a JSON file that is of all its others


def json_checksum(values: Any) -> str:
    """CRC-32 of plain values as JSON, in hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def write_checked_json(values: dict[str, Any], path: str | Path, what: str = "file") -> None:
    """As :func:`write_json`, with a checksum."""
    write_json(values | {CHECKSUM: json_checksum(values)}, path, what=what)


def read_checked_json(path: str | Path, what: str = "file") -> Any:
    """As :func:`read_json`, without the checksum, which is verified; who writes a file by hand need not give one.

    Raises:
        UserError: as well, if the file does not have its checksum.
    """
    values = read_json(path, what)
    if isinstance(values, dict) and CHECKSUM in values:
        said = values.pop(CHECKSUM)
        if said != json_checksum(values):
            raise UserError(
                f"{what}: {str(path)!r} was changed or damaged: it does not have its checksum; after a change on "
                f"purpose, remove {CHECKSUM!r} from it"
            )
    return values


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- one process at a time ---------------------------------------------------------------------------------------


def make_folder(folder: Path) -> None:
    """Make a folder for output, with those above it, unless it is there.

    Raises:
        FailedWrite: if that cannot be.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FailedWrite(f"output: {str(folder)!r} cannot be written ({error})") from error


class FolderLock:
    """Keeps a folder to one process until it is released, or the process ends, in whatever way.

    The operating system holds the lock (``flock``), not the file: one that a killed process left locks nothing. On NFS
    it holds for all machines; on a file system without locks, there is a warning instead.

    Args:
        folder: An existing folder; a file ``.lock`` is in it for as long.

    Raises:
        UserError: if another process has it.
        FailedWrite: if the folder cannot be written.
    """

    _held: set[FolderLock] = set()  # noqa: RUF012  (by this process)

    def __init__(self, folder: Path) -> None:
        self.folder, self._descriptor = folder, -1
        refused_at = time.monotonic() + PATIENCE
        while not self._acquire():
            if time.monotonic() > refused_at:
                raise UserError(
                    f"output: {str(folder)!r} is being written to by {self._holder()}; wait for it, or give another "
                    "folder"
                )
            time.sleep(0.1)
        FolderLock._held.add(self)

    @property
    def _path(self) -> Path:
        return self.folder / LOCK

    def _holder(self) -> str:
        """Who has it, and for how long."""
        try:
            name, since = self._path.read_text(), time.time() - self._path.stat().st_mtime
        except OSError:
            return "another process"
        return f"{name or 'another process'} for {timedelta(seconds=max(0, round(since)))}"

    def _acquire(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only what can be written
        except OSError as error:
            raise FailedWrite(f"output: {str(self.folder)!r} cannot be written ({error})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except OSError as error:
            warnings.warn(
                f"output: {str(self.folder)!r} is on a file system without locks ({error}); do not run the same "
                "command twice at a time",
                RuntimeWarning,
                stacklevel=4,
            )
        try:  # whoever had it before has removed the file, perhaps after it was opened here
            mine = os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            mine = False
        if not mine:
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let others have the folder; does nothing if it was released before."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)  # while nobody else has it
            self._forget()

    def _forget(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1
        FolderLock._held.discard(self)

    @classmethod
    def _forget_all(cls) -> None:
        for lock in list(cls._held):
            lock._forget()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


# A loader's workers are forks: they must not hold the lock of a process that was killed before them.
os.register_at_fork(after_in_child=FolderLock._forget_all)
