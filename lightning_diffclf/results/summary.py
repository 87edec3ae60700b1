"""What decisions on many images amount to: the same numbers for live metrics, metrics.json, report and comparison.

Decisions are counted as they come, in chunks of any size, and forgotten: what is kept are sums, which add up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_diffclf.classifier import Conformal, Posterior
from lightning_diffclf.results.columns import Chunk, Columns, Tried
from lightning_diffclf.results.statistics import Interval, Judged, Scores, wilson

if TYPE_CHECKING:
    from lightning_diffclf.classifier.discriminative import Classifier

MOST_RANKS = 2**14  # processes of a run

NO_ANSWER = "no answer"


@dataclass(frozen=True)
class Outline:
    """What must be known of an evaluation to sum its decisions up.

    Args:
        classes: Class index of each candidate of the denoiser.
        class_names: Name of each class.
        timesteps_S: Timestep of each draw, in the order spent.
        posterior: Turns differences into probabilities.
        abstains: Whether a margin was asked for: numbers say how many images have an answer.
        proposes: Whether candidates were proposed for each image: numbers say how often the right class is among them.
        coverage: Share of images whose conformal set shall contain the right class; None for no sets.
        coverage_by_class: Whether that shall hold for the images of each class.
        conformal: Thresholds of the sets, where another run calibrated them.
        one_call: Whether one call of a network without noise decided each image: no draw to show, no call saved.
    """

    classes: tuple[int, ...]
    class_names: tuple[str, ...]
    timesteps_S: tuple[float, ...]
    posterior: Posterior = field(default_factory=Posterior)
    abstains: bool = False
    proposes: bool = False
    coverage: float | None = None
    coverage_by_class: bool = False
    conformal: Conformal | None = None
    one_call: bool = False

    @classmethod
    def of_classifier(cls, classifier: Classifier, conformal: Conformal | None = None) -> Outline:
        """Of an evaluation by ``classifier``; ``conformal`` if its sets were calibrated on another run."""
        candidates, recipe = classifier.candidates, classifier.recipe
        return cls(
            classes=tuple(candidates.classes),
            class_names=tuple(candidates.class_names),
            timesteps_S=tuple(classifier.timesteps_S.tolist()),
            posterior=recipe.posterior,
            abstains=recipe.abstain > 0,
            proposes=recipe.proposal is not None,
            coverage=recipe.coverage,
            coverage_by_class=recipe.coverage_by_class,
            conformal=conformal,
            one_call=classifier.terms.logits,
        )

    @classmethod
    def of(cls, info: dict[str, Any]) -> Outline:
        """From the info in a run's settings; see :meth:`to_info`."""
        summary = info.get("summary", {})
        for name, kind in (("candidate_classes", int), ("class_names", str), ("timesteps_S", (int, float))):
            if not isinstance(info[name], list) or not all(isinstance(value, kind) for value in info[name]):
                raise TypeError(f"{name}: {repr(info[name])[:100]}")
        if not all(0 <= c < len(info["class_names"]) for c in info["candidate_classes"]):
            raise ValueError(f"candidate_classes: beyond the {len(info['class_names'])} class_names")
        return cls(
            classes=tuple(info["candidate_classes"]),
            class_names=tuple(info["class_names"]),
            timesteps_S=tuple(info["timesteps_S"]),
            posterior=Posterior(summary.get("reduction", "sum"), summary.get("temperature", 1.0)),
            abstains=summary.get("abstains", False),
            proposes=summary.get("proposes", False),
            coverage=summary.get("coverage"),
            coverage_by_class=summary.get("coverage_by_class", False),
            conformal=_conformal(summary),
            one_call=summary.get("one_call", False),
        )

    def to_info(self) -> dict[str, Any]:
        """As plain values, for the info in a run's settings."""
        return {
            "candidate_classes": list(self.classes),
            "class_names": list(self.class_names),
            "timesteps_S": list(self.timesteps_S),
            "summary": {
                "reduction": self.posterior.reduction,
                "temperature": self.posterior.temperature,
                "abstains": self.abstains,
                "proposes": self.proposes,
                "coverage": self.coverage,
                "coverage_by_class": self.coverage_by_class,
                "thresholds": None if self.conformal is None else list(self.conformal.thresholds),
                "calibration_images": None if self.conformal is None else self.conformal.images,
                "one_call": self.one_call,
            },
        }

    @property
    def num_classes(self) -> int:
        """Number of classes C."""
        return len(self.class_names)

    def name(self, c: int) -> str:
        """Name of class ``c``; of C, which stands for no answer."""
        return self.class_names[c] if c < self.num_classes else NO_ANSWER


def _conformal(summary: dict[str, Any]) -> Conformal | None:
    if summary.get("thresholds") is None:
        return None
    return Conformal(summary["coverage"], tuple(map(float, summary["thresholds"])), summary["calibration_images"])


class Summary:
    """The sums, and the numbers read off them. Images without a label count as images only.

    An image whose candidates all gave NaN or infinity has no answer. That counts as wrong, and is a column of its own
    in the confusion matrix.

    Args:
        outline: The evaluation.
        sums: Sums to go on with, changed in place; of no image if omitted.

    Attributes:
        sums: By name, each of which adds up over parts: ``images`` and ``nfe`` (), ``reused`` (errors), ``answered``,
            ``answered_right``, ``top5``, ``proposed`` and ``kept`` (candidates), ``search_nfe`` and ``dropped_draws``
            of the ``split`` images that say so, all int64 (); ``chance`` (), float64; ``seconds_R`` by rank, float64;
            ``confusion_CA`` (C, C + 1), int64, rows are true classes; ``nfe_C`` by true class, int64; ``right_S`` of
            ``judged_S`` images were right by draw s alone, int64; and those of
            :class:`~lightning_diffclf.results.statistics.Scores`.
    """

    COLUMNS = (
        *("label", "prediction", "top5", "abstained", "candidates_K", "differences_K", "draws_K", "nfe", "dims"),
        *("choice_S", "seconds", "rank", "search_nfe", "dropped_draws", "reused"),
    )

    def __init__(self, outline: Outline, sums: dict[str, np.ndarray] | None = None) -> None:
        self.outline = outline
        self.sums = zeros(outline) if sums is None else sums

    @classmethod
    def of(cls, outline: Outline, chunks: Iterable[Chunk]) -> Summary:
        """The summary of all ``chunks``."""
        summary = cls(outline)
        for chunk in chunks:
            summary.update(chunk)
        return summary

    def update(self, chunk: Chunk) -> None:
        """Count some more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            reused = columns.numbers("reused").clip(min=0).sum()  # unknown in files of earlier versions
            self._add(images=len(columns), nfe=columns.numbers("nfe").sum(), reused=reused)
            self._add_search(columns)
            np.add.at(self.sums["seconds_R"], columns.numbers("rank"), columns.numbers("seconds"))
            labelled = columns.labelled
            if len(labelled):
                tried = labelled.tried(self.outline.classes, self.outline.num_classes)
                self._add_decisions(labelled, tried)
                self._add_draws(labelled)
                self.scores.add(judge(labelled, self.outline, self.outline.posterior, tried))

    def _add(self, **sums: Any) -> None:
        for name, value in sums.items():
            np.add(self.sums[name], value, out=self.sums[name])

    def _add_search(self, columns: Columns) -> None:
        search_nfe, dropped = columns.numbers("search_nfe"), columns.numbers("dropped_draws")
        self._add(
            kept=columns.lists("candidates_K").length.sum(),
            split=(search_nfe >= 0).sum(),  # unknown in files of earlier versions
            search_nfe=search_nfe.clip(min=0).sum(),
            dropped_draws=dropped.clip(min=0).sum(),
        )

    def _add_decisions(self, columns: Columns, tried: Tried) -> None:
        label_B, answer_B, answered_B = decided(columns, self.outline)
        top5 = columns.lists("top5")
        self._add(
            answered=answered_B.sum(),
            answered_right=((answer_B == label_B) & answered_B).sum(),
            top5=(top5.values == label_B[top5.row]).sum(),
            proposed=tried.has(label_B).sum(),
            chance=(1 / (tried.classes_BW >= 0).sum(1)).sum(),
        )
        np.add.at(self.sums["confusion_CA"], (label_B, answer_B), 1)
        np.add.at(self.sums["nfe_C"], label_B, columns.numbers("nfe"))

    def _add_draws(self, columns: Columns) -> None:
        """Of each image, the draws that all candidates saw: only these are fair to each of them."""
        label_B, choice = columns.numbers("label"), columns.lists("choice_S")
        seen = choice.position < columns.lists("draws_K").minimum[choice.row]
        right = seen & (choice.values == label_B[choice.row])
        total = len(self.sums["judged_S"])
        self._add(
            judged_S=np.bincount(choice.position[seen], minlength=total),
            right_S=np.bincount(choice.position[right], minlength=total),
        )

    # --- what the sums say -----------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Images, with a label or without."""
        return int(self.sums["images"])

    @property
    def labelled(self) -> int:
        """Images with a label."""
        return int(self.sums["confusion_CA"].sum())

    @property
    def right(self) -> int:
        """Images with a label that were decided rightly."""
        return int(self.sums["confusion_CA"].trace())

    @property
    def unanswered(self) -> int:
        """Images with a label that have no answer."""
        return int(self.sums["confusion_CA"][:, -1].sum())

    @property
    def accuracy(self) -> Interval | None:
        """Share of the labelled images decided rightly, with Wilson's 95 % interval; None if there are none."""
        return wilson(self.right, self.labelled) if self.labelled else None

    @property
    def per_class(self) -> np.ndarray:
        """Accuracy of each class (C,); NaN for classes that do not occur."""
        confusion_CA = self.sums["confusion_CA"]
        with np.errstate(invalid="ignore"):
            return np.asarray(confusion_CA.diagonal() / confusion_CA.sum(1))

    @cached_property
    def scores(self) -> Scores:
        """Those of the posterior of the evaluation."""
        return Scores(self.sums["bins_M3"], self.sums["nll"], self.sums["brier"])

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the candidates of each image."""
        return float(self.sums["chance"]) / self.labelled

    @property
    def exhaustive_nfe(self) -> int:
        """Network calls of all images if all candidates saw all draws, those included that a proposal leaves out."""
        images, kept = int(self.sums["images"]), int(self.sums["kept"])
        if self.outline.one_call:
            return images
        return len(self.outline.timesteps_S) * (images * len(self.outline.classes) if self.outline.proposes else kept)

    def numbers(self) -> dict[str, float]:
        """The headline numbers by name; those that need labels only with labels. docs/results.md has the formulas."""
        images, seconds = self.images, float(self.sums["seconds_R"].max())  # ranks run side by side
        numbers: dict[str, float] = {}
        if self.accuracy is not None:
            low, high = self.accuracy.low, self.accuracy.high
            numbers |= {"accuracy": self.accuracy.value, "accuracy_low": low, "accuracy_high": high}
            numbers["mean_per_class"] = float(np.nanmean(self.per_class))
            numbers |= self.scores.numbers()
        nfe, reused = int(self.sums["nfe"]), int(self.sums["reused"])
        numbers |= {"images": images, "nfe_per_image": nfe / images, "speedup": self.exhaustive_nfe / (nfe + reused)}
        if reused:
            numbers["reused_per_image"] = reused / images
        numbers |= {"images_per_second": images / seconds if seconds else float("nan"), "seconds": seconds}
        if self.outline.proposes:
            numbers |= self._search_numbers()
        if self.accuracy is not None:
            if self.outline.num_classes > 5:
                numbers["top5"] = int(self.sums["top5"]) / self.labelled
            if self.outline.proposes:
                numbers["proposal_recall"] = int(self.sums["proposed"]) / self.labelled
            if self.outline.abstains:
                answered = int(self.sums["answered"])
                numbers["coverage"] = answered / self.labelled
                right = int(self.sums["answered_right"])
                numbers["answered_accuracy"] = right / answered if answered else float("nan")
        return numbers

    def _search_numbers(self) -> dict[str, float]:
        numbers = {"kept_per_image": int(self.sums["kept"]) / self.images}
        if self.sums["split"] == self.images:
            search, whole = int(self.sums["search_nfe"]), int(self.sums["nfe"])
            numbers["search_nfe_per_image"] = search / self.images
            numbers["contest_nfe_per_image"] = (whole - search) / self.images
            numbers["dropped_draws"] = int(self.sums["dropped_draws"])
        return numbers


def zeros(outline: Outline) -> dict[str, np.ndarray]:
    """The sums of a :class:`Summary` over no image."""
    classes, draws = outline.num_classes, len(outline.timesteps_S)
    counts = (
        *("images", "nfe", "reused", "answered", "answered_right", "top5", "proposed"),
        *("kept", "split", "search_nfe", "dropped_draws"),
    )
    return (
        {name: np.zeros((), dtype=np.int64) for name in counts}
        | {"chance": np.zeros(()), "seconds_R": np.zeros(MOST_RANKS)}
        | {"confusion_CA": np.zeros((classes, classes + 1), dtype=np.int64), "nfe_C": np.zeros(classes, dtype=np.int64)}
        | {"right_S": np.zeros(draws, dtype=np.int64), "judged_S": np.zeros(draws, dtype=np.int64)}
        | Scores.zeros()._asdict()
    )


def decided(columns: Columns, outline: Outline) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Class, answer and whether it counts as given, of labelled images (B,); C stands for no answer."""
    prediction_B = columns.numbers("prediction")
    answer_B = np.where(prediction_B < 0, outline.num_classes, prediction_B)
    return columns.numbers("label"), answer_B, ~columns.numbers("abstained") & (prediction_B >= 0)


def judge(columns: Columns, outline: Outline, posterior: Posterior, tried: Tried | None = None) -> Judged:
    """What the class probabilities of labelled images amount to, where ``posterior`` makes them of differences.

    Args:
        columns: The images.
        outline: The evaluation.
        posterior: Turns differences into probabilities.
        tried: The classes of their candidates, if known already.
    """
    label_B = columns.numbers("label")
    tried = columns.tried(outline.classes, outline.num_classes) if tried is None else tried
    # Classes without a candidate have probability zero, unless nothing is known of any: then all are equally likely.
    p_BW = posterior(tried.differences_BW, columns.dims)
    known_B, equal = np.isfinite(tried.differences_BW).any(1), 1 / outline.num_classes
    confidence_B, label_p_B = p_BW.max(1, initial=0), (p_BW * tried.has(label_B)).sum(1)
    return Judged(
        confidence=np.where(known_B, confidence_B, equal),
        right=columns.numbers("prediction") == label_B,
        label=np.where(known_B, label_p_B, equal),
        squares=np.where(known_B, np.square(p_BW).sum(1), equal),
    )
