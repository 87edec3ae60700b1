"""From scores to probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from lightning_diffclf.classifier.arrays import Values, as_array, like
from lightning_diffclf.errors import UserError

CELLS = 2**18  # logits that a fit differentiates together: of many classes, all would take several times their memory

FLAT = 1e-7  # nats by which the likelihood still changes, of a temperature e times as large, where a fit ends


@dataclass(frozen=True)
class Posterior:
    """Class probabilities by a softmax of negative errors (Li et al. 2023, equation 6), uniform prior.

    The error of a candidate is a *mean* over the D values of x0, so errors of candidates differ by thousandths
    and a softmax of them is nearly flat, however sure the decision is. What the numbers mean depends on two choices:

    * ``reduction="mean"``: softmax of -score. A ranking, not a probability: always close to 1/K.
    * ``reduction="sum"``: softmax of -D · score, the error summed over values as equation 6 has it: a bound on the log
      likelihood with its timestep weights set to one. It moves with the number of values and of what the
      network cannot predict at all, and is usually overconfident.
    * ``temperature``: the logits are divided by it. Fitted on labelled images that were not used otherwise
      (:meth:`fit`), it makes the probabilities match how often such decisions are right. Then the reduction does not
      matter any more: the temperature absorbs the factor D.

    After elimination, give it differences (:attr:`~.classification.Classification.differences_K`) in place of scores:
    scores are then means over different draws, and the lowest may be another candidate's than the winner's. Where
    classes have several candidates, give it :func:`class_differences`.
    :attr:`~.classification.Classification.probabilities_K` does both. Candidates with infinite or NaN scores get
    probability 0; where no candidate has a finite score, all are equally likely.

    Args:
        reduction: ``mean`` or ``sum``.
        temperature: Positive; 1 leaves the logits alone.

    Raises:
        ValueError: if the reduction is unknown or the temperature not positive.

    Example:
        >>> scores_BK = np.array([[0.101, 0.103, 0.105]])
        >>> [round(p, 3) for p in Posterior("mean")(scores_BK, dims=4096)[0].tolist()]
        [0.334, 0.333, 0.333]
        >>> [round(p, 3) for p in Posterior("sum", temperature=4.0)(scores_BK, dims=4096)[0].tolist()]
        [0.873, 0.113, 0.015]
    """

    reduction: Literal["mean", "sum"] = "sum"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise UserError(f"posterior: reduction {self.reduction!r}, expected 'mean' or 'sum'")
        if not self.temperature > 0:
            raise UserError(f"posterior: temperature {self.temperature}, expected a positive number")

    def log_probabilities(self, scores_BK: Values, dims: int) -> Values:
        """Logarithm of :meth:`__call__`, (B, K) float64."""
        logits_BK = self._logits(as_array(scores_BK), dims)
        logits_BK -= np.log(np.exp(logits_BK).sum(1, keepdims=True))
        return like(scores_BK, logits_BK)

    def __call__(self, scores_BK: Values, dims: int) -> Values:
        """Probability of each candidate.

        Args:
            scores_BK: Mean error of K candidates for B images, over the same draws; or what they differ by.
            dims: Number of values of x0, D.

        Returns:
            (B, K) float64, each row sums to one.
        """
        p_BK = self._logits(as_array(scores_BK), dims)
        np.exp(p_BK, out=p_BK)
        p_BK /= p_BK.sum(1, keepdims=True)
        return like(scores_BK, p_BK)

    def _logits(self, scores_BK: np.ndarray, dims: int) -> np.ndarray:
        """A new array (B, K): 0 for the likeliest candidates, minus infinity for broken ones, unless all are."""
        logits_BK: np.ndarray = scores_BK * -(dims if self.reduction == "sum" else 1)
        logits_BK /= self.temperature
        np.fmax(logits_BK, -np.inf, out=logits_BK)  # of NaN and minus infinity, the latter
        np.minimum(logits_BK, np.finfo(np.float64).max, out=logits_BK)
        best_B1 = logits_BK.max(1, initial=-np.inf, keepdims=True)
        logits_BK[np.isneginf(best_B1[:, 0])] = 0
        logits_BK -= np.where(np.isneginf(best_B1), 0, best_B1)
        return logits_BK

    def fit(self, scores_BK: Values, target_B: Values, dims: int) -> Posterior:
        """The same posterior with the temperature that maximises the likelihood of held-out images.

        Args:
            scores_BK: As in :meth:`__call__`, of images that were used for nothing else.
            target_B: Position of the right candidate of each image, 0 … K-1, int64.
            dims: Number of values of x0, D.

        Raises:
            ValueError: if there are no images, or a target is not a position in 0 … K-1.
        """
        num_images, num_candidates = scores_BK.shape
        if num_images == 0 or len(target_B) != num_images:
            raise UserError(f"fit: {num_images} rows of scores and {len(target_B)} targets, expected equally many, ≥ 1")
        if int(target_B.min()) < 0 or int(target_B.max()) >= num_candidates:
            raise UserError(f"fit: targets {target_B.min()} … {target_B.max()}, expected 0 … {num_candidates - 1}")
        logits_BK, target_B1 = -as_array(scores_BK), as_array(target_B, np.int64)[:, None]
        # A broken right candidate has probability zero at any temperature: such images say nothing.
        usable_B = np.isfinite(np.take_along_axis(logits_BK, target_B1, 1)[:, 0])
        logits_BK, target_B1 = logits_BK[usable_B], target_B1[usable_B]
        broken_BK = ~np.isfinite(logits_BK)
        # Only differences within an image matter, and errors of images differ far more than those of its candidates.
        # In place, as these arrays are large.
        logits_BK -= np.take_along_axis(logits_BK, target_B1, 1)
        logits_BK[broken_BK] = 0
        spread = float(np.linalg.norm(logits_BK)) / (int(np.count_nonzero(logits_BK)) or 1) ** 0.5
        if not spread > 0:  # no two candidates differ: all temperatures are equally likely
            return self
        logits_BK /= spread  # so that the search begins at unit spread
        logits_BK[broken_BK] = -np.inf
        best_B1 = logits_BK.max(1, keepdims=True)
        logits_BK -= best_B1  # so that no exponential overflows
        logits_BK[broken_BK] = 0
        some_broken, together = bool(broken_BK.any()), max(1, CELLS // num_candidates)

        def derivatives(sharpness: float) -> tuple[float, float]:
            """First and second derivative of the negative log likelihood of an image, on average."""
            first, second = float(best_B1.sum()), 0.0
            for begin in range(0, len(logits_BK), together):
                some_BK = logits_BK[begin : begin + together]
                p_BK = some_BK * sharpness
                np.exp(p_BK, out=p_BK)
                if some_broken:
                    p_BK[broken_BK[begin : begin + together]] = 0
                total_B = p_BK.sum(1)
                p_BK *= some_BK
                mean_B = p_BK.sum(1) / total_B
                square_B = np.einsum("bk,bk->b", p_BK, some_BK) / total_B
                first, second = first + float(mean_B.sum()), second + float((square_B - mean_B**2).sum())
            return first / len(logits_BK), second / len(logits_BK)

        fitted = spread / _root(derivatives)
        return replace(self, temperature=fitted * (dims if self.reduction == "sum" else 1))


def _root(derivatives: Callable[[float], tuple[float, float]], most: float = np.exp(10.0)) -> float:
    """Where a convex function of a positive number has its minimum, by Newton's method within bounds.

    Args:
        derivatives: The first and the second one.
        most: What is not exceeded, and its inverse not undercut: the best temperature of a flawless classifier is zero.
    """
    low, high, place = 1 / most, most, 1.0
    for _ in range(200):
        first, second = derivatives(place)
        low, high = (low, place) if first > 0 else (place, high)
        following = place - first / second if second > 0 else most
        if not low < following < high:
            following = (low * high) ** 0.5
        if abs(first) * place <= FLAT:  # quadratic convergence: this step is the last that changes anything
            return float(following if abs(following / place - 1) < 1e-3 else place)
        place = following
    return place


def class_differences(differences_BK: Values, class_BK: Values, num_classes: int) -> Values:
    """What a posterior over classes is made of: each class stands where its best candidate stands.

    So the likeliest class is the one decided for, and a class gains nothing by having more candidates (prompts).

    Args:
        differences_BK: How much larger the mean error of each candidate is than the winner's
            (:attr:`~.classification.Classification.differences_K`).
        class_BK: Class of each candidate, 0 … ``num_classes`` - 1, int64; anything where the difference is infinite.
        num_classes: Number of classes C.

    Returns:
        (B, C) float64; infinite for classes without a candidate whose difference is finite.

    Example:
        >>> differences_1K, class_1K = np.array([[0.5, 0.0, 0.25]]), np.array([[0, 2, 0]])
        >>> class_differences(differences_1K, class_1K, num_classes=3).tolist()
        [[0.25, inf, 0.0]]
    """
    found_BK = as_array(differences_BK)
    best_BC = np.full((len(found_BK), num_classes), np.inf)
    inside_BK = as_array(class_BK, np.int64).clip(0, num_classes - 1)
    place_BK = inside_BK + np.arange(len(found_BK))[:, None] * num_classes
    np.fmin.at(best_BC.reshape(-1), place_BK.reshape(-1), found_BK.reshape(-1))  # of NaN and a number, the number
    return like(differences_BK, best_BC)
