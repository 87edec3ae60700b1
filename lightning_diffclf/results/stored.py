"""Reading the folder of a run, whether it has ended or not; :mod:`~lightning_diffclf.results.store` writes it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_diffclf.errors import UserError
from lightning_diffclf.results import attacks, certificates
from lightning_diffclf.results.errors import ERRORS
from lightning_diffclf.results.parts import Parts, Vanished
from lightning_diffclf.results.predictions import SCHEMA, list_views
from lightning_diffclf.results.row_files import PART_SUFFIX
from lightning_diffclf.results.settings import EVALUATION, SETTINGS, Settings

PREDICTIONS = "predictions.parquet"
PARTS = "parts"
PART_SUFFIXES = (PART_SUFFIX, ".parquet")  # the latter, of earlier versions
ERRORS_SUFFIX = ".errors.parquet"

ATTEMPTS = 10  # to read a run that changes meanwhile

SCHEMAS = {
    EVALUATION: SCHEMA,
    attacks.KIND: attacks.SCHEMA,
    certificates.KIND: certificates.SCHEMA,
}  # the columns of each kind of run

SETTINGS_KEY = b"diffclf_settings"  # where a Parquet file keeps the settings, or in a part, their digest


def scan(run: Path, columns: Sequence[str] | None = None, settings: Settings | None = None) -> Iterator[pa.Table]:
    """The records of a run a few megabytes at a time, each image once, whether it has ended or not.

    A run that has ended is ordered by id; others are not. A run may end meanwhile.

    Args:
        run: Its folder.
        columns: The columns to read, in the order of :data:`~.predictions.SCHEMA`; all if omitted.
        settings: Those of the run, if known already.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if a file cannot be read, is of another run, or files disagree about an image.

    Example:
        >>> sum(table.num_rows for table in scan(Path("out"), ["id"]))  # doctest: +SKIP
        50000
    """
    return Stored(run, settings or Settings.read(run)).chunks(columns)


class Stored:
    """A run's records, to be read in chunks as often as needed. Which files and images there are is found out once.

    Args:
        run: Its folder.
        settings: Those of the run.
        columns: The columns that iteration reads; all if omitted.
        kept: Columns of few bytes that are wanted alone: read with the ids, they stay in memory.

    Attributes:
        parts: Its files, once they were looked into.
    """

    def __init__(
        self, run: Path, settings: Settings, columns: Sequence[str] | None = None, kept: Sequence[str] = ()
    ) -> None:
        self._run, self._settings, self._columns, self._kept = run, settings, columns, kept
        self.parts: Parts | None = None

    def __iter__(self) -> Iterator[pa.Table]:
        return self.chunks(self._columns)

    @property
    def ids(self) -> pa.StringArray:
        """Ids of all images (N,).

        Raises:
            UserError: as :func:`scan`.
        """
        for _ in attempts():
            with suppress(Vanished):
                return self._found().ids
        raise unsteady(self._run)

    def chunks(self, columns: Sequence[str] | None, ids: pa.Array | None = None) -> Iterator[pa.Table]:
        """Some columns, a part or a few megabytes at a time; see :func:`scan`.

        Args:
            columns: Those to read, besides ``id``; all if None.
            ids: Of these images only; of all if omitted.

        Raises:
            UserError: as :func:`scan`.
        """
        names, given = None if columns is None else ["id", *columns], list[pa.ChunkedArray]()
        for _ in attempts():
            with suppress(Vanished):
                parts = self._found()
                chosen = np.full(len(parts), True) if ids is None else np.asarray(pc.is_in(parts.ids, ids))
                if given:  # before the run ended, from files that are gone
                    chosen &= ~np.asarray(pc.is_in(parts.ids, pa.chunked_array([c for t in given for c in t.chunks])))
                for table in parts.tables(names, chosen):
                    given.append(table["id"])
                    yield table
                return
            self.parts = None
        raise unsteady(self._run)

    def _found(self) -> Parts:
        if self.parts is None:
            self.parts = parts_of(files_of(self._run), self._settings, self._kept)
        return self.parts


class Ids(Set[str]):
    """A set of ids in little more memory than their text: each rank has those of all images that were decided.

    Args:
        ids: The ids (N,), each once.
    """

    def __init__(self, ids: pa.StringArray) -> None:
        self._ids = ids.take(pc.array_sort_indices(ids))  # by UTF-8, which sorts as Python does

    def __contains__(self, image_id: object) -> bool:
        if not isinstance(image_id, str):
            return False
        place = bisect_left(self._ids, image_id, key=pa.StringScalar.as_py)
        return place < len(self) and self._ids[place].as_py() == image_id

    def __iter__(self) -> Iterator[str]:
        return (one.as_py() for one in self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def read_table(run: Path, settings: Settings | None = None, columns: Sequence[str] | None = None) -> pa.Table:
    """The records of a run, whether it has ended or not, ordered by id; :func:`scan` needs less memory.

    Args:
        run: Its folder.
        settings: Those of the run, if known already.
        columns: The columns to read, besides ``id``; all if omitted.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: as :func:`scan`.
    """
    settings = settings or Settings.read(run)
    schema = schema_of(settings)
    names = list(schema.names) if columns is None else ["id", *columns]
    empty = pa.schema([field for field in schema if field.name in names]).empty_table()
    for _ in attempts():
        with suppress(Vanished):
            return pa.concat_tables([empty, *parts_of(files_of(run), settings).ordered(names)])
    raise unsteady(run)


def attempts() -> Iterator[int]:
    """Chances to read a run that ends meanwhile: its parts go, and their rows are elsewhere."""
    for number in range(ATTEMPTS):
        time.sleep(0.05 * number)
        yield number


def unsteady(run: Path) -> UserError:
    """What is raised after :func:`attempts`."""
    return UserError(f"run: files in {str(run)!r} come and go, expected one process that writes to it")


def files_of(run: Path) -> list[Path]:
    """The files of records of a run, in the order in which they count."""
    # Parts first: they go when the whole is there.
    there = sorted((run / PARTS).glob("*"))
    parts = [p for p in there if p.suffix in PART_SUFFIXES and not p.name.endswith(ERRORS_SUFFIX)]
    whole = run / PREDICTIONS
    return [whole, *parts] if whole.is_file() else parts


def errors_of(path: Path) -> Path:
    """Where the errors of a file of records are, if they were kept."""
    return path.with_name(ERRORS if path.name == PREDICTIONS else f"{path.stem}{ERRORS_SUFFIX}")


def parts_of(paths: Sequence[Path], settings: Settings, kept: Sequence[str] = (), known: Parts | None = None) -> Parts:
    """The records in files of a run with ``settings``; see :class:`~.parts.Parts`."""

    def check(path: Path, schema: pa.Schema) -> None:
        found = (schema.metadata or {}).get(SETTINGS_KEY, b"none").decode()
        if found != settings.digest:
            raise UserError(
                f"run: {str(path)!r} belongs to a run with other settings ({found}), expected {settings.digest} as in "
                f"{SETTINGS}; remove it, and its images will be evaluated again"
            )

    return Parts(paths, schema_of(settings).with_metadata(described(settings)), check, _check_agreement, kept, known)


def schema_of(settings: Settings) -> pa.Schema:
    """The columns of a run's records.

    Raises:
        UserError: if it is of a kind that is not known here.
    """
    if settings.kind not in SCHEMAS:
        raise UserError(f"run: it is of the kind {settings.kind!r}, expected one of {', '.join(SCHEMAS)}")
    return SCHEMAS[settings.kind]


def described(settings: Settings) -> dict[bytes, bytes]:
    """The metadata of a whole run's file."""
    return {SETTINGS_KEY: settings.digest.encode(), b"diffclf": settings.to_json().encode()}


def _check_agreement(first: pa.Table, second: pa.Table) -> None:
    for name in ("label", "prediction", "nfe"):
        if name in first.column_names:
            pairs = zip(first[name].to_pylist(), second[name].to_pylist(), strict=True)
            for row, (a, b) in enumerate(pairs):
                if a != b:
                    raise _disagree(first, row, f"{name} {a} and {b}")
    if "scores_K" in first.column_names:
        a_scores, b_scores = (list_views(one["scores_K"].combine_chunks()) for one in (first, second))
        for row, (a_K, b_K) in enumerate(zip(a_scores, b_scores, strict=True)):
            if len(a_K) != len(b_K) or not np.allclose(a_K, b_K, rtol=1e-2):
                raise _disagree(first, row, "different scores")


def _disagree(table: pa.Table, row: int, found: str) -> UserError:
    image_id = table["id"][row].as_py()
    return UserError(f"image {image_id!r}: found twice, with {found}, expected the same; two images need two ids")
