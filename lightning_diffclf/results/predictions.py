"""predictions.parquet: one row for each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from lightning_diffclf.results.seal import sealed_writer
from lightning_diffclf.results.trails import KIND, Trail, trail

if TYPE_CHECKING:
    from lightning_diffclf.classifier import Classification


@dataclass(frozen=True)
class Record:
    """The decision on one image, as stored; docs/results.md explains each column.

    Attributes:
        id: Id of the image.
        label: Its class; None if unknown.
        prediction: Class decided for; None if the network returned nothing finite.
        top5: The five best classes, or all if there are fewer.
        margin: :attr:`Classification.margin`, in nats.
        abstained: Whether the margin was smaller than asked for.
        candidates_K: Indices of its candidates (K,).
        scores_K: Mean error of each.
        differences_K: :attr:`Classification.differences_K`.
        draws_K: Draws that each saw.
        nfe: Network calls, those of a search or another proposal included.
        dims: Number of values of x0.
        choice_S: Class with the lowest error at each draw spent, among the candidates then in play (S,); -1 where the
            network returned nothing finite.
        leader_S: Class with the lowest mean error after each draw spent, likewise.
        seconds: Time from the decision before on the same rank to this one.
        rank: Process that decided.
        thumbnail: A small picture of the image, in WebP; None if it has no pixels.
        error_map: Where the class decided for fits better (positive) or worse than the right one (h, w); None where
            not made.
        search_nfe: Network calls that finding the candidates took; None in files of earlier versions.
        dropped_draws: Draws of the search without a finite gradient; likewise.
        trail: How the best classes fell behind over the draws; None without a decision, and in files of earlier
            versions.
        reused: Errors that an earlier run had computed, beside ``nfe``; None in files of earlier versions.
        group: What the image belongs to with others that are like it, such as a patient; None if the data do not say.
    """

    id: str
    label: int | None
    prediction: int | None
    top5: np.ndarray
    margin: float
    abstained: bool
    candidates_K: np.ndarray
    scores_K: np.ndarray
    differences_K: np.ndarray
    draws_K: np.ndarray
    nfe: int
    dims: int
    choice_S: np.ndarray
    leader_S: np.ndarray
    seconds: float
    rank: int
    thumbnail: bytes | None = None
    error_map: np.ndarray | None = None
    search_nfe: int | None = 0
    dropped_draws: int | None = 0
    trail: Trail | None = None
    group: str | None = None
    reused: int | None = 0

    @classmethod
    def of(
        cls,
        result: Classification,
        classes: Sequence[int],
        weights_S: np.ndarray,
        label: int | None = None,
        ensemble: Literal["best", "mean"] = "best",
        **others: Any,
    ) -> Record:
        """The record of a decision.

        Args:
            result: The decision, with its errors.
            classes: Class index of each candidate of the denoiser.
            weights_S: What each draw weighs in the score.
            label: Class of the image; None if unknown.
            ensemble: Whether a class with several candidates stands where its best one does, or at their mean.
            **others: ``seconds``, ``rank`` and, if there are any, ``thumbnail``, ``error_map`` and ``group``.
        """
        assert result.errors_KS is not None
        candidates_K, draws_K = result.candidates_K.numpy(), result.draws_K.numpy()
        classes_K = np.asarray(classes)[candidates_K]
        spent = int(draws_K.max())
        errors_KS = result.errors_KS.numpy()[:, :spent].astype(np.float64)
        errors_KS[~np.isfinite(errors_KS)] = np.inf  # of dropped and broken candidates
        if ensemble == "mean":
            contestants, errors_KS = class_means(errors_KS, classes_K)
        else:
            contestants = classes_K
        choice_S = best_of(errors_KS, contestants)
        weighted_KS = np.where(np.isfinite(errors_KS), errors_KS * weights_S[:spent], np.inf)  # a weight may be 0
        sums_KS = weighted_KS.cumsum(1)
        ranked = ranked_classes(result, classes_K)
        return cls(
            id=str(result.image_id),
            label=label,
            prediction=result.prediction,
            top5=ranked[:5].astype(np.int32),
            margin=result.margin,
            abstained=result.abstained,
            candidates_K=candidates_K.astype(np.int32),
            scores_K=result.scores_K.numpy(),
            differences_K=result.differences_K.numpy().astype(np.float32),
            draws_K=draws_K.astype(np.int32),
            nfe=result.nfe,
            dims=result.dims,
            choice_S=choice_S.astype(np.int32),
            leader_S=best_of(sums_KS, contestants).astype(np.int32),
            trail=trail(sums_KS, contestants, ranked),
            search_nfe=result.search_nfe,
            dropped_draws=result.dropped_draws,
            reused=result.reused,
            **others,
        )

    @property
    def votes(self) -> float:
        """Share of its draws that alone would have decided as all did; 0 without a decision."""
        return float(np.mean(self.choice_S == self.prediction)) if self.prediction is not None else 0.0

    @property
    def complete(self) -> int:
        """Draws that all candidates saw."""
        return int(self.draws_K.min())


def ranked_classes(result: Classification, classes_K: np.ndarray) -> np.ndarray:
    """Classes from the winner on: those that stayed longer, and among them those with the lower difference.

    None if there is no winner. ``classes_K`` has the class of each candidate of the image.
    """
    if result.prediction is None:
        return np.array([], dtype=np.int64)
    differences_K, draws_K = result.differences_K.numpy(), result.draws_K.numpy()
    order = np.lexsort((differences_K, -draws_K, classes_K != result.prediction))
    return np.array(list(dict.fromkeys(classes_K[order].tolist())), dtype=np.int64)


def class_means(errors_KS: np.ndarray, classes_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes (C,), and the mean error of those of each's candidates that are in play at each draw (C, S).

    Errors are infinite where a candidate is not in play; those of a class without any are infinite as well.
    """
    order = np.argsort(classes_K, kind="stable")
    found_C, first_C = np.unique(classes_K[order], return_index=True)
    in_play_KS = np.isfinite(errors_KS[order])
    sums_CS = np.add.reduceat(np.where(in_play_KS, errors_KS[order], 0), first_C, axis=0)
    counts_CS = np.add.reduceat(in_play_KS, first_C, axis=0, dtype=np.int64)
    return found_C, np.where(counts_CS > 0, sums_CS / np.maximum(counts_CS, 1), np.inf)


def best_of(errors_KS: np.ndarray, classes_K: np.ndarray) -> np.ndarray:
    """Class with the lowest error in each column (S,); -1 where none is finite."""
    return np.where(np.isfinite(errors_KS).any(0), classes_K[errors_KS.argmin(0)], -1)


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("top5", pa.list_(pa.int32())),
        ("margin", pa.float64()),
        ("abstained", pa.bool_()),
        ("candidates_K", pa.list_(pa.int32())),
        ("scores_K", pa.list_(pa.float64())),
        ("differences_K", pa.list_(pa.float32())),
        ("draws_K", pa.list_(pa.int32())),
        ("nfe", pa.int64()),
        ("dims", pa.int64()),
        ("choice_S", pa.list_(pa.int32())),
        ("leader_S", pa.list_(pa.int32())),
        ("seconds", pa.float64()),
        ("rank", pa.int32()),
        ("thumbnail", pa.binary()),
        ("error_map", pa.list_(pa.list_(pa.float32()))),
        ("search_nfe", pa.int64()),
        ("dropped_draws", pa.int32()),
        ("trail", KIND),
        ("group", pa.string()),
        ("reused", pa.int64()),
    ]
)


# Of numbers that hardly repeat, and of pictures, a dictionary would only add to them; whole numbers of each candidate
# are near those before them, and written faster than a dictionary is made.
_ENCODINGS = {
    "scores_K": "BYTE_STREAM_SPLIT",
    "differences_K": "BYTE_STREAM_SPLIT",
    "candidates_K": "DELTA_BINARY_PACKED",
    "draws_K": "DELTA_BINARY_PACKED",
}
ENCODING: dict[str, Any] = {
    "use_dictionary": [
        f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name
        for field in SCHEMA
        if field.name not in (*_ENCODINGS, "margin", "seconds", "thumbnail", "error_map", "trail")
    ],
    "column_encoding": {f"{name}.list.element": encoding for name, encoding in _ENCODINGS.items()},
}


def to_table(records: Sequence[Any], schema: pa.Schema = SCHEMA) -> pa.Table:
    """Records as a table of :data:`SCHEMA`, or of another whose columns they have as attributes."""
    columns = {}
    for name in schema.names:
        values = [getattr(record, name) for record in records]
        if name == "error_map":
            values = [None if value is None else list(value) for value in values]
        columns[name] = pa.array(values, schema.field(name).type)
    return pa.table(columns, schema=schema)


def from_table(table: pa.Table) -> list[Record]:
    """Undo :func:`to_table`; the arrays are views of the table's memory. Of columns left out, records have None."""
    columns: dict[str, Sequence[Any]] = dict.fromkeys(SCHEMA.names, [None] * table.num_rows)
    for name in [name for name in SCHEMA.names if name in table.column_names]:
        column = table[name].combine_chunks() if table.num_rows else pa.array([], SCHEMA.field(name).type)
        if name == "error_map":
            columns[name] = [None if v is None else np.array(v, np.float32) for v in column.to_pylist()]
        elif pa.types.is_list(column.type):
            columns[name] = list_views(column)
        else:
            columns[name] = column.to_pylist()
    return [Record(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]


def list_views(column: pa.ListArray) -> list[np.ndarray]:
    """The lists of a column as views of its memory."""
    values, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
    return [values[a:b] for a, b in pairwise(ends)]


def write_table(table: pa.Table, path: Path) -> None:
    """Write ``table`` to ``path`` at once; see :func:`~.seal.sealed_writer`."""
    with sealed_writer(path, table.schema, "results", **ENCODING) as out:
        out.write_table(table)
