"""Probabilities that match how often decisions are right, judged on images that they were not fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import nsmallest

import numpy as np

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.results.columns import Chunk, Columns, Tried
from lightning_diffclf.results.statistics import Judged, Scores
from lightning_diffclf.results.summary import Outline, judge

FOLDS = 5
ENOUGH = 2000  # images to fit one number to
ENOUGH_TO_SAY = 50  # images for a statement about calibration


@dataclass(frozen=True)
class Calibration:
    """What a fitted temperature is worth.

    Attributes:
        temperature: Fitted to all images: for use on others.
        calibrated_nll: Negative log likelihood of the labels in nats, where each image's temperature was fitted to the
            other folds.
        calibrated_brier: Brier score, likewise.
        calibrated_ece: Expected calibration error in 15 bins, likewise.
    """

    temperature: float
    calibrated_nll: float
    calibrated_brier: float
    calibrated_ece: float


def fold_of(image_id: str) -> int:
    """0 … 4, from the id alone: so that it depends on neither order nor other images."""
    return hashlib.blake2b(image_id.encode(), digest_size=4).digest()[0] % FOLDS


def order_of(image_id: str) -> bytes:
    """Of all images, those that come first by this are as good as a random choice, and always the same."""
    return hashlib.blake2b(image_id.encode()).digest()


@dataclass(frozen=True)
class _Example:
    """A labelled image that temperatures can be fitted to: the differences of its classes (C,), float32."""

    order: bytes
    label: int
    dims: int
    differences_C: np.ndarray


class Sample:
    """Labelled images to fit temperatures to: of all that it is shown, it keeps at most 2,000 of each fold.

    Args:
        outline: The evaluation.

    Attributes:
        labelled: Labelled images that it was shown.
    """

    COLUMNS = ("id", "label", "prediction", "candidates_K", "differences_K", "dims")

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.labelled = 0
        self._folds: list[list[_Example]] = [[] for _ in range(FOLDS)]
        self._ends = [b"\xff" * 65] * FOLDS  # what comes after them in order is not kept

    def update(self, chunk: Chunk) -> None:
        """Show it more images."""
        outline = self.outline
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            columns = columns.labelled
            self.labelled += len(columns)
            tried, label_B = columns.tried(outline.classes, outline.num_classes), columns.numbers("label")
            # Images whose class was not among the candidates, or that were not decided, say nothing about temperatures.
            tells_B = (tried.has(label_B) & np.isfinite(tried.differences_BW)).any(1)
            tells_B &= columns.numbers("prediction") >= 0
            ids, found = columns.strings("id"), [list[tuple[bytes, int]]() for _ in range(FOLDS)]
            for row in np.flatnonzero(tells_B).tolist():
                found[fold_of(ids[row])].append((order_of(ids[row]), row))
            for fold, some in enumerate(found):
                self._keep(fold, tried, label_B, columns.dims, some)

    def _keep(self, fold: int, tried: Tried, label_B: np.ndarray, dims: int, found: list[tuple[bytes, int]]) -> None:
        """Of what is kept of a fold and of more images, given by order and row, keep those that come first."""
        first = nsmallest(ENOUGH, (one for one in found if one[0] < self._ends[fold]))
        if not first:
            return
        differences_BC = tried.take(np.array([row for _, row in first])).spread(self.outline.num_classes)
        more = [
            _Example(order, int(label_B[row]), dims, differences_C.copy())  # which does not hold those of the others
            for (order, row), differences_C in zip(first, differences_BC, strict=True)
        ]
        kept = nsmallest(ENOUGH, self._folds[fold] + more, key=lambda one: one.order)
        self._folds[fold] = kept
        if len(kept) == ENOUGH:
            self._ends[fold] = kept[-1].order

    def fit(self, leave_out: int | None = None) -> Posterior:
        """The evaluation's posterior with the temperature that suits these images best.

        Args:
            leave_out: A fold that has no say.

        Returns:
            The posterior as it is, if no image can tell.
        """
        examples = [one for fold, some in enumerate(self._folds) if fold != leave_out for one in some]
        examples = nsmallest(ENOUGH, examples, key=lambda one: one.order)
        if not examples:
            return self.outline.posterior
        differences_BC, label_B = np.stack([one.differences_C for one in examples]), [one.label for one in examples]
        return self.outline.posterior.fit(differences_BC, np.array(label_B), examples[0].dims)


class CrossFitted:
    """Labelled images, each judged with the temperature that was fitted to the other folds.

    Args:
        sample: The images to fit to.

    Attributes:
        posteriors: That of each fold.
        scores: Of all images so far.
    """

    COLUMNS = Sample.COLUMNS

    def __init__(self, sample: Sample) -> None:
        self.outline = sample.outline
        self.posteriors = [sample.fit(leave_out=fold) for fold in range(FOLDS)]
        self.scores = Scores.zeros()
        self._judged: list[Judged] = []

    def update(self, chunk: Chunk) -> None:
        """Judge more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            columns = columns.labelled
            tried = columns.tried(self.outline.classes, self.outline.num_classes)
            numbers = Columns(columns, ("label", "prediction", "dims"))
            fold_B = np.array([fold_of(image_id) for image_id in columns.strings("id")], dtype=int)
            right_B, (confidence_B, label_B, squares_B) = np.empty(len(columns), bool), np.empty((3, len(columns)))
            judged = Judged(confidence_B, right_B, label_B, squares_B)
            for fold in np.unique(fold_B):
                mine = fold_B == fold
                found = judge(numbers.take(mine), self.outline, self.posteriors[fold], tried.take(mine))
                for values_B, some in zip(judged, found, strict=True):
                    values_B[mine] = some
            self.scores.add(judged)
            self._judged.append(judged)

    @property
    def judged(self) -> Judged:
        """All labelled images so far, in the order given."""
        return Judged(*(np.concatenate(parts) for parts in zip(*self._judged, strict=True)))


def calibrate(sample: Sample, chunks: Iterable[Chunk]) -> Calibration | None:
    """Fit the temperature to labelled images, and judge it by five-fold cross-fitting; None if there are below 50.

    Args:
        sample: What was shown all decisions.
        chunks: All decisions, once more.
    """
    if sample.labelled < ENOUGH_TO_SAY:
        return None
    crossfitted = CrossFitted(sample)
    for chunk in chunks:
        crossfitted.update(chunk)
    scores = {f"calibrated_{name}": value for name, value in crossfitted.scores.numbers().items()}
    return Calibration(sample.fit().temperature, **scores)
