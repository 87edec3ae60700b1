"""The folder of a run: decisions as they come, in parts that survive a kill.

::

    settings.json         what the results depend on, and what they were made with
    parts/*.arrow         records, a few images each; beside them *.errors.parquet, if errors are kept
    predictions.parquet   all records, once the run has ended; the parts are gone then
    errors.parquet        all errors, likewise
    .lock                 while a process writes to the folder

Records are those of predictions.py, of an attack those of attacks.py, of a certification those of certificates.py: the
settings say which. Files are complete or not there. So a run that was killed is resumed by the same command, and can be
read at any time.
"""

from __future__ import annotations

import time
import uuid
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.files import FolderLock, make_folder, remove_temporaries, write_text
from lightning_diffclf.interruption import uninterrupted
from lightning_diffclf.results.errors import ERRORS, ErrorsInfo, ErrorsWriter, merge_errors
from lightning_diffclf.results.parts import Seen, Vanished, has_rows, unseen
from lightning_diffclf.results.predictions import ENCODING, to_table, write_table
from lightning_diffclf.results.row_files import PART_SUFFIX, write_part
from lightning_diffclf.results.settings import SETTINGS, Settings
from lightning_diffclf.results.stored import (
    ERRORS_SUFFIX,
    PARTS,
    PREDICTIONS,
    SETTINGS_KEY,
    Ids,
    Stored,
    attempts,
    described,
    errors_of,
    files_of,
    parts_of,
    schema_of,
    unsteady,
)

if TYPE_CHECKING:
    from lightning_diffclf.classifier import Classification

FLUSH_SECONDS = 60.0  # a part is also written when the last one is so old: images may take minutes each


# --- writing -----------------------------------------------------------------------------------------------------


def claim(folder: Path, settings: Settings, next_free: bool = False) -> Path:
    """The folder for a run with ``settings``: a new one, or one with results of the same settings, to resume.

    Args:
        folder: Where results should go.
        settings: Those of the run.
        next_free: Where ``folder`` holds results of other settings, take the first of ``folder-2``, ``folder-3``, …
            that does not.

    Raises:
        ValueError: if the folder holds results of other settings (unless ``next_free``), or another process is about
            to write to it.
        OSError: if it cannot be written.
    """
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            _claim(place, settings)
            return place
        except _Taken:
            if not next_free:
                raise
    raise AssertionError


class _Taken(UserError):
    """A folder that holds something else."""


def _claim(folder: Path, settings: Settings) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {str(folder)!r} is a file, expected a folder")
    if not (folder / SETTINGS).is_file():
        make_folder(folder)
        with FolderLock(folder):  # or two processes could claim it for different runs
            if not (folder / SETTINGS).is_file():
                taken = [name for name in (PREDICTIONS, PARTS, ERRORS) if (folder / name).exists()]
                if taken:
                    raise _Taken(f"output: {str(folder)!r} holds {taken} without {SETTINGS}, expected another folder")
                write_text(settings.to_json() + "\n", folder / SETTINGS, "output")
    there = Settings.read(folder)
    try:
        settings.check_same(there, f"the run in {str(folder)!r}")
    except UserError as error:
        raise _Taken(f"{error}; give another folder") from error


def refresh(folder: Path, settings: Settings) -> None:
    """Let a resumed run's settings say how its numbers are made now: with another temperature, say."""
    stored = Settings.read(folder)
    if stored.info.get("summary") != settings.info.get("summary"):
        write_text(Settings(stored.identity, stored.info | settings.info).to_json() + "\n", folder / SETTINGS, "output")


class Store:
    """Writes the decisions of one process to the folder of a run.

    Args:
        folder: What :func:`claim` returned.
        settings: Those of the run.
        rank: This process.
        flush_every: Images in a part: what a kill may cost.
        errors: What the errors have in common, if they are kept.
        distances: Keep the distances between candidates' predictions as well.

    Attributes:
        before: What was decided before.
        finished: Ids of these images.

    Raises:
        ValueError: if a part cannot be read or is of another run.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        rank: int = 0,
        flush_every: int = 100,
        errors: ErrorsInfo | None = None,
        distances: bool = False,
    ) -> None:
        check_at_least(1, flush_every=flush_every)
        self.folder, self.settings, self.rank, self.flush_every = folder, settings, rank, flush_every
        self.before = Stored(folder, settings, kept=["rank"])
        self.finished = Ids(self.before.ids)
        self._errors_info, self._distances = errors, distances
        self._session, self._number = uuid.uuid4().hex[:12], 0
        self._records: list[Any] = []
        self._errors: ErrorsWriter | None = None
        self._flushed = time.monotonic()

    @uninterrupted()
    def add(self, record: Any, result: Classification | None = None) -> None:
        """Store one image: a :class:`~.predictions.Record`, or what has the columns of another kind of run.

        Args:
            record: The image.
            result: Its decision with its errors, where errors are kept.

        Raises:
            FailedWrite: if a part cannot be written; the images in it will be evaluated again.
        """
        if self._errors_info is not None and result is not None:
            if self._errors is None:
                self._errors = ErrorsWriter(self._part(ERRORS_SUFFIX), self._errors_info, self._distances)
            try:
                self._errors.add(result, record.label)
            except OSError:  # the errors of the others have gone with the file
                self._records, self._errors = [], None
                raise
        self._records.append(record)
        if len(self._records) >= self.flush_every or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    @uninterrupted()
    def flush(self) -> None:
        """Write what is not on the disk yet.

        Raises:
            FailedWrite: as :meth:`add`.
        """
        if self._records:
            records, errors = self._records, self._errors
            self._records, self._errors = [], None
            # Errors first: an image counts as finished when its record is there.
            if errors is not None:
                errors.close()
            table = to_table(records, schema_of(self.settings))
            described = {SETTINGS_KEY: self.settings.digest.encode()}
            write_part(table.replace_schema_metadata(described), self._part(PART_SUFFIX))
            self._number += 1
        self._flushed = time.monotonic()

    def _part(self, suffix: str) -> Path:
        return self.folder / PARTS / f"{self.rank:05d}-{self._session}-{self._number:06d}{suffix}"


# --- whole runs --------------------------------------------------------------------------------------------------


def finish(
    run: Path,
    settings: Settings,
    before: Stored | None = None,
    seen: Seen = unseen,
) -> int:
    """All parts become one file; those that were read go. Call it on one process. Returns the number of images.

    Args:
        run: The folder.
        settings: Those of the run.
        before: What was there when this process began; files that it knows are not looked into again.
        seen: Is given all records as they are written, ordered by id, some megabytes at a time.

    Raises:
        ValueError: if a file cannot be read, is of another run, or files disagree about an image.
        FailedWrite: if something cannot be written.
    """
    return _write_whole(files_of(run), settings, run, before, seen)


def _write_whole(
    paths: Sequence[Path],
    settings: Settings,
    run: Path,
    before: Stored | None = None,
    seen: Seen = unseen,
) -> int:
    records = parts_of(paths, settings, known=None if before is None else before.parts)
    # Errors whose records were not written any more are of images that will be evaluated again.
    errors = [errors_of(path) for path in paths if errors_of(path).is_file()]
    if errors and (kept := merge_errors(errors, run / ERRORS)) < len(records):
        warnings.warn(f"{ERRORS} has the errors of {kept} of {len(records)} images only", stacklevel=2)
    records.write(run / PREDICTIONS, seen=seen, **ENCODING)
    # Records first: who finds errors missing finds records missing as well, and looks again.
    for path in [*paths, *errors]:
        if path.parent == run / PARTS:
            path.unlink(missing_ok=True)
    with suppress(OSError):  # others may have written to it since
        (run / PARTS).rmdir()
    return len(records)


def write_whole(table: pa.Table, settings: Settings, run: Path) -> None:
    """Write the records of a whole run to its folder."""
    write_table(table.replace_schema_metadata(described(settings)), run / PREDICTIONS)


def clean(run: Path) -> None:
    """Remove what killed processes left half written. Only for who has the lock of the folder, before anyone writes."""
    for folder in (run, run / PARTS):
        remove_temporaries(folder)
    complete = {errors_of(path) for path in files_of(run)}
    for path in (run / PARTS).glob(f"*{ERRORS_SUFFIX}"):
        if path not in complete:
            path.unlink(missing_ok=True)


def _has_images(run: Path) -> bool:
    for _ in attempts():
        with suppress(Vanished):
            return any(map(has_rows, files_of(run)))
    raise unsteady(run)


def merge(runs: Sequence[Path], out: Path, watch: Callable[[], Seen] = lambda: unseen) -> int:
    """Join runs with the same settings, ended, killed or going on, in one folder. Returns its number of images.

    Args:
        runs: Their folders.
        out: Folder of the whole; may be one of them, or one with images of the same settings, which stay in it.
        watch: What it returns is given all records as they are written; called anew where that begins anew.

    Raises:
        FileNotFoundError: if a folder is no run.
        ValueError: if settings differ, runs disagree about an image, none has images, or another process writes to
            ``out``.
        FailedWrite: if something cannot be written.
    """
    runs, out = [run.resolve() for run in runs], out.resolve()
    settings = Settings.read(runs[0])
    for run in runs[1:]:
        settings.check_same(Settings.read(run), f"the run in {str(run)!r}")
    if not any(_has_images(run) for run in runs):
        raise UserError(f"merge: no image in {', '.join(map(str, runs))}")
    place = claim(out, Settings(settings.identity, settings.info | {"part": None}))
    with FolderLock(place):
        clean(place)
        for _ in attempts():
            with suppress(Vanished):
                paths = [path for run in dict.fromkeys([place, *runs]) for path in files_of(run)]
                return _write_whole(paths, settings, place, seen=watch())
    raise unsteady(place)
