"""What is counted during an evaluation: torchmetrics objects, synced over ranks once, when computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from lightning_diffclf.classifier import Classification, Posterior
from lightning_diffclf.classifier.posterior import sum_by_class


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
    nll: Tensor
    seconds: Tensor
    correct_S: Tensor
    judged_S: Tensor

    def __init__(self, num_draws: int) -> None:
        super().__init__()
        for name in ("images", "nfe", "answered", "answered_right", "proposed"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("nll", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
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
        self.top5 = MulticlassAccuracy(num_classes, top_k=5, average="micro") if num_classes > 5 else None

    def update(self, results: Sequence[Classification], labels: Sequence[int], seconds: float) -> None:
        """Count labelled images.

        Args:
            results: The decisions.
            labels: The right classes.
            seconds: Time that the decisions took.
        """
        if not results:
            return
        device = self.tally.images.device
        target_B = torch.tensor(labels)
        probabilities_BC = torch.cat([self._probabilities(r) for r in results])
        order_BC = torch.stack([self._order(r) for r in results])
        chosen_B = probabilities_BC.gather(1, target_B[:, None])[:, 0].clamp_min(torch.finfo(torch.float64).tiny)
        correct_S, judged_S = self._by_draw(results, target_B)
        right = [r.label == label and not r.abstained for r, label in zip(results, labels, strict=True)]
        self.tally.update(
            images=len(results),
            nfe=sum(r.nfe for r in results),
            answered=sum(not r.abstained for r in results),
            answered_right=sum(right),
            proposed=sum(
                label in {self.classes[k] for k in r.candidates_K.tolist()}
                for r, label in zip(results, labels, strict=True)
            )
            if self.proposes
            else 0,
            nll=float(-chosen_B.log().sum()),
            seconds=seconds,
            correct_S=correct_S,
            judged_S=judged_S,
        )
        target_B = target_B.to(device)
        # Without a finite error there is no answer: it counts as the class after the right one, which is wrong.
        chosen = [
            r.label if r.label is not None else (label + 1) % self.num_classes
            for r, label in zip(results, labels, strict=True)
        ]
        self.confusion.update(torch.tensor(chosen, device=device), target_B)
        self.calibration.update(probabilities_BC.float().to(device), target_B)
        if self.top5 is not None:
            self.top5.update(order_BC.to(device), target_B)

    def _classes_of(self, result: Classification) -> Tensor:
        return torch.tensor(self.classes)[result.candidates_K]

    def _probabilities(self, result: Classification) -> Tensor:
        probabilities_1K = self.posterior(result.scores_K[None], result.dims)
        return sum_by_class(probabilities_1K, self._classes_of(result).tolist(), self.num_classes)

    def _order(self, result: Classification) -> Tensor:
        """A number for each class (C,), higher for those that the elimination kept longer, then by score."""
        order_C = torch.full((self.num_classes,), -1e9)
        ranks = -torch.arange(len(result.ranking), dtype=torch.float32)
        classes = self._classes_of(result)[torch.tensor(result.ranking)]
        return order_C.scatter_reduce(0, classes, ranks, "amax")

    def _by_draw(self, results: Sequence[Classification], target_B: Tensor) -> tuple[Tensor, Tensor]:
        """How many images each draw alone gets right, and of how many: only draws that all candidates saw."""
        correct_S, judged_S = torch.zeros_like(self.tally.correct_S.cpu()), torch.zeros_like(self.tally.judged_S.cpu())
        for result, target in zip(results, target_B, strict=True):
            if result.errors_KS is not None:
                complete_S = result.errors_KS.isfinite().all(0)
                choice_S = self._classes_of(result)[result.errors_KS.nan_to_num(nan=torch.inf).argmin(0)]
                correct_S += (choice_S == target) & complete_S
                judged_S += complete_S
        return correct_S, judged_S

    def compute(self) -> dict[str, float]:
        """The headline numbers over all ranks; call it on all ranks. Counts and means are exact."""
        tally = {name: value.cpu() for name, value in self.tally.compute().items()}
        confusion_CC = self.confusion.compute().cpu()
        support_C = confusion_CC.sum(1)
        images = int(tally["images"])
        seen = support_C > 0
        values = {
            "accuracy": int(confusion_CC.diagonal().sum()) / images,
            "mean_per_class": float((confusion_CC.diagonal()[seen] / support_C[seen]).double().mean()),
            "nll": float(tally["nll"]) / images,
            "ece": float(self.calibration.compute()),
            "images": images,
            "nfe_per_image": int(tally["nfe"]) / images,
            "images_per_second": images / float(tally["seconds"]),
            "seconds": float(tally["seconds"]),
        }
        if self.top5 is not None:
            values["top5"] = float(self.top5.compute())
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
