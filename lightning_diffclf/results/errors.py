"""errors.parquet: every error of every image, from which :mod:`.replay` tries other rules without the network.

One row for each image. Errors are stored draw by draw, all candidates of a draw together: they share their leading
digits, which compresses better. Of the distances between candidates, the upper triangle of each draw is stored, as
roots: half precision reaches from 6e-8 to 6e4, distances reach further.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.results.parts import ROW_GROUP_BYTES, Parts
from lightning_diffclf.results.seal import Damaged, sealed_file, sealed_writer

if TYPE_CHECKING:
    from lightning_diffclf.classifier import Classification, DiffusionClassifier

ERRORS = "errors.parquet"

# Errors never repeat, so a dictionary would only add to them; their bytes compress when sorted by significance.
ENCODING: dict[str, Any] = {
    "use_dictionary": False,
    "column_encoding": {"errors.list.element": "BYTE_STREAM_SPLIT"},
}

INFO_KEY = b"diffclf"  # in the metadata of the file's schema

COLUMNS = {
    "id": pa.string(),
    "label": pa.int64(),  # null where unknown
    "candidates_K": pa.list_(pa.int32()),
    "draws_K": pa.list_(pa.int32()),  # how many draws each candidate saw: below S where it was dropped
    "nfe": pa.int64(),  # network calls for the image: those of errors (also reused ones), and a proposal's
    "errors": pa.list_(pa.float32()),  # (S, K), flattened; NaN where not evaluated
    "distances": pa.list_(pa.float16()),  # roots, (S, K (K-1) / 2), flattened: pairs as np.triu_indices(K, 1) has them
}


@dataclass(frozen=True)
class ErrorsInfo:
    """What all errors of a file have in common.

    Attributes:
        loss: Name of the error, as :class:`~lightning_diffclf.classifier.Loss` has it.
        seed: Key of the noise.
        timesteps_S: Timestep of each draw, in the order spent.
        log_snr_S: Log signal-to-noise ratio of each draw, in the same order.
        names: Name of each candidate of the denoiser.
        classes: Class index of each candidate of the denoiser.
        elimination: The rule of the run, as ``repr`` has it.
        weights: The timestep weights of the run; see :func:`~lightning_diffclf.classifier.score.timestep_weights`.
        budget: Network calls for one image at most in the run; None for no limit.
        ensemble: What counted where a class has several candidates: ``best`` or ``mean``.
        dims: Number of values of x0, D; None as long as no image was classified.
        antithetic: Whether draws were pairs with opposite noise.
    """

    loss: str
    seed: int
    timesteps_S: tuple[float, ...]
    log_snr_S: tuple[float, ...]
    names: tuple[str, ...]
    classes: tuple[int, ...]
    elimination: str
    weights: str | tuple[float, ...] = "uniform"
    budget: int | None = None
    ensemble: str = "best"
    dims: int | None = None
    antithetic: bool = False

    @property
    def draws(self) -> int:
        """Number of draws S."""
        return len(self.timesteps_S)

    @cached_property
    def candidates(self) -> Candidates:
        """Candidates of the denoiser."""
        return Candidates(self.names, self.classes)

    @classmethod
    def of(cls, classifier: DiffusionClassifier) -> ErrorsInfo:
        """Info on the errors of ``classifier``."""
        denoiser, timesteps_S, recipe = classifier.denoiser, classifier.timesteps_S, classifier.recipe
        return cls(
            loss=classifier.loss.name,
            seed=classifier.draws.seed,
            timesteps_S=tuple(timesteps_S.double().tolist()),
            log_snr_S=tuple(classifier.terms.log_snr_S.tolist()),
            names=denoiser.candidates.names,
            classes=denoiser.candidates.classes,
            elimination=repr(classifier.rule),
            weights=recipe.weights if isinstance(recipe.weights, str) else tuple(recipe.weights),
            budget=recipe.budget,
            ensemble=recipe.ensemble,
            antithetic=classifier.draws.antithetic,
        )

    def to_json(self) -> str:
        """As stored in the file."""
        return json.dumps(asdict(self) | {"draws": self.draws})

    @classmethod
    def from_json(cls, text: str | bytes) -> ErrorsInfo:
        """Undo :meth:`to_json`.

        Raises:
            ValueError: if it is something else.
        """
        try:
            values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(text).items()}
            draws = values.pop("draws")
            found = cls(**values)
            numbers = [*found.timesteps_S, *found.log_snr_S]
            fits = (
                len(found.timesteps_S) == len(found.log_snr_S) == draws
                and all(isinstance(number, (int, float)) for number in numbers)
                and found.candidates.classes == found.classes
                and all(isinstance(name, str) for name in (*found.names, found.loss, found.elimination, found.ensemble))
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"its description cannot be read ({str(error)[:200]})") from error
        if not fits:
            raise UserError("its description is not what an evaluation writes")
        return found


class ErrorsWriter:
    """Writes errors as they come. What is at ``path`` is complete: until :meth:`close`, the file has another name.

    Args:
        path: Where the file will be.
        info: What the errors have in common.
        distances: Store the distances between the candidates' predictions as well.

    Example:
        >>> writer = ErrorsWriter(path, ErrorsInfo.of(classifier))  # doctest: +SKIP
        >>> for result, label in zip(classifier(images), labels):  # doctest: +SKIP
        ...     writer.add(result, label)
        >>> writer.close()  # doctest: +SKIP
    """

    def __init__(self, path: Path, info: ErrorsInfo, distances: bool = False) -> None:
        self.path, self.info = path, info
        self.images = 0  # added so far
        self._columns = [name for name in COLUMNS if distances or name != "distances"]
        self._rows: dict[str, list[Any]] = {name: [] for name in self._columns}
        self._bytes = 0  # of the rows in memory
        self._files = ExitStack()
        self._file: pq.ParquetWriter | None = None

    def add(self, result: Classification, label: int | None) -> None:
        """Store one image.

        Args:
            result: Its decision, with errors (and distances, if they are stored).
            label: Its class; None if unknown.

        Raises:
            ValueError: if the errors (or distances) were not kept.
            FailedWrite: if they cannot be written; then all that were given before are lost as well.
        """
        if result.errors_KS is None or ("distances" in self._rows and result.distances_SKK is None):
            missing = "errors_KS" if result.errors_KS is None else "distances_SKK"
            raise UserError(f"image {result.image_id!r}: no {missing}, expected a classifier that keeps them")
        self.info = replace(self.info, dims=result.dims)
        row: dict[str, Any] = {
            "id": str(result.image_id),
            "label": label,
            "candidates_K": result.candidates_K.numpy(),
            "draws_K": result.draws_K.numpy(),
            "nfe": result.nfe + result.reused,
            "errors": result.errors_KS.numpy().T.ravel(),
        }
        if "distances" in self._rows and result.distances_SKK is not None:
            upper = np.triu_indices(len(result.candidates_K), 1)
            squared_SP = result.distances_SKK.numpy()[:, upper[0], upper[1]]
            row["distances"] = np.sqrt(squared_SP.astype(np.float32)).astype(np.float16).ravel()
        for name, value in row.items():
            self._rows[name].append(value)
            self._bytes += value.nbytes if isinstance(value, np.ndarray) else 16
        self.images += 1
        if self._bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        columns = [_to_array(self._rows[name], COLUMNS[name]) for name in self._columns]
        if self._file is None:
            schema = pa.schema([(name, COLUMNS[name]) for name in self._columns])
            described = schema.with_metadata({INFO_KEY: self.info.to_json().encode()})
            self._file = self._files.enter_context(sealed_writer(self.path, described, "errors", **ENCODING))
        if self._bytes:
            try:
                self._file.write_table(pa.Table.from_arrays(columns, schema=self._file.schema))
            except OSError:
                self._files.__exit__(*sys.exc_info())  # removes the file, and raises FailedWrite
                raise
        self._rows, self._bytes = {name: [] for name in self._columns}, 0

    def close(self) -> None:
        """Write what is left and give the file its name, also if no image was added."""
        self._flush()
        self._files.close()


def _to_array(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind) or not values:
        return pa.array(values, kind)
    ends = list(accumulate((len(value) for value in values), initial=0))
    flat = np.concatenate(values).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat, kind.value_type))


@dataclass(frozen=True)
class StoredImage:
    """The errors of one image.

    Attributes:
        image_id: Its id.
        label: Its class; None if unknown.
        candidates_K: Indices of its candidates (K,), int64.
        draws_K: How many draws each candidate saw (K,), int64.
        nfe: Network calls that the run spent on it.
        errors_SK: Errors (S, K), float32, draws in the order spent; NaN where not evaluated.
        distances_SP: Mean squared differences between what two candidates predict, for the P = K (K-1) / 2 pairs of
            ``np.triu_indices(K, 1)`` (S, P), float32, as the classifier saw them; None if not stored or not asked
            for.
    """

    image_id: str
    label: int | None
    candidates_K: np.ndarray
    draws_K: np.ndarray
    nfe: int
    errors_SK: np.ndarray
    distances_SP: np.ndarray | None = None


class StoredErrors:
    """A file of errors, read as needed: only a few megabytes at a time are in memory.

    Args:
        path: The file.

    Attributes:
        info: What all errors have in common.
        has_distances: Whether distances between candidates are stored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no file of errors.
    """

    def __init__(self, path: str | Path) -> None:
        if not Path(path).is_file():
            raise MissingFile(f"errors: no file {str(path)!r}")
        self.path = Path(path)
        with self._open() as file:
            schema, self._images, self._groups = file.schema_arrow, file.metadata.num_rows, file.num_row_groups
        if INFO_KEY not in (schema.metadata or {}) or not set(schema.names) >= COLUMNS.keys() - {"distances"}:
            raise UserError(f"errors: {str(path)!r} holds no errors, expected what keep_errors writes ({ERRORS})")
        try:
            self.info = ErrorsInfo.from_json(schema.metadata[INFO_KEY])
        except UserError as error:
            raise UserError(f"errors: {str(path)!r} cannot be read ({error})") from error
        self.has_distances = "distances" in schema.names

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        """The file, verified; what goes wrong with it is told with its name."""
        try:
            with sealed_file(self.path) as file:
                yield file
        except (Damaged, pa.ArrowException, OSError) as error:
            raise UserError(f"errors: {str(self.path)!r} cannot be read ({error})") from error

    def __len__(self) -> int:
        return self._images

    def __iter__(self) -> Iterator[StoredImage]:
        return self.images()

    def images(self, distances: bool = True) -> Iterator[StoredImage]:
        """The images, in the order of the file; without their distances if they are not needed."""
        for number in range(self._groups):
            yield from self.group(number, distances)

    def ids_by_group(self) -> list[list[str]]:
        """Ids of the images of each row group, in their order."""
        with self._open() as file:
            groups = [file.read_row_group(number, columns=["id"]) for number in range(self._groups)]
        return [group["id"].to_pylist() for group in groups]

    def group(self, number: int, distances: bool = True) -> list[StoredImage]:
        """The images of one row group, some megabytes; without their distances if they are not needed."""
        columns = [name for name in COLUMNS if name != "distances" or (distances and self.has_distances)]
        with self._open() as file:
            batches = file.read_row_group(number, columns=columns).to_batches()
        return [image for batch in batches for image in self._unpack(batch)]

    def _unpack(self, batch: pa.RecordBatch) -> Iterator[StoredImage]:
        def values(name: str, row: int) -> np.ndarray:
            return batch.column(name)[row].values.to_numpy(zero_copy_only=False)

        draws, distances = self.info.draws, "distances" in batch.schema.names
        for row in range(batch.num_rows):
            yield StoredImage(
                image_id=batch.column("id")[row].as_py(),
                label=batch.column("label")[row].as_py(),
                candidates_K=values("candidates_K", row).astype(np.int64),
                draws_K=values("draws_K", row).astype(np.int64),
                nfe=batch.column("nfe")[row].as_py(),
                errors_SK=values("errors", row).reshape(draws, -1),
                distances_SP=(
                    np.square(values("distances", row).astype(np.float32)).reshape(draws, -1) if distances else None
                ),
            )


def merge_errors(parts: Sequence[Path], path: Path) -> int:
    """Join parts into ``path``, ordered by id (as numbers where all are). Of images in several, the first counts.

    The parts may be larger than the memory; see :class:`~.parts.Parts`.

    Args:
        parts: Files that :class:`ErrorsWriter` wrote.
        path: Where the whole will be; may be one of the parts.

    Returns:
        Number of images.
    """
    whole = Parts(
        parts,
        remedy="remove it and what was decided with it (predictions.parquet, or the part with .arrow in place of "
        ".errors.parquet), and their images will be evaluated again",
    )
    whole.write(path, **ENCODING)
    return len(whole)
