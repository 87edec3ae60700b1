"""None of these: how well numbers of stored decisions tell images of other classes, or of other kinds, from known ones.

Nothing is computed for it that a run does not store anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table
from scipy.special import ndtri
from scipy.stats import rankdata

from lightning_diffclf.classifier import Exhaustive
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.calibration import FOLDS, fold_of
from lightning_diffclf.results.columns import Chunk, Columns
from lightning_diffclf.results.conformal import check_same_classifier
from lightning_diffclf.results.errors import ERRORS, StoredErrors
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.statistics import Interval
from lightning_diffclf.results.summary import Outline, judge

RESAMPLES = 500

EXPLAINED = {
    "margin": "minus the margin in nats",
    "probability": "1 minus the probability of the likeliest class",
    "error": "mean error of the winner",
    "gap": "winner's error relative to the mean of the other candidates, which stands for no condition",
    "unconditional": "best condition's error relative to that without a condition",
    "timesteps": "mean squared z-score of the winner's log error at each timestep",
}


class Foreignness:
    """Numbers of each image that are larger for images that fit no class.

    Args:
        outline: The evaluation.
        unconditional: Index of the candidate that is the null condition; None if there is none.
    """

    COLUMNS = ("label", "prediction", "margin", "candidates_K", "scores_K", "differences_K", "dims")

    def __init__(self, outline: Outline, unconditional: int | None = None) -> None:
        self.outline, self.unconditional = outline, unconditional
        self._parts: dict[str, list[np.ndarray]] = {}

    def update(self, chunk: Chunk) -> None:
        """Take more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            for name, values_B in self._of(columns).items():
                self._parts.setdefault(name, []).append(values_B)

    def _of(self, columns: Columns) -> dict[str, np.ndarray]:
        candidates = columns.lists("candidates_K").padded(-1, np.int64)
        scores_BK = columns.lists("scores_K").padded(np.inf, np.float64)
        behind_BK = columns.lists("differences_K").padded(np.inf, np.float64)
        null_BK = candidates == (-2 if self.unconditional is None else self.unconditional)
        winner = (np.arange(len(columns)), np.where(null_BK, np.inf, behind_BK).argmin(1))
        error_B = scores_BK[winner]
        with np.errstate(invalid="ignore", divide="ignore"):
            behind_BK = behind_BK - behind_BK[winner][:, None]
            others_BK = np.isfinite(behind_BK) & ~null_BK
            others_BK[winner] = False
            gap_B = np.where(others_BK, behind_BK, 0).sum(1) / others_BK.sum(1)
            found = {
                "margin": -columns.numbers("margin"),
                "probability": 1 - judge(columns, self.outline, self.outline.posterior).confidence,
                "error": error_B,
                "gap": -gap_B / error_B,
            }
            if self.unconditional is not None:
                found["unconditional"] = -np.where(null_BK, behind_BK, -np.inf).max(1) / error_B
        # An image without an answer, or without a rival, fits nothing: it is as foreign as can be.
        return {name: np.where(np.isnan(values), np.inf, values) for name, values in found.items()}

    def scores(self) -> dict[str, np.ndarray]:
        """Each number of all images (B,), float64."""
        return {name: np.concatenate(parts) for name, parts in self._parts.items()}


class Levels:
    """Log error of the winner at each draw, and how far it is from that of known images.

    Args:
        errors: Errors of a run that dropped no candidate.
        unconditional: Index of the candidate that is the null condition; None if there is none.
    """

    def __init__(self, errors: StoredErrors, unconditional: int | None = None) -> None:
        rows, folds = [], []
        for image in errors.images(distances=False):
            errors_SK = image.errors_SK[:, image.candidates_K != (-1 if unconditional is None else unconditional)]
            means_K = np.where(np.isfinite(errors_SK).all(0), errors_SK.mean(0), np.inf)
            rows.append(np.log(errors_SK[:, means_K.argmin()]))
            folds.append(fold_of(str(image.image_id)))
        self.log_BS, self.folds_B = np.stack(rows).astype(np.float64), np.array(folds)

    def distances(self, known: Levels) -> np.ndarray:
        """Mean over draws of z², with mean and spread of ``known`` images (B,); of its own, those of other folds."""
        found_B = np.empty(len(self.log_BS))
        for fold in range(FOLDS):
            others_BS = known.log_BS[known.folds_B != fold]
            spread_S = others_BS.std(0, ddof=1).clip(1e-12)
            mine = self.folds_B == fold
            found_B[mine] = np.square((self.log_BS[mine] - others_BS.mean(0)) / spread_S).mean(1)
        return np.where(np.isnan(found_B), np.inf, found_B)


@dataclass(frozen=True)
class Detection:
    """How well a number tells foreign images from known ones; shares with 95 % intervals.

    Attributes:
        auroc: Probability that a foreign image has the larger number, ties half; interval by DeLong et al. 1988.
        fpr95: Share of the foreign images that pass where 95 % of the known ones do; interval by the bootstrap.
        aupr: Average precision, foreign images positive; interval by the bootstrap.
    """

    auroc: Interval
    fpr95: Interval
    aupr: Interval


def detect(known_B: np.ndarray, foreign_B: np.ndarray) -> Detection:
    """Tell ``foreign_B`` from ``known_B``, numbers that should be larger for foreign images.

    Raises:
        ValueError: if one of them is empty.
    """
    if not (len(known_B) and len(foreign_B)):
        raise UserError(f"ood: {len(known_B)} known and {len(foreign_B)} foreign images, expected at least one of each")
    return Detection(
        auroc(known_B, foreign_B),
        *(_bootstrap(of, known_B, foreign_B) for of in (fpr95, average_precision)),
    )


def auroc(known_B: np.ndarray, foreign_B: np.ndarray) -> Interval:
    """Area under the ROC curve with DeLong's 95 % interval, by midranks (Sun & Xu 2014).

    Of a perfect separation, which has no variance, the interval is that of as many successes as the smaller set has
    images (Clopper-Pearson).
    """
    m, n = len(foreign_B), len(known_B)
    above_m, below_n = placements(known_B, foreign_B)
    value, least = float(above_m.mean()), 0.025 ** (1 / min(m, n))
    if value in (0.0, 1.0):
        return Interval(value, least if value else 0.0, 1.0 if value else 1 - least)
    half = float(ndtri(0.975)) * math.sqrt(_variance(above_m) / m + _variance(below_n) / n)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def placements(known_B: np.ndarray, foreign_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What DeLong's interval is made of: both have the AUROC as their mean; their variances add up.

    Returns:
        above: Share of the known images that each foreign one exceeds, ties half.
        below: Share of the foreign images that exceed each known one.
    """
    m, n = len(foreign_B), len(known_B)
    ranks = rankdata(np.concatenate([foreign_B, known_B]))
    return (ranks[:m] - rankdata(foreign_B)) / n, 1 - (ranks[m:] - rankdata(known_B)) / m


def _variance(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) if len(values) > 1 else 0.25


def fpr95(known_B: np.ndarray, foreign_B: np.ndarray) -> float:
    """Share of the foreign images that pass, at the lowest bound that 95 % of the known ones pass."""
    rank = math.ceil(0.95 * len(known_B) - 1e-9)
    return float((foreign_B <= np.partition(known_B, rank - 1)[rank - 1]).mean())


def average_precision(known_B: np.ndarray, foreign_B: np.ndarray) -> float:
    """Mean precision over the steps of recall, foreign images positive."""
    values = np.concatenate([foreign_B, known_B])
    order = np.argsort(-values, kind="stable")
    values, positive = values[order], order < len(foreign_B)
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # only after whole groups of ties
    hits = positive.cumsum()[ends]
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / len(foreign_B))


def _bootstrap(of: Callable[[np.ndarray, np.ndarray], float], known_B: np.ndarray, foreign_B: np.ndarray) -> Interval:
    rng = np.random.default_rng(0)
    values = [of(*(rng.choice(one, len(one)) for one in (known_B, foreign_B))) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(of(known_B, foreign_B), float(low), float(high))


def compare_with_foreign(
    known: Evaluation, foreign: Evaluation, unconditional: str | None = None
) -> dict[str, Detection]:
    """How well each number tells the images of ``foreign`` from those of ``known``.

    Args:
        known: A run of images of the classes.
        foreign: A run by the same network and recipe on images that are of none of them.
        unconditional: Name of the candidate that is the null condition, or an empty prompt.

    Returns:
        One for each number; ``timesteps`` only where both runs kept the errors of all draws and candidates.

    Raises:
        ValueError: if the runs are one and the same, not by the same network and recipe, or there is no such candidate.
    """
    if known.path.resolve() == foreign.path.resolve():
        raise UserError(f"ood: {str(known.path)!r} is both, known and foreign images, expected two runs")
    ours, theirs = numbers_of(known, foreign, unconditional)
    return {name: detect(ours[name], theirs[name]) for name in ours}


def numbers_of(
    known: Evaluation, foreign: Evaluation, unconditional: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Each number of all images (B,) of ``known`` and of ``foreign``; see :func:`compare_with_foreign`."""
    check_same_classifier(known.settings, foreign.settings.identity, f"the run of known images {str(known.path)!r}")
    names, null = known.settings.info["candidate_names"], None
    if unconditional is not None:
        if unconditional not in names:
            raise UserError(f"unconditional: no candidate {unconditional!r}, expected one of {names[:10]}")
        null = names.index(unconditional)
    both = [Foreignness(run.outline, null) for run in (known, foreign)]
    for run, one in zip((known, foreign), both, strict=True):
        run.show(one)
    ours, theirs = (one.scores() for one in both)
    files = [run.path / ERRORS for run in (known, foreign)]
    stored = [StoredErrors(file) for file in files if file.is_file()]
    if len(stored) == 2 and all(one.info.elimination == repr(Exhaustive()) and not one.info.budget for one in stored):
        levels = [Levels(one, null) for one in stored]
        ours["timesteps"], theirs["timesteps"] = (one.distances(levels[0]) for one in levels)
    return ours, theirs


def to_dict(found: dict[str, Detection]) -> dict[str, Any]:
    """As plain values."""
    return {name: {n: v._asdict() for n, v in vars(one).items()} for name, one in found.items()}


def to_table(found: dict[str, Detection], known: int, foreign: int) -> Table:
    """For the terminal."""
    table = Table("", "AUROC", "FPR95", "AUPR", "what", title=f"{foreign} foreign images among {known} known ones")
    for name, one in found.items():
        table.add_row(
            name, *(f"{i.value:.3f} ({i.low:.3f} – {i.high:.3f})" for i in vars(one).values()), EXPLAINED[name]
        )
    return table
