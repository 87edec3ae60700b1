"""Certified images, as stored, and what they come to; docs/trust.md explains the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from rich.table import Table

from lightning_diffclf.results.statistics import Interval, wilson

KIND = "certification"  # what the settings of such a run say


@dataclass(frozen=True)
class CertifiedImage:
    """What is certain of the smoothed answer to one image.

    Attributes:
        id: Id of the image.
        label: Its class.
        prediction: The answer; None without a majority.
        radius: Within which no image has another answer, Euclidean, of images in [0, 1]; 0 without an answer.
        votes: How many of the noisy images that were counted had the answer.
        seconds: That it took.
        rank: Process that certified.
    """

    id: str
    label: int
    prediction: int | None
    radius: float
    votes: int
    seconds: float
    rank: int


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("radius", pa.float64()),
        ("votes", pa.int64()),
        ("seconds", pa.float64()),
        ("rank", pa.int32()),
    ]
)


def numbers(tables: Iterable[pa.Table], radii: Sequence[float], confidence: float = 0.95) -> dict[str, object]:
    """Certified accuracy: the share of images with the right answer, and a radius of at least r.

    Args:
        tables: Records, in parts.
        radii: The r to say it for, in units of images in [0, 1].
        confidence: Of the intervals (Wilson 1927), over images; that a certificate holds is not part of it.

    Returns:
        Numbers by name: those of metrics.json. ``certified`` has a row for each radius. Only ``images`` where there are
        none.
    """
    parts: list[np.ndarray] = []
    for table in filter(len, tables):
        answers = table["prediction"].to_pylist()
        right_B = np.array([one == label for one, label in zip(answers, table["label"].to_pylist(), strict=True)])
        answered_B = np.array([one is not None for one in answers])
        parts.append(np.stack([right_B, answered_B, table["radius"].to_numpy(), table["seconds"].to_numpy()], 1))
    if not parts:
        return {"images": 0}
    right_B, answered_B, radius_B, seconds_B = np.concatenate(parts).T
    images, rows = len(right_B), []
    for radius in radii:
        share = wilson(int((right_B.astype(bool) & (radius_B >= radius)).sum()), images, confidence)
        rows.append({"radius": radius, "accuracy": share.value, "low": share.low, "high": share.high})
    return {
        "certified": rows,
        "answered": float(answered_B.mean()),
        "median_radius": float(np.median(np.where(right_B > 0, radius_B, 0.0))),
        "images": images,
        "seconds": float(seconds_B.sum()),
    }


def to_table(found: dict[str, object], about: str) -> Table:
    """The numbers for the terminal; ``about`` says what was done."""
    table = Table(title=about)
    table.add_column("radius")
    table.add_column("right and certified")
    rows: object = found["certified"]
    assert isinstance(rows, list)
    for row in rows:
        table.add_row(f"{row['radius']:g}", str(Interval(row["accuracy"], row["low"], row["high"])))
    table.caption = (
        f"{found['images']:,} images, {found['answered']:.1%} with an answer; median radius of all "
        f"{found['median_radius']:.3g}; {found['seconds']:,.1f} s"
    )
    return table
