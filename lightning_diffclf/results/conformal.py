"""Conformal sets of stored decisions: calibrated on another run, or on the other folds of the same one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_diffclf.classifier.conformal import Conformal, nonconformity
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.calibration import FOLDS, fold_of
from lightning_diffclf.results.columns import Chunk, Columns, Tried
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.statistics import wilson
from lightning_diffclf.results.stored import Stored
from lightning_diffclf.results.summary import Outline

COLUMNS = ("id", "label", "candidates_K", "differences_K")
SHARED = ("recipe", "module", "precision")  # of two runs' identities, if one calibrates the other


def scores_of(tried: Tried) -> np.ndarray:
    """Nonconformity of each place (B, W); infinite for one without a class."""
    return nonconformity(tried.differences_BW)


class RightScores:
    """Nonconformity of the right class of labelled images: a few numbers for each.

    Args:
        outline: The evaluation.
    """

    COLUMNS = COLUMNS

    def __init__(self, outline: Outline) -> None:
        self.outline = outline
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [
            (np.empty(0), np.empty(0, int), np.empty(0, int))
        ]

    def update(self, chunk: Chunk) -> None:
        """Take more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            columns = columns.labelled
            label_B = columns.numbers("label")
            tried = columns.tried(self.outline.classes, self.outline.num_classes)
            right_B = np.where(tried.has(label_B), scores_of(tried), np.inf).min(1, initial=np.inf)
            folds_B = np.array([fold_of(image_id) for image_id in columns.strings("id")], dtype=int)
            self._parts.append((right_B, label_B, folds_B))

    def fit(self, leave_out: int | None = None) -> Conformal:
        """Thresholds for the evaluation's coverage.

        Args:
            leave_out: A fold that has no say.

        Raises:
            ValueError: as :meth:`~lightning_diffclf.classifier.conformal.Conformal.fit`.
        """
        assert self.outline.coverage is not None
        scores_B, label_B, folds_B = (np.concatenate(parts) for parts in zip(*self._parts, strict=True))
        kept_B = folds_B != (-1 if leave_out is None else leave_out)
        names = self.outline.class_names if self.outline.coverage_by_class else None
        return Conformal.fit(scores_B[kept_B], label_B[kept_B], self.outline.coverage, names)


class Sets:
    """What sets come to: how often they contain the right class, and how large they are.

    Args:
        outline: The evaluation.
        conformals: Thresholds of each fold; the same ones for all where another run calibrated them.
    """

    COLUMNS = COLUMNS

    def __init__(self, outline: Outline, conformals: Iterable[Conformal]) -> None:
        self.outline, self.conformals = outline, list(conformals)
        self._covered_C, self._images_C = (np.zeros(outline.num_classes, dtype=np.int64) for _ in range(2))
        self._sizes = np.zeros(outline.num_classes + 1, dtype=np.int64)  # how many sets have 0, 1, … classes

    def update(self, chunk: Chunk) -> None:
        """Count more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            columns = columns.labelled
            label_B = columns.numbers("label")
            tried = columns.tried(self.outline.classes, self.outline.num_classes)
            scores_BW, class_BW = scores_of(tried), tried.classes_BW
            fold_B = np.array([fold_of(image_id) for image_id in columns.strings("id")], dtype=int)
            member_BW = np.zeros(scores_BW.shape, dtype=bool)
            for fold in np.unique(fold_B):
                mine_B = fold_B == fold
                member_BW[mine_B] = self.conformals[fold](scores_BW[mine_B], class_BW[mine_B])
            covered_B = (member_BW & tried.has(label_B)).any(1)
            self._images_C += np.bincount(label_B, minlength=self.outline.num_classes)
            self._covered_C += np.bincount(label_B[covered_B], minlength=self.outline.num_classes)
            self._sizes += np.bincount(member_BW.sum(1), minlength=len(self._sizes))

    def numbers(self) -> dict[str, float]:
        """Coverage with Wilson's 95 % interval, that of the worst class, mean size, and shares of small sets."""
        images = int(self._images_C.sum())
        found = wilson(int(self._covered_C.sum()), images)
        occurs_C = self._images_C > 0
        return {
            "set_coverage": found.value,
            "set_coverage_low": found.low,
            "set_coverage_high": found.high,
            "set_coverage_worst_class": float((self._covered_C[occurs_C] / self._images_C[occurs_C]).min()),
            "set_size": float(self._sizes @ np.arange(len(self._sizes)) / images),
            "sets_of_one": int(self._sizes[1]) / images,
            "empty_sets": int(self._sizes[0]) / images,
        }


def sets_of(outline: Outline, chunks: Iterable[Chunk]) -> dict[str, Any]:
    """Numbers of the sets of labelled images, and the thresholds; none where no coverage was asked for.

    Without another run to calibrate on, each image's thresholds are those of the other four of five folds, and
    ``set_thresholds``, for use on other images, are fitted to all.

    Args:
        outline: The evaluation.
        chunks: The decisions, which are read twice.
    """
    if outline.coverage is None:
        return {}
    if outline.conformal is not None:
        final, conformals = outline.conformal, [outline.conformal] * FOLDS
    else:
        scores = RightScores(outline)
        for chunk in chunks:
            scores.update(chunk)
        try:
            final, conformals = scores.fit(), [scores.fit(leave_out=fold) for fold in range(FOLDS)]
        except UserError as error:  # all else that was decided is worth its time
            warnings.warn(f"no conformal sets, for want of images to calibrate on: {error}", stacklevel=2)
            return {}
    sets = Sets(outline, conformals)
    for chunk in chunks:
        sets.update(chunk)
    return sets.numbers() | {"set_thresholds": list(final.thresholds), "set_images": final.images}


def check_same_classifier(one: Settings, identity: Mapping[str, Any], what: str) -> None:
    """Raise ValueError unless the run ``one``, called ``what``, has the network and recipe of ``identity``."""
    mine, other = ({name: of.get(name) for name in SHARED} for of in (one.identity, identity))
    Settings(other).check_same(Settings(mine), what)


@dataclass(frozen=True)
class CalibrationRun:
    """An evaluation of labelled images that sets of others are calibrated on.

    Attributes:
        path: Its folder.
        settings: What it was made with.
        conformal: What it is calibrated to.
        ids: Its images.
    """

    path: Path
    settings: Settings
    conformal: Conformal
    ids: frozenset[str]

    @classmethod
    def read(cls, path: str | Path, coverage: float, by_class: bool = False) -> CalibrationRun:
        """Calibrate on the run in the folder ``path``.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be read, or does not do for the coverage; see
                :meth:`~lightning_diffclf.classifier.conformal.Conformal.fit`.
        """
        path, settings = Path(path), Settings.read(Path(path))
        settings.check_evaluation(f"the calibration run {str(path)!r}")
        outline = replace(Outline.of(settings.info), coverage=coverage, coverage_by_class=by_class, conformal=None)
        scores, stored = RightScores(outline), Stored(path, settings, COLUMNS)
        for chunk in stored:
            scores.update(chunk)
        try:
            conformal = scores.fit()
        except UserError as error:
            raise UserError(f"calibration: {str(path)!r}: {error}") from error
        return cls(path, settings, conformal, frozenset(stored.ids.to_pylist()))

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise ValueError unless an evaluation with ``identity`` decides as this one: scores are exchangeable then."""
        check_same_classifier(self.settings, identity, f"the calibration run {str(self.path)!r}")

    def check_ids(self, ids: Iterable[int | str]) -> None:
        """Raise ValueError if one of ``ids`` is an image that was calibrated on."""
        common = [one for one in ids if str(one) in self.ids]
        if common:
            raise UserError(
                f"calibration: image {common[0]!r} is in {str(self.path)!r} as well, and what was calibrated on it "
                "says nothing about it; expected other images (--part 1/2 and 2/2 of one data set, say)"
            )
