"""What is counted during an evaluation: torchmetrics objects, synced over ranks once, when computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.classifier.posterior import sum_by_class
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.predictions import Record
from lightning_diffclf.results.statistics import wilson


class Tally(Metric):
    """Exact sums over images: int64 counts, because float32 stops counting at 16 million.

    Args:
        num_draws: Number of draws S that an image may spend.
    """

    full_state_update = False
    images: Tensor
    nfe: Tensor
    answered: Tensor
    answered_right: Tensor
    proposed: Tensor
    top5: Tensor
    nll: Tensor
    brier: Tensor
    seconds: Tensor
    correct_S: Tensor
    judged_S: Tensor

    def __init__(self, num_draws: int) -> None:
        super().__init__()
        for name in ("images", "nfe", "answered", "answered_right", "proposed", "top5"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("nll", "brier"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("seconds", torch.zeros((), dtype=torch.float64), dist_reduce_fx="max")  # ranks run side by side
        for name in ("correct_S", "judged_S"):
            self.add_state(name, torch.zeros(num_draws, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, **sums: Any) -> None:
        """Add sums over some images, by their names; ``correct_S`` of ``judged_S`` were right by draw s alone."""
        for name, value in sums.items():
            state = getattr(self, name)
            state += value.to(state.device) if isinstance(value, Tensor) else value

    def compute(self) -> dict[str, Tensor]:
        """The sums over all ranks (of the seconds, the maximum)."""
        return {name: getattr(self, name) for name in self._defaults}


class ClassifierMetrics(nn.Module):
    """The metrics of a diffusion classifier over labelled images.

    Args:
        classes: Class index of each candidate of the denoiser.
        num_classes: Number of classes.
        num_draws: Number of draws S that an image may spend.
        posterior: Turns scores into probabilities.
        abstains: Whether images may be left without an answer: reports the share that is not.
        proposes: Whether images have different candidates: reports how often the right class is among them.
    """

    def __init__(
        self,
        classes: Sequence[int],
        num_classes: int,
        num_draws: int,
        posterior: Posterior,
        abstains: bool = False,
        proposes: bool = False,
    ) -> None:
        super().__init__()
        self.abstains, self.proposes = abstains, proposes
        self.classes, self.num_classes, self.posterior = tuple(classes), num_classes, posterior
        self.tally = Tally(num_draws)
        self.confusion = MulticlassConfusionMatrix(num_classes)
        self.calibration = MulticlassCalibrationError(num_classes, n_bins=15, norm="l1")

    def update(self, rows: Sequence[Record]) -> None:
        """Count labelled images."""
        if not rows:
            return
        device = self.tally.images.device
        labels = [row.label for row in rows if row.label is not None]
        target_B = torch.tensor(labels)
        probabilities_BC = torch.cat([self._probabilities(row) for row in rows])
        chosen_B = probabilities_BC.gather(1, target_B[:, None])[:, 0]
        self.tally.update(
            images=len(rows),
            nfe=sum(row.nfe for row in rows),
            answered=sum(not row.abstained for row in rows),
            answered_right=sum(row.prediction == row.label and not row.abstained for row in rows),
            proposed=sum(label in self._classes_of(row) for row, label in zip(rows, labels, strict=True)),
            top5=sum(label in row.top5 for row, label in zip(rows, labels, strict=True)),
            nll=float(-chosen_B.clamp_min(torch.finfo(torch.float64).tiny).log().sum()),
            brier=float((probabilities_BC.square().sum(1) - 2 * chosen_B + 1).sum()),
            seconds=sum(row.seconds for row in rows),
        )
        for row in rows:  # each draw alone, as long as all candidates see it
            self.tally.correct_S[: row.complete] += torch.from_numpy(row.choice_S[: row.complete] == row.label).to(
                device
            )
            self.tally.judged_S[: row.complete] += 1
        # Without a finite error there is no answer: it counts as the class after the right one, which is wrong.
        decided = [
            row.prediction if row.prediction is not None else (label + 1) % self.num_classes
            for row, label in zip(rows, labels, strict=True)
        ]
        self.confusion.update(torch.tensor(decided, device=device), target_B.to(device))
        self.calibration.update(probabilities_BC.float().to(device), target_B.to(device))

    def _classes_of(self, row: Record) -> list[int]:
        return [self.classes[k] for k in row.candidates_K.tolist()]

    def _probabilities(self, row: Record) -> Tensor:
        probabilities_1K = self.posterior(torch.tensor(row.differences_K)[None], row.dims)
        return sum_by_class(probabilities_1K, self._classes_of(row), self.num_classes)

    def compute(self) -> dict[str, float]:
        """The headline numbers over all ranks; call it on all ranks. Counts and means are exact."""
        tally = {name: value.cpu() for name, value in self.tally.compute().items()}
        confusion_CC = self.confusion.compute().cpu()
        support_C = confusion_CC.sum(1)
        images, right = int(tally["images"]), int(confusion_CC.diagonal().sum())
        if images == 0:
            raise UserError("evaluation: no image, expected at least one")
        accuracy = wilson(right, images)
        seen = support_C > 0
        values = {
            "accuracy": accuracy.value,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "mean_per_class": float((confusion_CC.diagonal()[seen] / support_C[seen]).double().mean()),
            "nll": float(tally["nll"]) / images,
            "brier": float(tally["brier"]) / images,
            "ece": float(self.calibration.compute()),
            "images": images,
            "nfe_per_image": int(tally["nfe"]) / images,
            "images_per_second": images / float(tally["seconds"]),
            "seconds": float(tally["seconds"]),
        }
        if self.num_classes > 5:
            values["top5"] = int(tally["top5"]) / images
        if self.proposes:
            values["proposal_recall"] = int(tally["proposed"]) / images
        if self.abstains:
            answered = int(tally["answered"])
            values["coverage"] = answered / images
            values["answered_accuracy"] = int(tally["answered_right"]) / answered if answered else float("nan")
        return values

    def reset(self) -> None:
        """Begin anew."""
        for metric in self.children():
            if isinstance(metric, Metric):
                metric.reset()
