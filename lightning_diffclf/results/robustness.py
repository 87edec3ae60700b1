"""Effective robustness: how much better on shifted data than what accuracy on ordinary data lets expect.

Accuracies of many ordinary classifiers on two test sets lie on a line, where both axes are logits; a classifier above
it is effectively robust (Taori et al. 2020, Miller et al. 2021; Li et al. 2023, figure 6).
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import binomtest

from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.results.statistics import Interval

CONFIDENCE = 0.995  # of the paper's intervals


def clopper_pearson(right: int, total: int, confidence: float = CONFIDENCE) -> Interval:
    """Share of ``right`` among ``total`` with the exact interval of Clopper and Pearson (1934).

    Raises:
        ValueError: if ``total`` is 0 or ``right`` not in 0 … ``total``.

    Example:
        >>> print(clopper_pearson(352, 360, 0.95))
        97.78% (95.67% – 99.04%)
    """
    if not 0 <= right <= total or total < 1:
        raise UserError(f"interval: {right} of {total}, expected a count of at least one trial")
    found = binomtest(right, total)
    low, high = found.proportion_ci(confidence, method="exact")
    return Interval(float(found.statistic), float(low), float(high))


def read_timm(path: str | Path) -> dict[str, float]:
    """Accuracy of each model, 0 … 1, of a file of results as timm publishes them (``results-imagenet-a.csv``).

    Of models that are listed several times, at several sizes, the first one counts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has no columns ``model`` and ``top1``, or an accuracy is no share in percent.
    """
    if not Path(path).is_file():
        raise MissingFile(f"results: no file {str(path)!r}, expected one of timm's, in results/ of its repository")
    found: dict[str, float] = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            try:
                top1 = float(row["top1"]) / 100
                if not 0 <= top1 <= 1:
                    raise ValueError(row["top1"])
                found.setdefault(row["model"], top1)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"results: {str(path)!r}, line {line}: {error!r}, expected columns 'model' and 'top1' in percent"
                ) from error
    return found


class Fit(NamedTuple):
    """A line through accuracies on logit axes: logit(shifted) = intercept + slope · logit(ordinary)."""

    slope: float
    intercept: float
    models: int

    def expected(self, ordinary: np.ndarray | float) -> np.ndarray:
        """Accuracy on the shifted data that the accuracy on the ordinary ones lets expect."""
        return np.asarray(expit(self.intercept + self.slope * logit(np.asarray(ordinary))))


def fit(ordinary: np.ndarray, shifted: np.ndarray) -> Fit:
    """Least squares on logit axes; models with an accuracy of 0 or 1, whose logit is infinite, are left out.

    Raises:
        ValueError: if fewer than three models are left, or all are equally good on the ordinary data.
    """
    inside = (ordinary > 0) & (ordinary < 1) & (shifted > 0) & (shifted < 1)
    if inside.sum() < 3 or np.ptp(ordinary[inside]) == 0:
        raise UserError(f"fit: {inside.sum()} models with different accuracies inside 0 … 1, expected 3 or more")
    slope, intercept = np.polyfit(logit(ordinary[inside]), logit(shifted[inside]), 1)
    return Fit(float(slope), float(intercept), int(inside.sum()))


class Counted(NamedTuple):
    """A run of ours, by its images: how many of how many are right."""

    name: str
    right: int
    total: int


@dataclass(frozen=True)
class Robustness:
    """Ordinary classifiers, the line through them, and runs of ours beside it.

    Attributes:
        models: One row for each model: ``model``, ``ordinary``, ``shifted``, accuracies in 0 … 1.
        line: The line.
        runs: One row for each of ours: ``run``, and of ``ordinary`` and ``shifted`` data the accuracy and its interval
            (``…_low``, ``…_high``), ``expected``, and ``effective`` robustness with its interval, that of the shifted
            accuracy less what the line expects.
    """

    models: pd.DataFrame
    line: Fit
    runs: pd.DataFrame


def robustness(
    ordinary: dict[str, float], shifted: dict[str, float], runs: list[tuple[Counted, Counted]]
) -> Robustness:
    """Compare runs on (ordinary, shifted) data with the models that are known on both.

    Raises:
        ValueError: as :func:`fit`.
    """
    common = [name for name in ordinary if name in shifted]
    models = pd.DataFrame(
        {
            "model": common,
            "ordinary": [ordinary[name] for name in common],
            "shifted": [shifted[name] for name in common],
        }
    )
    line = fit(models["ordinary"].to_numpy(dtype=float), models["shifted"].to_numpy(dtype=float))
    rows = []
    for first, second in runs:
        a, b = (clopper_pearson(one.right, one.total) for one in (first, second))
        expected = float(line.expected(a.value))
        rows.append(
            {"run": second.name, "ordinary": a.value, "ordinary_low": a.low, "ordinary_high": a.high}
            | {"shifted": b.value, "shifted_low": b.low, "shifted_high": b.high, "expected": expected}
            | {"effective": b.value - expected, "effective_low": b.low - expected, "effective_high": b.high - expected}
        )
    return Robustness(models, line, pd.DataFrame(rows))
