"""Probabilities that match how often decisions are right, judged on images that they were not fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.results.columns import Chunk, Columns
from lightning_diffclf.results.statistics import Judged, Scores
from lightning_diffclf.results.summary import Outline, judge

FOLDS = 5
ENOUGH = 2000  # images to fit one number to
AT_ONCE = 2  # fits: each takes some 50 MB for 1,000 classes
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


def enough(folds: Sequence[int]) -> int:
    """How many examples, in order and of these ``folds``, are needed to have 2,000 whatever fold is left out."""
    seen_NF = np.cumsum(np.asarray(folds, int)[:, None] == np.arange(FOLDS), axis=0)
    return int(np.searchsorted(seen_NF.sum(1) - seen_NF.max(1), ENOUGH)) + 1


class _Example(NamedTuple):
    """A labelled image that temperatures can be fitted to."""

    order: bytes
    fold: int
    label: int
    dims: int
    differences_C: np.ndarray  # of its classes, float32


class Sample:
    """Labelled images to fit temperatures to: of all that it is shown, it keeps those few that a fit takes.

    Args:
        outline: The evaluation.

    Attributes:
        labelled: Labelled images that it was shown.
    """

    COLUMNS = ("id", "label", "prediction", "candidates_K", "differences_K", "dims")

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self.labelled = 0
        self._examples: list[_Example] = []  # in order
        self._end = b"\xff" * 65  # what comes after it in order is not kept

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
            ids = columns.strings("id")
            ordered = ((order_of(ids[row]), row) for row in np.flatnonzero(tells_B).tolist())
            found = sorted((order, fold_of(ids[row]), row) for order, row in ordered if order < self._end)
            found = found[: enough([fold for _, fold, _ in found])]
            if found:
                rows = np.array([row for _, _, row in found])
                differences_BC = tried.take(rows).spread(outline.num_classes)
                self._keep(
                    _Example(order, fold, int(label_B[row]), columns.dims, differences_C.copy())  # without the others
                    for (order, fold, row), differences_C in zip(found, differences_BC, strict=True)
                )

    def _keep(self, more: Iterable[_Example]) -> None:
        """Of what is kept and of ``more``, keep what a fit takes."""
        examples = sorted([*self._examples, *more], key=itemgetter(0))
        self._examples = examples[: enough([one.fold for one in examples])]
        if len(self._examples) < len(examples):
            self._end = self._examples[-1].order

    def fit(self, leave_out: int | None = None) -> Posterior:
        """The evaluation's posterior with the temperature that suits these images best.

        Args:
            leave_out: A fold that has no say.

        Returns:
            The posterior as it is, if no image can tell.
        """
        examples = [one for one in self._examples if one.fold != leave_out][:ENOUGH]
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
        with ThreadPoolExecutor(AT_ONCE) as pool:  # for most of a fit, numpy lets others work
            self.posteriors = list(pool.map(sample.fit, range(FOLDS)))
        self._temperatures = np.array([posterior.temperature for posterior in self.posteriors])
        self.scores = Scores.zeros()
        self._judged: list[Judged] = []

    def update(self, chunk: Chunk) -> None:
        """Judge more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            columns = columns.labelled
            tried = columns.tried(self.outline.classes, self.outline.num_classes)
            temperature_B = self._temperatures[[fold_of(image_id) for image_id in columns.strings("id")]]
            scaled = tried._replace(differences_BW=tried.differences_BW / temperature_B[:, None])
            judged = judge(columns, self.outline, replace(self.outline.posterior, temperature=1.0), scaled)
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
