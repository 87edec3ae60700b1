"""Intervals, paired comparisons and calibration of stored decisions: small functions of arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, ndtri, stdtr, stdtrit

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
    return _wilson(right / total, total, float(ndtri(0.5 + confidence / 2)))


def _wilson(share: float, trials: float, z: float) -> Interval:
    """Wilson's interval of a share of so many trials, ``z`` standard errors wide to each side."""
    z2 = z**2
    middle, half = share + z2 / (2 * trials), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * trials)) / trials)
    low, high = ((middle + side * half) / (1 + z2 / trials) for side in (-1, 1))
    return Interval(share, low if share > 0 else 0.0, high if share < 1 else 1.0)  # exact, but for rounding


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test: do two classifiers get the same share right? (McNemar 1947)

    Args:
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
    """
    disputed = only_first + only_second
    return min(1.0, 2 * float(bdtr(min(only_first, only_second), disputed, 0.5)))  # both tails are alike


def paired_difference(only_first: int, only_second: int, total: int, confidence: float = 0.95) -> Interval:
    """Accuracy of one classifier less that of another on the same images, with Bonett and Price's interval (2012).

    Wald's, with one more image of each kind that they disagree about, so that it has a width where they never do.

    Args:
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
        total: All images, at least one.
        confidence: Of the interval.
    """
    first, second = ((count + 1) / (total + 2) for count in (only_first, only_second))
    half = float(ndtri(0.5 + confidence / 2)) * math.sqrt((first + second - (first - second) ** 2) / (total + 2))
    middle = first - second
    return Interval((only_first - only_second) / total, max(-1.0, middle - half), min(1.0, middle + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that one below 0.05 is wrong in 5 % of all such families (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order, adjusted, largest = np.argsort(p_values, kind="stable"), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# --- images that come in groups --------------------------------------------------------------------------------------


class Clusters(NamedTuple):
    """Sums of a value over the images of each of G groups, from which its mean has a cluster-robust standard error.

    Images of a group (of a patient, of a Winoground group) are alike, so that they say less than as many others.

    Attributes:
        sums_G: Sum of the value over each group (G,), float64.
        sizes_G: Images of each group (G,), float64.
    """

    sums_G: np.ndarray
    sizes_G: np.ndarray

    @classmethod
    def of(cls, values_B: np.ndarray, groups_B: Sequence[object] | None = None) -> Clusters:
        """Of the values of images (B,) and the group of each; without groups, each is one by itself."""
        values_B = np.asarray(values_B, dtype=np.float64)
        if groups_B is None:
            return cls(values_B, np.ones(len(values_B)))
        position = {group: place for place, group in enumerate(dict.fromkeys(groups_B))}
        group_B = np.array([position[group] for group in groups_B], dtype=np.int64)
        return cls(np.bincount(group_B, weights=values_B), np.bincount(group_B).astype(np.float64))

    @property
    def mean(self) -> float:
        """Mean over images."""
        return float(self.sums_G.sum() / self.sizes_G.sum())

    @property
    def error(self) -> float:
        """Standard error of the mean (Miller 2024, "Adding error bars to evals", with G / (G - 1)); NaN of one group.

        With s̄ the mean over all n images: √(G / (G - 1) · Σ over groups of (Σ over its images of (s - s̄))²) / n.
        """
        groups = len(self.sums_G)
        if groups < 2:
            return math.nan
        residual_G = self.sums_G - self.mean * self.sizes_G
        return math.sqrt(groups / (groups - 1) * float(residual_G @ residual_G)) / float(self.sizes_G.sum())

    def interval(self, confidence: float = 0.95) -> Interval:
        """Of the mean, by Student's t with G - 1 degrees of freedom; of one group, from -∞ to ∞."""
        if len(self.sums_G) < 2:
            return Interval(self.mean, -math.inf, math.inf)
        half = float(stdtrit(len(self.sums_G) - 1, 0.5 + confidence / 2)) * self.error
        return Interval(self.mean, self.mean - half, self.mean + half)

    @property
    def p_value(self) -> float:
        """Two-sided, of the t-test that the mean is 0; 1 of one group, which says nothing."""
        if len(self.sums_G) < 2 or self.mean == 0:
            return 1.0
        return 2 * float(stdtr(len(self.sums_G) - 1, -abs(self.mean) / self.error)) if self.error else 0.0

    def share(self, confidence: float = 0.95) -> Interval:
        """Of a value that is 0 or 1: Wilson's interval for the effective number of images, with Student's t.

        The effective number is what as many independent images would need for this standard error (Franco et al. 2019);
        at most the number of images, and where all values are the same, which says nothing of a group's likeness, the
        number of groups. Of one group, from 0 to 1.
        """
        groups, images, share = len(self.sums_G), float(self.sizes_G.sum()), self.mean
        if groups < 2:
            return Interval(share, 0.0, 1.0)
        if share in (0.0, 1.0):
            effective = float(groups)
        else:
            effective = min(images, share * (1 - share) / max(self.error**2, 1e-300))
        return _wilson(share, effective, float(stdtrit(groups - 1, 0.5 + confidence / 2)))


# --- probabilities ---------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What the class probabilities of labelled images amount to.

    Attributes:
        confidence: Probability of the likeliest class (B,), float64.
        right: Whether the image was decided rightly (B,), bool.
        label: Probability of the label (B,), float64.
        squares: Sum of the squared probabilities of all classes (B,), float64.
    """

    confidence: np.ndarray
    right: np.ndarray
    label: np.ndarray
    squares: np.ndarray


class Scores(NamedTuple):
    """Sums over images that proper scores and calibration are read off; those of parts add up.

    Attributes:
        bins_M3: Images, confidences and right answers in bins of equal width over (0, 1] (M, 3), float64.
        nll: Of the labels, in nats (), float64.
        brier: Squared distances of the probabilities to certainty about the label (), float64.
    """

    bins_M3: np.ndarray
    nll: np.ndarray
    brier: np.ndarray

    @classmethod
    def zeros(cls, bins: int = 15) -> Scores:
        """Of no image."""
        return cls(np.zeros((bins, 3)), np.zeros(()), np.zeros(()))

    def add(self, judged: Judged) -> None:
        """Count more images, in place."""
        bins = len(self.bins_M3)
        bin_B = np.clip(np.ceil(judged.confidence * bins).astype(int) - 1, 0, bins - 1)
        for column, weights in enumerate((None, judged.confidence, judged.right)):
            self.bins_M3[:, column] += np.bincount(bin_B, weights=weights, minlength=bins)
        tiny = np.finfo(np.float64).tiny  # a class that is impossible costs 708 nats, not infinitely many
        np.subtract(self.nll, np.log(np.maximum(judged.label, tiny)).sum(), out=self.nll)
        np.add(self.brier, (judged.squares - 2 * judged.label + 1).sum(), out=self.brier)

    def numbers(self) -> dict[str, float]:
        """Mean negative log likelihood (nats), Brier score (0 … 2; Brier 1950) and ECE (Guo et al. 2017).

        The expected calibration error is the mean distance of confidence and accuracy over bins.
        """
        images = self.bins_M3[:, 0].sum()
        return {
            "nll": float(self.nll / images),
            "brier": float(self.brier / images),
            "ece": float(np.abs(self.bins_M3[:, 1] - self.bins_M3[:, 2]).sum() / images),
        }


def ece(confidence_B: np.ndarray, right_B: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017) of answers."""
    scores = Scores.zeros(bins)
    scores.add(Judged(confidence_B, right_B, np.ones(len(right_B)), np.ones(len(right_B))))
    return scores.numbers()["ece"]


class Selective(NamedTuple):
    """Accuracy among the surest answers, for every number of answers."""

    coverage: np.ndarray
    accuracy: np.ndarray


def selective_accuracy(sureness_B: np.ndarray, right_B: np.ndarray) -> Selective:
    """Accuracy of the surest 1, 2, …, B answers (risk-coverage curve, El-Yaniv & Wiener 2010)."""
    order = np.argsort(-sureness_B, kind="stable")
    count = np.arange(1, len(order) + 1)
    return Selective(count / len(order), right_B[order].cumsum() / count)


def selective_scores(sureness_B: np.ndarray, right_B: np.ndarray) -> dict[str, float]:
    """How well sureness sorts right answers before wrong ones; all in 0 … 1.

    * ``aurc``: area under the curve of the risk (share of wrong ones) among the surest answers against their share
      (Geifman & El-Yaniv 2017).
    * ``augrc``: the same of the share of *all* images that are wrong and answered (Traub et al. 2024).
    * ``coverage_at_5_risk``: the largest share of answers of which 5 % at most are wrong; 0 if there is none.
    * ``risk_at_80_coverage``: the risk among the surest 80 %.

    Areas are those of trapezoids from 1 / B to 1, divided by 1 - 1 / B; of a single image, its risk.
    """
    curve = selective_accuracy(sureness_B, right_B)
    risk_B, least = 1 - curve.accuracy, 1 - curve.coverage[0]
    allowed = np.flatnonzero(risk_B <= 0.05 + 1e-12)
    areas = [
        float((values[1:] + values[:-1]) / 2 @ np.diff(curve.coverage)) / least if least else float(values[0])
        for values in (risk_B, risk_B * curve.coverage)
    ]
    return {
        "aurc": areas[0],
        "augrc": areas[1],
        "coverage_at_5_risk": float(curve.coverage[allowed[-1]]) if len(allowed) else 0.0,
        "risk_at_80_coverage": float(risk_B[math.ceil(0.8 * len(risk_B) - 1e-9) - 1]),
    }
