"""One evaluation on one rank: which images of its batches are classified, and what becomes of the decisions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import lightning as L
import torch

from lightning_diffclf.callbacks.plan import Planner
from lightning_diffclf.callbacks.progress import ClassifierProgressBar
from lightning_diffclf.callbacks.run_writer import Picture, RunWriter
from lightning_diffclf.callbacks.sharding import in_part, is_last_batch
from lightning_diffclf.classifier import Classification
from lightning_diffclf.classifier.discriminative import Classifier
from lightning_diffclf.data.batch import DistinctIds, content_ids, unpack
from lightning_diffclf.data.corruptions import Corruption
from lightning_diffclf.data.protocols import HasGroups
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.conformal import CalibrationRun
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.predictions import Record
from lightning_diffclf.results.reuse import Reused


class _Waiting(NamedTuple):
    """An image that is not decided yet."""

    id: int | str
    label: int | None
    picture: Picture | None  # where results are written
    group: int | str | None


class RankEvaluation:
    """Classifies the images of batches as they come. Make one on all ranks.

    Args:
        trainer: The Trainer that evaluates.
        classifier: What classifies.
        metrics: Where decisions are counted, unless images have no labels (``predict``).
        images: Images of this rank, the first ones of its batches; None for all.
        part: Of these, only those of the i-th of n parts, as (i, n).
        planner: Measures in place of classifying.
        writer: Writes decisions; what was decided before is counted and left out.
        calibrated: What sets are calibrated on; its images are refused.
        corruption: Makes images worse before they are classified.
        reused: Errors of an earlier run.

    Attributes:
        labelled: Whether labels of images count: not in ``predict``.
        results: Decisions without errors, in the order of the images, if there is no ``writer``.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        classifier: Classifier,
        metrics: ClassifierMetrics,
        images: int | None,
        part: tuple[int, int] | None,
        planner: Planner | None,
        writer: RunWriter | None,
        calibrated: CalibrationRun | None = None,
        corruption: Corruption | None = None,
        reused: Reused | None = None,
    ) -> None:
        self._trainer, self._classifier, self._metrics = trainer, classifier, metrics
        self._calibrated = calibrated
        self._remaining, self._part, self._planner, self._writer = images, part, planner, writer
        self._corruption, self._reused = corruption, reused
        self.labelled = trainer.state.fn != "predict"
        self.results: list[Classification] = []
        self._distinct = None if writer is None else DistinctIds()  # elsewhere, nothing is found by its id
        self._run, self._waiting = classifier.run(), deque[_Waiting]()
        self._decided = self._correct = self._nfe = 0  # so far, for the progress bar
        self._worked = 0.0  # seconds on images that are not decided yet
        metrics.reset()
        if writer is not None:
            if self.labelled:
                for decided in writer.decided_before():
                    metrics.update(decided)
            trainer.strategy.barrier("store")  # nobody writes before all have read
            if writer.finished and trainer.is_global_zero:
                print(f"resuming {writer.folder}: {len(writer.finished)} images are finished")
        if self._bar is not None:
            self._bar.start_images(images)

    @property
    def _bar(self) -> ClassifierProgressBar | None:
        bar = self._trainer.progress_bar_callback
        return bar if isinstance(bar, ClassifierProgressBar) else None

    def add(self, batch: Any) -> None:
        """Classify the images of a batch; those that fill no micro-batch wait for the next.

        Raises:
            UserError: if there are no labels but in ``predict``, or one belongs to no candidate.
        """
        images, labels, ids, lists, keys, groups = unpack(batch)
        count = len(images) if self._remaining is None else min(len(images), self._remaining)
        ids = self._ids(None if ids is None else ids[:count], images[:count])
        if self._corruption is not None and count:
            images = self._corruption(images[:count], ids)
        # What `predict` is given may be of other classes than the candidates: its labels, if any, are not looked at.
        known: list[Any] = labels[:count].tolist() if labels is not None and self.labelled else [None] * count
        if self.labelled:
            self._check_labels(known, ids)
        forward = self._trainer.precision_plugin.forward_context  # hooks run outside autocast
        if self._planner is not None:
            if count:
                with forward():
                    self._planner.measure(images[:count], ids, len(images))
            return
        if self._remaining is not None:
            self._remaining -= count
        due = [i for i in range(count) if self._is_due(ids[i])]
        if self._calibrated is not None:
            self._calibrated.check_ids(ids[i] for i in due)
        if self._bar is not None:
            self._bar.skip_images(count - len(due))
        if due:
            keys = ids if keys is None else list(keys)
            candidates: Any = self._classifier.recipe.candidates if lists is None else [lists[i] for i in due]
            for i in due:
                picture = None if self._writer is None else self._writer.picture(images[i], known[i])
                group = self._group_of(ids[i]) if groups is None else groups[i]
                self._waiting.append(_Waiting(ids[i], known[i], picture, group))
            start = time.perf_counter()
            with forward():  # a proposal may call the network
                reused = {} if self._reused is None else {"known": self._reused([ids[i] for i in due])}
                self._run.add(images[due], [keys[i] for i in due], candidates, **reused)
            self._worked += time.perf_counter() - start
            self._decide(self._run.work())
        # What does not fill a micro-batch waits for the next batch, but not for the end of the epoch: hooks of other
        # callbacks may change the weights there.
        if self._remaining == 0 or is_last_batch(self._trainer):
            self._decide(self._run.finish())

    def _ids(self, ids: Sequence[int | str] | None, images: torch.Tensor) -> list[int | str]:
        if self._distinct is not None:
            return self._distinct(ids, images)
        return list(content_ids(images) if ids is None else ids)

    def finish(self) -> None:
        """Decide what waits, and write it."""
        if self._planner is None:
            self._decide(self._run.finish())  # nothing, unless the last batch was not known to be it
        if self._writer is not None:
            self._writer.flush()
            self._trainer.strategy.barrier("decisions")
        if self._bar is not None:
            self._bar.stop_images()

    def _group_of(self, image_id: int | str) -> int | str | None:
        """What the data module says of an image, if it says so."""
        data = getattr(self._trainer, "datamodule", None)
        return data.group_of(image_id) if isinstance(data, HasGroups) else None

    def _is_due(self, image_id: int | str) -> bool:
        """Whether an image belongs to this run's part of the data and was not decided before."""
        finished = self._writer is not None and str(image_id) in self._writer.finished
        return not finished and (self._part is None or in_part(image_id, *self._part))

    def _decide(self, decisions: Iterator[Classification]) -> None:
        c, rank = self._classifier, self._trainer.global_rank
        records: list[Record] = []
        start = time.perf_counter() - self._worked
        with self._trainer.precision_plugin.forward_context():
            for keyed in decisions:
                seconds, (image_id, label, picture, group) = time.perf_counter() - start, self._waiting.popleft()
                result = replace(keyed, image_id=image_id)
                classes = c.candidates.classes
                others = {"seconds": seconds, "rank": rank, "group": None if group is None else str(group)}
                record = Record.of(result, classes, c.terms.weights_S, label, c.recipe.ensemble, **others)
                records.append(record)
                if self._writer is not None and picture is not None:
                    self._writer.add(record, result, keyed.image_id, picture)
                else:
                    self.results.append(_without_errors(result, self.results))
                self._decided, self._nfe = self._decided + 1, self._nfe + result.nfe
                self._correct += label == result.prediction
                if self._bar is not None:
                    self._bar.update_images(self._decided, None if label is None else self._correct, self._nfe)
                start = time.perf_counter()  # what came since the decision was not the classifier's time
        self._worked = time.perf_counter() - start
        if self.labelled:
            self._metrics.update(records)

    def _check_labels(self, labels: list[int | None], ids: list[int | str]) -> None:
        classes, chosen = self._classifier.candidates.classes, self._classifier.recipe.candidates
        allowed = set(classes if chosen is None else [classes[c] for c in chosen])
        for label, image_id in zip(labels, ids, strict=True):
            if label is None:
                raise UserError("batch: no labels, expected a label for each image; use predict for unlabelled images")
            if label not in allowed:
                raise UserError(
                    f"label: {label} of image {image_id!r} belongs to no candidate, expected one of the "
                    f"{len(allowed)} classes in {min(allowed)} … {max(allowed)}"
                )


def _without_errors(result: Classification, before: list[Classification]) -> Classification:
    """``result`` without errors and distances; tensors that are as those of the image before are shared with it."""
    last = before[-1] if before else result
    return replace(
        result,
        candidates_K=_shared(result.candidates_K, last.candidates_K),
        draws_K=_shared(result.draws_K, last.draws_K),
        errors_KS=None,
        distances_SKK=None,
    )


def _shared(value: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    return last if torch.equal(value, last) else value
