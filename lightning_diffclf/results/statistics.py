"""Intervals, paired comparisons and calibration of stored decisions: small functions of arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

from lightning_diffclf.errors import UserError


class Interval(NamedTuple):
    """A share with its confidence interval, all in 0 … 1."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """In percent."""
        return f"{self.value:.2%} ({self.low:.2%} – {self.high:.2%})"


def wilson(right: int, total: int, confidence: float = 0.95) -> Interval:
    """Share of ``right`` among ``total`` with Wilson's score interval (Wilson 1927).

    Raises:
        ValueError: if ``total`` is 0 or ``right`` not in 0 … ``total``.

    Example:
        >>> print(wilson(352, 360))
        97.78% (95.68% – 98.87%)
    """
    if not 0 <= right <= total or total < 1:
        raise UserError(f"interval: {right} of {total}, expected a count of at least one trial")
    low, high = binomtest(right, total).proportion_ci(confidence, method="wilson")
    return Interval(right / total, float(low), float(high))


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: do two classifiers get the same share right? (McNemar 1947)

    Args:
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
    """
    disputed = only_first + only_second
    return 1.0 if disputed == 0 else float(binomtest(only_first, disputed).pvalue)


class Bins(NamedTuple):
    """Images binned by confidence: what a reliability diagram shows, empty bins left out."""

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray


def reliability(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = 15) -> Bins:
    """Mean confidence and accuracy in bins of equal width over (0, 1]."""
    bin_B = np.clip(np.ceil(confidence_B * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_B, minlength=bins)
    used = count > 0
    confidence = np.bincount(bin_B, weights=confidence_B, minlength=bins)[used] / count[used]
    accuracy = np.bincount(bin_B, weights=right_B, minlength=bins)[used] / count[used]
    return Bins(confidence, accuracy, count[used])


def ece(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean distance of confidence and accuracy over bins."""
    binned = reliability(confidence_B, right_B, bins)
    return float(np.abs(binned.confidence - binned.accuracy) @ binned.images / len(confidence_B))


def brier(label_B: np.ndarray, squares_B: np.ndarray) -> float:
    """Mean squared distance of the probabilities to certainty about the label (Brier 1950), 0 … 2.

    Args:
        label_B: Probability of each image's label.
        squares_B: Sum of the squared probabilities of all classes.
    """
    return float(np.mean(squares_B - 2 * label_B + 1))


def nll(label_B: np.ndarray) -> float:
    """Mean negative log probability of the labels, in nats, from their probabilities."""
    return float(-np.log(np.maximum(label_B, np.finfo(np.float64).tiny)).mean())


class Selective(NamedTuple):
    """Accuracy among the surest answers, for every number of answers."""

    coverage: np.ndarray
    accuracy: np.ndarray


def selective(sureness_B: np.ndarray, right_B: np.ndarray) -> Selective:
    """Accuracy of the surest 1, 2, …, B answers (risk-coverage curve, El-Yaniv & Wiener 2010)."""
    order = np.argsort(-sureness_B, kind="stable")
    count = np.arange(1, len(order) + 1)
    return Selective(count / len(order), right_B[order].cumsum() / count)
