"""Attacked images, as stored, and what they come to; docs/trust.md explains the numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table

from lightning_diffclf.results.statistics import Interval, wilson

KIND = "attack"  # what the settings of such a run say


@dataclass(frozen=True)
class AttackedImage:
    """What an attack made of one image, under each of S seeds of the draws.

    Attributes:
        id: Id of the image.
        label: Its class.
        clean_S: Class decided for without attack (S,).
        attacked_S: Class decided for after it.
        margin_before: How far the logit of the label is above the best other one, without attack: the least over seeds.
        margin_after: The same of the attacked image; below 0 where the classifier is fooled.
        distance: Between image and attacked image, in the norm of the attack, of images in [0, 1]: the largest.
        queries: How often the network was asked about the image, gradients included; of AutoAttack, the mean over the
            images that were attacked together.
        seconds: That it took; likewise.
        rank: Process that attacked.
    """

    id: str
    label: int
    clean_S: np.ndarray
    attacked_S: np.ndarray
    margin_before: float
    margin_after: float
    distance: float
    queries: float
    seconds: float
    rank: int


SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("label", pa.int64()),
        ("clean_S", pa.list_(pa.int32())),
        ("attacked_S", pa.list_(pa.int32())),
        ("margin_before", pa.float64()),
        ("margin_after", pa.float64()),
        ("distance", pa.float64()),
        ("queries", pa.float64()),
        ("seconds", pa.float64()),
        ("rank", pa.int32()),
    ]
)


def numbers(tables: Iterable[pa.Table], confidence: float = 0.95) -> dict[str, float]:
    """What attacked images come to.

    An image counts as right if it is decided rightly under every seed, and as robust if it is so before and after the
    attack: the worst of the seeds.

    Args:
        tables: Records, in parts.
        confidence: Of the intervals of shares (Wilson 1927).

    Returns:
        Numbers by name: those of metrics.json; only ``images`` where there are none.
    """
    right: list[np.ndarray] = []
    robust: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for table in filter(len, tables):
        label_B = table["label"].to_numpy()[:, None]
        clean_BS, attacked_BS = (np.array(table[name].to_pylist()) == label_B for name in ("clean_S", "attacked_S"))
        right.append(clean_BS)
        robust.append(clean_BS & attacked_BS)
        others.append(np.stack([table[name].to_numpy() for name in ("distance", "queries", "seconds")], 1))
    if not right:
        return {"images": 0}
    right_BS, robust_BS = np.concatenate(right), np.concatenate(robust)
    distance_B, queries_B, seconds_B = np.concatenate(others).T
    images, fooled_B = len(right_BS), right_BS.all(1) & ~robust_BS.all(1)
    found: dict[str, float] = {}
    for name, one_BS in (("accuracy", right_BS), ("robust_accuracy", robust_BS)):
        share = wilson(int(one_BS.all(1).sum()), images, confidence)
        found |= {name: share.value, f"{name}_low": share.low, f"{name}_high": share.high}
    if right_BS.shape[1] > 1:
        found["robust_accuracy_of_a_seed"] = float(robust_BS.mean())
    if fooled_B.any():
        found["distance_of_fooled"] = float(distance_B[fooled_B].mean())
    return found | {
        "images": images,
        "seeds": right_BS.shape[1],
        "queries_per_image": float(queries_B.mean()),
        "seconds": float(seconds_B.sum()),
    }


def to_table(found: dict[str, float], about: str, calls: int) -> Table:
    """The numbers for the terminal.

    Args:
        found: What :func:`numbers` returns.
        about: What was done, for the title.
        calls: Network calls of a query.
    """
    table = Table(title=about, show_header=False)
    for name, title in (("accuracy", "right without attack"), ("robust_accuracy", "right under attack")):
        table.add_row(title, str(Interval(*(found[f"{name}{end}"] for end in ("", "_low", "_high")))))
    if "robust_accuracy_of_a_seed" in found:
        table.add_row(
            "under attack, a seed", f"{found['robust_accuracy_of_a_seed']:.2%}; above, the worst of {found['seeds']}"
        )
    if "distance_of_fooled" in found:
        table.add_row("distance of fooled images", f"{found['distance_of_fooled']:.4g}")
    queries = found["queries_per_image"]
    table.add_row("images", f"{found['images']:,}")
    table.add_row("queries", f"{queries:,.1f} an image, of {calls:,} network calls each")
    table.add_row("time", f"{found['seconds']:,.1f} s")
    return table


def described(settings: dict[str, Any]) -> str:
    """An attack in words, from what the settings of a run say of it.

    Example:
        >>> described({"attack": "APGD", "norm": "linf", "eps": 0.1, "steps": 20, "randomness": "fixed", "draws": 5})
        'APGD, linf, eps 0.1 of images in [0, 1], 5 fixed draws'
    """
    count, draws = settings["draws"], "no draws"
    if count is not None:
        draws = f"{count} {settings['randomness']} draw{'s' * (count > 1)}"
    return f"{settings['attack']}, {settings['norm']}, eps {settings['eps']:.4g} of images in [0, 1], {draws}"
