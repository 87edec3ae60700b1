"""Sets of classes that contain the right one with a chosen probability: split conformal prediction.

Vovk et al. 2005; Lei et al. 2018; by class: Vovk 2012; a tutorial: Angelopoulos & Bates 2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lightning_diffclf.classifier.arrays import Values, as_array, like
from lightning_diffclf.errors import UserError


def check_coverage(coverage: float) -> None:
    """Raise ValueError unless ``coverage`` is a share of images, above 0 and below 1."""
    if not 0 < coverage < 1:
        raise UserError(f"coverage: {coverage}, expected a share of images above 0 and below 1, such as 0.9")


def rank_of(coverage: float, images: int) -> int:
    """Which of the ascending scores of ``images`` is the threshold, from 1 on: ⌈(n + 1) · coverage⌉, exactly."""
    return math.ceil((images + 1) * Fraction(str(coverage)))


def least_images(coverage: float) -> int:
    """The fewest images that a coverage can be calibrated on: ⌈coverage / (1 - coverage)⌉.

    Example:
        >>> least_images(0.9), least_images(0.99)
        (9, 99)
    """
    return math.ceil(Fraction(str(coverage)) / (1 - Fraction(str(coverage))))


def check_images(images: int, coverage: float, classes: int = 1) -> None:
    """Raise ValueError if so few images cannot calibrate a coverage, whatever their labels.

    Args:
        images: How many there are.
        coverage: Share of images whose set shall contain the right class.
        classes: Classes that have a threshold each; 1 if all share one.
    """
    least = least_images(coverage) * classes
    if images < least:
        each = f", {least_images(coverage)} of each class" if classes > 1 else ""
        raise UserError(
            f"coverage: {images} images to calibrate on, expected at least {least} for a coverage of {coverage}{each}"
        )


def nonconformity(differences_BC: Values) -> Values:
    """How far each class is behind the best of the others, in the unit of the error; negative for the best one.

    It is a function of one image, its id and the class, and of nothing else: the same for an image that calibrates and
    one that is asked about. Therefore scores are exchangeable where images are, which is all that the guarantee needs,
    also where a rule drops candidates early: that the difference of a dropped candidate is the one that was known when
    it fell (censored), or a margin that is just as large as the rule demands, makes sets larger or smaller, and never
    less valid.

    Args:
        differences_BC: How much larger the mean error of each class is than the winner's, as
            :func:`~.posterior.class_differences` has them; NaN and infinite where there is none.

    Returns:
        (B, C) float64; infinite for a class without a finite difference, minus infinity for one without a rival.

    Example:
        >>> nonconformity(np.array([[0.0, 0.25, np.inf]])).tolist()
        [[-0.25, 0.25, inf]]
    """
    behind_BC = np.nan_to_num(as_array(differences_BC), nan=np.inf, posinf=np.inf, neginf=-np.inf)
    padded_BC = np.pad(behind_BC, ((0, 0), (0, 2)), constant_values=np.inf)  # there may be fewer than two
    first_B1, second_B1 = np.split(np.partition(padded_BC, 1, axis=1)[:, :2], 2, axis=1)
    own_BC = np.arange(behind_BC.shape[1]) == padded_BC.argmin(1)[:, None]
    finite_BC = np.isfinite(behind_BC)
    behind_BC[finite_BC] -= np.where(own_BC, second_B1, first_B1)[finite_BC]
    return like(differences_BC, behind_BC)


def order_of_elimination(differences_BC: Values, draws_BC: Values, total: int) -> Values:
    """Another nonconformity: classes that stayed for fewer draws conform less, and among equals those further behind.

    Args:
        differences_BC: As of :func:`nonconformity`.
        draws_BC: Draws that the longest-lived candidate of each class saw (B, C).
        total: Draws that an image may spend.

    Returns:
        (B, C) float64: minus the lead over the best other class for the best one; for another, the draws that it
        missed and, in 0 … 1, its difference. Infinite for a class without a finite difference.
    """
    scores_BC = nonconformity(as_array(differences_BC))
    behind_BC = np.isfinite(scores_BC) & (scores_BC > 0)
    some_B = scores_BC[behind_BC]
    scores_BC[behind_BC] = total - as_array(draws_BC)[behind_BC] + some_B / (1 + some_B)
    return like(differences_BC, scores_BC)


@dataclass(frozen=True)
class Conformal:
    """Thresholds of nonconformity: a set has the classes that conform.

    Of images that are exchangeable with those calibrated on, a share of at least ``coverage`` have the right class in
    their set, and at most 1 / (n + 1) more if scores have no ties. That is an average over images and calibrations; by
    class, it holds for the images of each. A set may be empty: the image is less clear than so many of those calibrated
    on, whatever its best class.

    Args:
        coverage: Share of images whose set shall contain the right class, above 0 and below 1.
        thresholds: The largest score of a class in a set; one for all, or one for each class.
        images: Images calibrated on.

    Raises:
        ValueError: if the coverage is out of range.
    """

    coverage: float
    thresholds: tuple[float, ...]
    images: int

    def __post_init__(self) -> None:
        check_coverage(self.coverage)

    @classmethod
    def fit(
        cls, scores_B: np.ndarray, label_B: np.ndarray, coverage: float, class_names: Sequence[str] | None = None
    ) -> Conformal:
        """Calibrate on labelled images that were used for nothing else.

        Args:
            scores_B: Nonconformity of the right class of each image (B,); infinite where it was not tried.
            label_B: The right classes (B,), int64; they only matter with ``class_names``.
            coverage: Share of images whose set shall contain the right class, above 0 and below 1.
            class_names: Name of each class, where each is to have a threshold of its own; one for all if omitted.

        Raises:
            ValueError: if the coverage is out of range, scores and labels are not equally many, there are too few
                images, of a class if each has a threshold, or so many right classes have no finite score that every set
                would have to hold every class.

        Example:
            >>> Conformal.fit(np.arange(19.0), np.zeros(19, int), coverage=0.9).thresholds
            (17.0,)
        """
        check_coverage(coverage)
        if len(scores_B) != len(label_B):
            raise UserError(f"coverage: {len(label_B)} labels for {len(scores_B)} scores, expected one for each")
        if class_names is None:
            return cls(coverage, (_threshold(scores_B, coverage, "the calibration set"),), len(scores_B))
        least, counts_C = least_images(coverage), np.bincount(label_B, minlength=len(class_names))
        few = [f"{class_names[c]!r} ({counts_C[c]})" for c in np.flatnonzero(counts_C < least).tolist()]
        if few:
            some = f"{', '.join(few[:5])}{', …' if len(few) > 5 else ''}"
            raise UserError(
                f"coverage by class: {len(few)} of {len(class_names)} classes have too few calibration images: {some}; "
                f"expected at least {least} of each for a coverage of {coverage}"
            )
        values = (_threshold(scores_B[label_B == c], coverage, f"class {n!r}") for c, n in enumerate(class_names))
        return cls(coverage, tuple(values), len(scores_B))

    def __call__(self, scores_BC: Values, class_BC: Values | None = None) -> Values:
        """Which classes are in the set of each image (B, C), bool.

        Args:
            scores_BC: Nonconformity of each class.
            class_BC: Class that each score is of, int64 from 0 on; their positions 0 … C-1 if omitted.
        """
        thresholds_C = np.array(self.thresholds)
        if len(self.thresholds) > 1 and class_BC is not None:
            thresholds_C = thresholds_C[as_array(class_BC, np.int64)]
        return like(scores_BC, np.asarray(as_array(scores_BC) <= thresholds_C))


def _threshold(scores_B: np.ndarray, coverage: float, what: str) -> float:
    rank, images = rank_of(coverage, len(scores_B)), len(scores_B)
    if rank > images:
        raise UserError(
            f"coverage: {what} has {images} labelled images, expected at least {least_images(coverage)} for {coverage}"
        )
    found = float(np.partition(scores_B, rank - 1)[rank - 1])
    if not found < np.inf:
        lost = int((~(scores_B < np.inf)).sum())  # NaN as well
        raise UserError(
            f"coverage: in {what}, {lost} of {images} images have no score for their right class, because a proposal "
            f"left it out or the network failed; expected at most {images - rank} for a coverage of {coverage}"
        )
    return found
