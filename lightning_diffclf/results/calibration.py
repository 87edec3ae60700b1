"""Probabilities that match how often decisions are right, judged on images that they were not fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.results.predictions import Record
from lightning_diffclf.results.statistics import brier, ece, nll

FOLDS = 5
ENOUGH = 2000  # images to fit one number to
ENOUGH_TO_SAY = 50  # images for a statement about calibration
CHUNK = 1000  # images whose probabilities are in memory together


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


def padded(rows: Sequence[Record], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Differences (B, K), infinite where an image had fewer candidates, and the class of each candidate, else -1."""
    width = max(len(row.candidates_K) for row in rows)
    differences_BK = torch.full((len(rows), width), torch.inf, dtype=torch.float64)
    class_BK = torch.full((len(rows), width), -1)
    of = torch.as_tensor(classes)
    for i, row in enumerate(rows):
        differences_BK[i, : len(row.differences_K)] = torch.from_numpy(row.differences_K.astype(np.float64))
        class_BK[i, : len(row.candidates_K)] = of[torch.from_numpy(row.candidates_K.astype(np.int64))]
    return differences_BK, class_BK


def fit(rows: Sequence[Record], classes: Sequence[int], posterior: Posterior) -> Posterior:
    """``posterior`` with the temperature that suits these labelled images; itself if none of them can tell."""
    # Images whose class was not among the candidates, or which were not decided, say nothing about temperatures.
    some = sorted(rows, key=lambda row: hashlib.blake2b(row.id.encode()).digest())
    of = np.asarray(classes)
    able = (row for row in some if row.prediction is not None and row.label in of[row.candidates_K])
    usable = list(islice(able, ENOUGH))
    if not usable:
        return posterior
    differences_BK, class_BK = padded(usable, classes)
    labels_B = torch.tensor([row.label for row in usable])
    target_B = differences_BK.masked_fill(class_BK != labels_B[:, None], torch.inf).argmin(1)
    return posterior.fit(differences_BK, target_B, usable[0].dims)


class Judged(NamedTuple):
    """What the class probabilities of labelled images amount to.

    Attributes:
        confidence: Probability of the likeliest class (B,), float64.
        right: Whether that is the label (B,).
        label: Probability of the label (B,), float64.
        squares: Sum of the squared probabilities of all classes (B,), float64.
    """

    confidence: np.ndarray
    right: np.ndarray
    label: np.ndarray
    squares: np.ndarray

    def scores(self) -> dict[str, float]:
        """ECE (15 bins), NLL and Brier score."""
        return {
            "ece": ece(self.confidence, self.right),
            "nll": nll(self.label),
            "brier": brier(self.label, self.squares),
        }


def judge(rows: Sequence[Record], classes: Sequence[int], posteriors: Sequence[Posterior]) -> Judged:
    """Class probabilities of labelled images, each with a posterior of its own, against their labels."""
    judged = [np.empty(len(rows)) for _ in Judged._fields]
    num_classes = max(classes) + 1
    for posterior in set(posteriors):
        mine = [i for i, own in enumerate(posteriors) if own == posterior]
        for first in range(0, len(mine), CHUNK):
            at = mine[first : first + CHUNK]
            some = [rows[i] for i in at]
            differences_BK, class_BK = padded(some, classes)
            p_BK = posterior(differences_BK, some[0].dims)
            p_BC = p_BK.new_zeros(len(some), num_classes).scatter_add(1, class_BK.clamp_min(0), p_BK)
            label_B = torch.tensor([row.label for row in some])
            best = p_BC.max(1)
            found = (
                best.values,
                best.indices == label_B,
                p_BC.gather(1, label_B[:, None])[:, 0],
                p_BC.square().sum(1),
            )
            for values_B, chunk_B in zip(judged, found, strict=True):
                values_B[at] = chunk_B.numpy()
    return Judged(*judged)


def crossfitted(rows: Sequence[Record], classes: Sequence[int], posterior: Posterior) -> list[Posterior]:
    """A posterior for each image, with the temperature that was fitted to the images of the other folds."""
    fold_B = [fold_of(row.id) for row in rows]
    fitted = [
        fit([row for row, own in zip(rows, fold_B, strict=True) if own != fold], classes, posterior)
        for fold in range(FOLDS)
    ]
    return [fitted[fold] for fold in fold_B]


def calibrate(rows: Sequence[Record], classes: Sequence[int], posterior: Posterior) -> Calibration | None:
    """Fit the temperature to labelled images, and judge it by five-fold cross-fitting; None if there are below 50."""
    rows = [row for row in rows if row.label is not None]
    if len(rows) < ENOUGH_TO_SAY:
        return None
    scores = judge(rows, classes, crossfitted(rows, classes, posterior)).scores()
    return Calibration(
        temperature=fit(rows, classes, posterior).temperature,
        calibrated_nll=scores["nll"],
        calibrated_brier=scores["brier"],
        calibrated_ece=scores["ece"],
    )
