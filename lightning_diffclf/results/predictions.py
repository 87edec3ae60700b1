"""predictions.parquet: one row for each image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_diffclf.classifier import Classification

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int64()),  # null where unknown
        ("prediction", pa.int64()),  # null where the network returned nothing finite
        ("margin", pa.float64()),
        ("abstained", pa.bool_()),
        ("candidates_K", pa.list_(pa.int32())),
        ("scores_K", pa.list_(pa.float64())),
        ("draws_K", pa.list_(pa.int32())),
        ("nfe", pa.int64()),
    ]
)


def to_table(results: Sequence[Classification], labels: Sequence[int | None]) -> pa.Table:
    """Rows of :data:`SCHEMA` for decisions and, where known, right classes."""
    return pa.table(
        {
            "id": [str(r.image_id) for r in results],
            "label": list(labels),
            "prediction": [r.label for r in results],
            "margin": [r.margin for r in results],
            "abstained": [r.abstained for r in results],
            "candidates_K": [r.candidates_K.tolist() for r in results],
            "scores_K": [r.scores_K.tolist() for r in results],
            "draws_K": [r.draws_K.tolist() for r in results],
            "nfe": [r.nfe for r in results],
        },
        schema=SCHEMA,
    )


def write_table(table: pa.Table, path: Path) -> None:
    """Write ``table`` to ``path`` at once: the file is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary, compression="zstd")
    os.replace(temporary, path)


def merge_parts(parts: Sequence[Path], path: Path) -> pa.Table:
    """Join the parts of all ranks into ``path``, ordered by id (as numbers where all are), and remove them."""
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    ids = table["id"].to_pylist()
    numeric = all(i.removeprefix("-").isdecimal() for i in ids)
    order = sorted(range(len(ids)), key=lambda row: int(ids[row]) if numeric else ids[row])
    table = table.take(pa.array(order, pa.int64()))
    write_table(table, path)
    for part in parts:
        part.unlink()
    return table
