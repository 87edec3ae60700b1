"""The paper's ablations from the stored errors of one run, without the network: timesteps, shared draws, guidance.

Suffixes of shapes: B images, S draws, K candidates, N draws of a decision.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from lightning_diffclf.candidates import NONE_OF_THESE
from lightning_diffclf.classifier import Exhaustive
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.replay import visiting_order
from lightning_diffclf.results.statistics import wilson

COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # draws of a decision, as far as there are so many
GUIDANCE = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0)  # the paper's figure 8 has these, and more
BANDS = 10  # parts of the time axis
REPEATS = 20  # random choices of draws that an accuracy is the mean of


class Ablated(NamedTuple):
    """Errors as arrays.

    Attributes:
        errors_BSK: Of the candidates that are classes, draws from clean to noisy.
        labels_B: Class of each image.
        nested_S: The draws in the order in which a run visits them.
        null_BSK: Mean squared difference between the prediction under each candidate and under no condition; None
            where it is not stored.
    """

    errors_BSK: np.ndarray
    labels_B: np.ndarray
    nested_S: np.ndarray
    null_BSK: np.ndarray | None

    @classmethod
    def of(cls, stored: StoredErrors, null: str = NONE_OF_THESE) -> Ablated:
        """Those of a file.

        Args:
            stored: Errors of an exhaustive run on labelled images, all asked about the same candidates, one for each
                class.
            null: Name of the candidate without a condition, as ``none_of_these`` of a class-conditional network has it.

        Raises:
            ValueError: if there are no labelled images, or a candidate did not see all draws.
        """
        info = stored.info
        images = [one for one in stored.images() if one.label is not None]
        if not images:
            raise UserError(f"errors: {str(stored.path)!r} has no labelled images, expected some to tell what is right")
        if len({tuple(one.candidates_K) for one in images}) > 1 or len(set(info.classes)) < len(info.classes):
            raise UserError("errors: candidates differ or share classes, expected one for each class, as in all images")
        order = np.lexsort((np.array(info.timesteps_S), -np.array(info.log_snr_S)))  # from clean to noisy
        errors = np.stack([one.errors_SK[order] for one in images]).astype(np.float64)
        if np.isnan(errors).any():
            raise UserError(f"errors: candidates of {str(stored.path)!r} did not see all draws, expected all errors")
        names = [info.names[k] for k in images[0].candidates_K]
        classes = [k for k, name in enumerate(names) if name != null]
        distances = None
        if null in names and stored.has_distances:
            first, second = np.triu_indices(len(names), 1)
            place = {(int(a), int(b)): pair for pair, (a, b) in enumerate(zip(first, second, strict=True))}
            at = names.index(null)
            columns = [place[min(k, at), max(k, at)] for k in classes]
            found = [one.distances_SP[order][:, columns] for one in images if one.distances_SP is not None]
            distances = np.stack(found).astype(np.float64)
        labels = np.array([one.label for one in images])
        nested = np.argsort(order)[visiting_order(info, Exhaustive())]
        return cls(errors[:, :, classes], labels, nested, distances)


def ablations(stored: StoredErrors) -> pd.DataFrame:
    """Accuracy under every setting: ``ablation``, ``setting``, ``x``, ``accuracy``, ``low``, ``high``, 0 … 1.

    The ablations and what ``x`` is:

    - ``one draw`` (figure 3): of single draws, by tenths of the time axis; the middle of each, from clean to noisy.
    - ``timesteps`` (figure 4): even over the time axis, or the cleanest, middle or noisiest tenth of it alone; draws.
    - ``draws`` (section 3.3): random draws, the same ones for all candidates or others for each; draws.
    - ``guidance`` (figure 8): predictions ``(1 + w) conditional - w unconditional``; w. Exact: with e and u the errors
      of both and d the mean squared difference between them, that of the mixture is ``(1 + w) e - w u + w (1 + w) d``.
      Needs the null label among the candidates, and distances.

    Intervals are Wilson's, as if accuracies that are means over several choices of draws came from one.

    Raises:
        ValueError: as :meth:`Ablated.of`.
    """
    given = Ablated.of(stored)
    rows = [*_one_draw(given), *_timesteps(given), *_shared(given)]
    if given.null_BSK is not None and stored.info.loss == "l2":
        rows += _guidance(given)
    columns = ["ablation", "setting", "x", "accuracy"]
    frame, count = pd.DataFrame(rows, columns=columns), len(given.labels_B)
    bounds = [wilson(round(share * count), count) for share in frame["accuracy"]]
    return frame.assign(low=[b.low for b in bounds], high=[b.high for b in bounds])


Row = tuple[str, str, float, float]


def _accuracy(scores_BK: np.ndarray, labels_B: np.ndarray) -> float:
    return float((scores_BK.argmin(1) == labels_B).mean())


def _bands(draws: int) -> list[np.ndarray]:
    return [part for part in np.array_split(np.arange(draws), BANDS) if len(part)]


def _one_draw(given: Ablated) -> list[Row]:
    draws = given.errors_BSK.shape[1]
    alone_S = [_accuracy(given.errors_BSK[:, s], given.labels_B) for s in range(draws)]
    middle = [(float(part.mean()) + 0.5) / draws for part in _bands(draws)]
    return [
        ("one draw", "one draw", x, float(np.mean([alone_S[s] for s in part])))
        for x, part in zip(middle, _bands(draws), strict=True)
    ]


def _timesteps(given: Ablated) -> list[Row]:
    draws = given.errors_BSK.shape[1]
    parts = _bands(draws)
    chosen = {"even": given.nested_S, "cleanest tenth": parts[0], "middle tenth": parts[len(parts) // 2]}
    chosen["noisiest tenth"] = parts[-1]
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for setting, some in chosen.items():
        orders = [some] if setting == "even" else [rng.permutation(some) for _ in range(REPEATS)]
        for count in (n for n in COUNTS if n <= len(some)):
            found = [_accuracy(given.errors_BSK[:, order[:count]].mean(1), given.labels_B) for order in orders]
            rows.append(("timesteps", setting, count, float(np.mean(found))))
    return rows


def _shared(given: Ablated) -> list[Row]:
    errors_BSK = given.errors_BSK
    _, draws, candidates = errors_BSK.shape
    rng, rows = np.random.default_rng(0), list[Row]()
    for count in (n for n in COUNTS if 2 * n <= draws):  # of all draws, each candidate would have the same ones
        shared, own = [], []
        for _ in range(REPEATS):
            shared.append(_accuracy(errors_BSK[:, rng.permutation(draws)[:count]].mean(1), given.labels_B))
            order_SK = rng.permuted(np.tile(np.arange(draws)[:, None], candidates), axis=0)
            picked_BNK = np.take_along_axis(errors_BSK, order_SK[None, :count], axis=1)
            own.append(_accuracy(picked_BNK.mean(1), given.labels_B))
        rows += [("draws", "shared", count, float(np.mean(shared))), ("draws", "own", count, float(np.mean(own)))]
    return rows


def _guidance(given: Ablated) -> list[Row]:
    assert given.null_BSK is not None
    errors_BK, null_BK = given.errors_BSK.mean(1), given.null_BSK.mean(1)
    # The error of the unconditional prediction is the same for all candidates of an image.
    scores = {w: (1 + w) * errors_BK + w * (1 + w) * null_BK for w in GUIDANCE}
    return [("guidance", "guidance", w, _accuracy(scores_BK, given.labels_B)) for w, scores_BK in scores.items()]
