"""How the classes of an image fell behind the winner over the draws: what a report draws as lines."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import pyarrow as pa

CLASSES = 10  # that have a line
STOPS = 24  # of a line, besides its end


class Trail(TypedDict):
    """Lines of the best classes of an image, as stored.

    Attributes:
        draws: Numbers of draws after which the classes are compared (P,), rising.
        classes: The classes (C,), the one decided for first.
        behind: How much larger the mean error of each class is than that of the class decided for, after as many of
            ``draws`` as it stayed in play (C lists of at most P). Negative while it was ahead.
    """

    draws: list[int]
    classes: list[int]
    behind: list[list[float]]


KIND = pa.struct(
    [("draws", pa.list_(pa.int32())), ("classes", pa.list_(pa.int32())), ("behind", pa.list_(pa.list_(pa.float32())))]
)


def trail(sums_KS: np.ndarray, contestants: np.ndarray, ranked: np.ndarray) -> Trail | None:
    """The lines of the classes ``ranked``, of which the first was decided for; None if there are none.

    Args:
        sums_KS: Sum of the weighted errors of each contestant until each draw (K, S); infinite from where it is out.
        contestants: Class of each contestant (K,). A class stands where its best contestant stands.
        ranked: Classes from the one decided for on; the first ten get a line.
    """
    classes = ranked[:CLASSES].tolist()
    if not classes:
        return None
    sums_CS = np.stack([sums_KS[contestants == c].min(0) for c in classes])
    stayed_C = np.isfinite(sums_CS).sum(1)
    evenly = np.geomspace(1, sums_CS.shape[1], STOPS).round().astype(int)  # most fall early
    draws = np.unique(np.concatenate([evenly, stayed_C]))
    draws = draws[draws > 0]
    behind_CP = ((sums_CS - sums_CS[0])[:, draws - 1] / draws).astype(np.float32)  # as stored
    lines = zip(behind_CP, stayed_C, strict=True)
    return Trail(
        draws=draws.tolist(), classes=classes, behind=[line_P[draws <= stayed].tolist() for line_P, stayed in lines]
    )
