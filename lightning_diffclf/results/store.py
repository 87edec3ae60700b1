"""The folder of a run: decisions as they come, in parts that survive a kill.

::

    settings.json         what the results depend on, and what they were made with
    parts/*.parquet       rows of predictions.py, a few images each; beside them *.errors.parquet, if errors are kept
    predictions.parquet   all rows, once the run has ended; the parts are gone then
    errors.parquet        all errors, likewise

A part is written under another name, synced and renamed: it is complete or not there. So a run that was killed is gone
on with by the same command, and can be read at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_diffclf.classifier import Classification
from lightning_diffclf.errors import FailedWrite, MissingFile, UserError
from lightning_diffclf.identity import differences
from lightning_diffclf.results.errors import ERRORS, ErrorsInfo, ErrorsWriter, merge_errors
from lightning_diffclf.results.predictions import SCHEMA, Row, list_views, order_by_id, to_table, write_table

PREDICTIONS = "predictions.parquet"
SETTINGS = "settings.json"
PARTS = "parts"
ERRORS_SUFFIX = ".errors.parquet"

FLUSH_SECONDS = 60.0  # a part is also written when the last one is so old: images may take minutes each

SETTINGS_KEY = b"diffclf_settings"  # where a Parquet file keeps the settings, or in a part, their digest


@dataclass(frozen=True)
class Settings:
    """What a run was made with, as plain values.

    Attributes:
        identity: What the results depend on. Only runs that agree in all of it can be joined or gone on with.
        info: What else is worth knowing: names, timesteps, versions, hardware, command.
    """

    identity: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Short name of the identity."""
        return hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """As stored."""
        return json.dumps(asdict(self) | {"digest": self.digest}, indent=2)

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Those of the run in ``folder``.

        Raises:
            FileNotFoundError: if there is no run.
            ValueError: if its settings cannot be read.
        """
        path = folder / SETTINGS
        if not path.is_file():
            raise MissingFile(f"run: no {SETTINGS} in {str(folder)!r}, expected the folder of an evaluation")
        try:
            values = json.loads(path.read_text())
            return cls(values["identity"], values["info"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"run: {str(path)!r} cannot be read ({error})") from error

    def check_same(self, other: Settings, what: str) -> None:
        """Raise ValueError, naming all differences, unless ``other`` has the same identity."""
        different = list(differences(other.identity, self.identity))
        if different:
            raise UserError(f"settings: {what} was made with other ones ({'; '.join(different)})")


def claim(folder: Path, settings: Settings, elsewhere: bool = False) -> Path:
    """The folder for a run with ``settings``: a new one, or one with results of the same settings, to go on with.

    Args:
        folder: Where results should go.
        settings: Those of the run.
        elsewhere: Where ``folder`` holds results of other settings, take the first of ``folder-2``, ``folder-3``, …
            that does not.

    Raises:
        ValueError: if the folder holds results of other settings (unless ``elsewhere``).
        OSError: if it cannot be written.
    """
    number, place = 1, folder
    while True:
        if place.exists() and not place.is_dir():
            raise UserError(f"output: {str(place)!r} is a file, expected a folder")
        if not (place / SETTINGS).is_file():
            taken = [name for name in (PREDICTIONS, PARTS, ERRORS) if (place / name).exists()]
            if not taken:
                break
            if not elsewhere:
                raise UserError(f"output: {str(place)!r} holds {taken} without {SETTINGS}, expected another folder")
        else:
            try:
                settings.check_same(Settings.read(place), f"the run in {str(place)!r}")
                return place
            except ValueError as error:
                if not elsewhere:
                    raise UserError(f"{error}; give another folder") from error
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    try:
        place.mkdir(parents=True, exist_ok=True)
        temporary = place / f"{SETTINGS}.tmp"
        temporary.write_text(settings.to_json() + "\n")
        os.replace(temporary, place / SETTINGS)
    except OSError as error:
        raise FailedWrite(f"output: {str(place)!r} cannot be written ({error})") from error
    return place


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
        stored: The rows that were there before, (N rows).

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
        if flush_every < 1:
            raise UserError(f"flush_every: {flush_every}, expected at least 1")
        self.folder, self.settings, self.rank, self.flush_every = folder, settings, rank, flush_every
        self.stored = read_table(folder, settings)
        self.finished = frozenset(self.stored["id"].to_pylist())
        self._errors_info, self._distances = errors, distances
        self._session, self._number = uuid.uuid4().hex[:12], 0
        self._rows: list[Row] = []
        self._errors: ErrorsWriter | None = None
        self._flushed = time.monotonic()

    def add(self, row: Row, result: Classification) -> None:
        """Store one image; ``result`` has its errors."""
        if self._errors_info is not None:
            if self._errors is None:
                self._errors = ErrorsWriter(self._part(ERRORS_SUFFIX), self._errors_info, self._distances)
            self._errors.add(result, row.label)
        self._rows.append(row)
        if len(self._rows) >= self.flush_every or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on the disk yet."""
        if self._rows:
            # Errors first: an image counts as finished when its row is there.
            if self._errors is not None:
                self._errors.close()
                self._errors = None
            table = to_table(self._rows).replace_schema_metadata({SETTINGS_KEY: self.settings.digest.encode()})
            write_table(table, self._part(".parquet"))
            self._rows, self._number = [], self._number + 1
        self._flushed = time.monotonic()

    def _part(self, suffix: str) -> Path:
        return self.folder / PARTS / f"{self.rank:05d}-{self._session}-{self._number:06d}{suffix}"


def read_table(run: Path, settings: Settings | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a run, whether it has ended or not, ordered by id.

    Args:
        run: Its folder.
        settings: Those of the run, if known already.
        columns: The columns to read; all if omitted.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if a file cannot be read, is of another run, or files disagree about an image.
    """
    settings = settings or Settings.read(run)
    names = list(SCHEMA.names if columns is None else dict.fromkeys(["id", *columns]))
    tables = [_read_part(path, settings, names) for path in _files(run)]
    empty = pa.schema([SCHEMA.field(name) for name in names]).empty_table()
    return join([empty, *tables])


def _files(run: Path) -> list[Path]:
    parts = [p for p in sorted((run / PARTS).glob("*.parquet")) if not p.name.endswith(ERRORS_SUFFIX)]
    whole = run / PREDICTIONS
    return [whole, *parts] if whole.is_file() else parts


def _error_files(run: Path) -> list[Path]:
    # Errors whose rows were not written any more are of images that will be evaluated again.
    files = [p.with_name(ERRORS if p.name == PREDICTIONS else f"{p.stem}{ERRORS_SUFFIX}") for p in _files(run)]
    return [path for path in files if path.is_file()]


def _read_part(path: Path, settings: Settings, columns: list[str]) -> pa.Table:
    remedy = "remove it, and its images will be evaluated again"
    try:
        with pq.ParquetFile(path) as file:
            found = (file.schema_arrow.metadata or {}).get(SETTINGS_KEY, b"none").decode()
            table = file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"run: {str(path)!r} cannot be read ({error}); {remedy}") from error
    if found != settings.digest:
        raise UserError(
            f"run: {str(path)!r} belongs to a run with other settings ({found}), expected {settings.digest} as in "
            f"{SETTINGS}; {remedy}"
        )
    return table.replace_schema_metadata(None)


def join(tables: Sequence[pa.Table]) -> pa.Table:
    """Rows of all tables, each image once, ordered by id.

    Raises:
        ValueError: if tables disagree about an image.
    """
    table = pa.concat_tables(tables)
    ids = table["id"].to_pylist()
    first_of: dict[str, int] = {}
    again = [row for row, image_id in enumerate(ids) if first_of.setdefault(image_id, row) != row]
    if again:
        _check_agreement(table.take([first_of[ids[row]] for row in again]), table.take(again))
    order = order_by_id(ids)
    order = order[[first_of[ids[row]] == row for row in order]]
    return table.take(pa.array(order, pa.int64()))


def _check_agreement(first: pa.Table, second: pa.Table) -> None:
    for name in ("label", "prediction", "nfe"):
        if name in first.column_names:
            pairs = zip(first[name].to_pylist(), second[name].to_pylist(), strict=True)
            for row, (a, b) in enumerate(pairs):
                if a != b:
                    raise UserError(f"image {first['id'][row].as_py()!r}: found twice, with {name} {a} and {b}")
    if "scores_K" in first.column_names:
        a_scores, b_scores = (list_views(one["scores_K"].combine_chunks()) for one in (first, second))
        for row, (a_K, b_K) in enumerate(zip(a_scores, b_scores, strict=True)):
            if not np.allclose(a_K, b_K, rtol=1e-2):
                raise UserError(f"image {first['id'][row].as_py()!r}: found twice, with different scores")


def finish(run: Path, settings: Settings) -> pa.Table:
    """All parts become one file; the parts go. Call it on one process. Returns the rows.

    Raises:
        ValueError: as :func:`read_table`.
    """
    table = read_table(run, settings)
    errors = _error_files(run)
    if errors:
        merge_errors(errors, run / ERRORS)
    write_whole(table, settings, run)
    shutil.rmtree(run / PARTS, ignore_errors=True)
    return table


def write_whole(table: pa.Table, settings: Settings, run: Path) -> None:
    """Write the rows of a whole run to its folder."""
    described = {SETTINGS_KEY: settings.digest.encode(), b"diffclf": settings.to_json().encode()}
    write_table(table.replace_schema_metadata(described), run / PREDICTIONS)


def merge(runs: Sequence[Path], out: Path) -> pa.Table:
    """Join runs with the same settings, ended or not, into a new one. Returns its rows.

    Args:
        runs: Their folders.
        out: Folder of the whole; may be one of them.

    Raises:
        FileNotFoundError: if a folder is no run.
        ValueError: if settings differ, runs disagree about an image, or none has images.
    """
    all_settings = [Settings.read(run) for run in runs]
    for run, settings in zip(runs[1:], all_settings[1:], strict=True):
        all_settings[0].check_same(settings, f"the run in {str(run)!r}")
    table = join([read_table(run, settings) for run, settings in zip(runs, all_settings, strict=True)])
    if table.num_rows == 0:
        raise UserError(f"merge: no image in {', '.join(map(str, runs))}")
    place = claim(out, all_settings[0])
    errors = [path for run in runs for path in _error_files(run)]
    if errors:
        merge_errors(errors, place / ERRORS)
    write_whole(table, all_settings[0], place)
    if place in runs:
        shutil.rmtree(place / PARTS, ignore_errors=True)
    return table
