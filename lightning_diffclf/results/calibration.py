"""Probabilities that match how often decisions are right, judged on images that they were not fitted to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.classifier.posterior import sum_by_class
from lightning_diffclf.results.predictions import Row
from lightning_diffclf.results.statistics import brier, ece, nll

FOLDS = 5
ENOUGH = 2000  # images to fit one number to


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


def padded(rows: Sequence[Row], classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Differences (B, K), infinite where an image had fewer candidates, and the class of each candidate, else -1."""
    width = max(len(row.candidates_K) for row in rows)
    differences_BK = torch.full((len(rows), width), torch.inf, dtype=torch.float64)
    class_BK = torch.full((len(rows), width), -1)
    of = torch.as_tensor(classes)
    for i, row in enumerate(rows):
        differences_BK[i, : len(row.differences_K)] = torch.from_numpy(row.differences_K.astype(np.float64))
        class_BK[i, : len(row.candidates_K)] = of[torch.from_numpy(row.candidates_K.astype(np.int64))]
    return differences_BK, class_BK


def fit(rows: Sequence[Row], classes: Sequence[int], posterior: Posterior) -> Posterior:
    """``posterior`` with the temperature that suits these labelled images; itself if none of them can tell."""
    # Images whose class was not among the candidates, or which were not decided, say nothing about temperatures.
    usable = [r for r in rows if r.prediction is not None and r.label in {classes[k] for k in r.candidates_K.tolist()}]
    if not usable:
        return posterior
    usable = sorted(usable, key=lambda row: hashlib.blake2b(row.id.encode()).digest())[:ENOUGH]
    differences_BK, class_BK = padded(usable, classes)
    labels_B = torch.tensor([row.label for row in usable])
    target_B = differences_BK.masked_fill(class_BK != labels_B[:, None], torch.inf).argmin(1)
    return posterior.fit(differences_BK, target_B, usable[0].dims)


def probabilities(rows: Sequence[Row], classes: Sequence[int], posterior: Posterior) -> np.ndarray:
    """Probability of each class (B, C), float64."""
    num_classes = max(classes) + 1
    return torch.cat(
        [
            sum_by_class(
                posterior(torch.from_numpy(row.differences_K)[None], row.dims),
                [classes[k] for k in row.candidates_K.tolist()],
                num_classes,
            )
            for row in rows
        ]
    ).numpy()


def crossfitted(rows: Sequence[Row], classes: Sequence[int], posterior: Posterior) -> list[Posterior]:
    """A posterior for each image, with the temperature that was fitted to the images of the other folds."""
    fold_B = [fold_of(row.id) for row in rows]
    fitted = [
        fit([row for row, own in zip(rows, fold_B, strict=True) if own != fold], classes, posterior)
        for fold in range(FOLDS)
    ]
    return [fitted[fold] for fold in fold_B]


def calibrate(rows: Sequence[Row], classes: Sequence[int], posterior: Posterior) -> Calibration | None:
    """Fit the temperature to labelled images, and judge it by five-fold cross-fitting; None if there are below 50."""
    rows = [row for row in rows if row.label is not None]
    if len(rows) < 50:
        return None
    posteriors = crossfitted(rows, classes, posterior)
    p_BC = np.concatenate([probabilities([row], classes, own) for row, own in zip(rows, posteriors, strict=True)])
    label_B = np.array([row.label for row in rows])
    right_B = p_BC.argmax(1) == label_B
    return Calibration(
        temperature=fit(rows, classes, replace(posterior, temperature=1.0)).temperature,
        calibrated_nll=nll(p_BC, label_B),
        calibrated_brier=brier(p_BC, label_B),
        calibrated_ece=ece(p_BC.max(1), right_B),
    )
