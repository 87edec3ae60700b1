"""What classifiers have in common that are trained here by cross-entropy, on labelled images of any data module."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import lightning as L
from torch import Tensor
from torch.nn import functional as F

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.batch import unpack
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import ByArguments
from lightning_diffclf.modules.conditions import Conditions, check_labels, check_trains_all, conditions
from lightning_diffclf.modules.training import optimization


class TrainedClassifier(ByArguments, L.LightningModule):
    """A :class:`~lightning_diffclf.discriminative.Discriminative` module that cross-entropy trains.

    A subclass keeps its arguments by ``save_hyperparameters``, among them ``num_classes``, ``class_names`` and those of
    :func:`~lightning_diffclf.modules.training.optimization`, and says the logits of its classes.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = dict.fromkeys(
        ("lr", "betas", "weight_decay", "warmup_steps", "decay"), "of the optimizer"
    )

    @abstractmethod
    def trained_logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to the logits of all classes that were trained (B, num_classes)."""

    def setup(self, stage: str) -> None:
        """Check the data module against the network, before long work."""
        data: object = getattr(self._trainer, "datamodule", None)
        num_classes = self.hparams["num_classes"]
        if stage == "fit":
            check_trains_all(data, num_classes)
        check_labels(data, num_classes, self.hparams["class_names"])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The names of the classes go with the weights, also where it was the data that said them."""
        checkpoint["hyper_parameters"]["class_names"] = list(self.candidates.class_names)

    def _conditions(self) -> Conditions:
        data: object = getattr(self._trainer, "datamodule", None)
        return conditions(self.hparams["num_classes"], self.hparams["class_names"], data)

    @property
    def candidates(self) -> Candidates:
        """One for each class; where the data have fewer than the network, those that make them up."""
        return self._conditions().candidates

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to logits of the candidates (B, K).

        Raises:
            ValueError: if the network cannot take them.
        """
        return rows_of(self.trained_logits(images), self._conditions())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, accuracy = self._loss(batch)
        self.log_dict({"train/loss": loss.detach(), "train/accuracy": accuracy}, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, _ = self._loss(batch)
        self.log("val/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(unpack(batch).images))

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = unpack(batch)[:2]
        if labels is None:
            raise UserError("batch: no labels, expected a label for each image to train on")
        logits = self.trained_logits(images)
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def configure_optimizers(self) -> Any:
        trained = [one for one in self.parameters() if one.requires_grad]
        return optimization(trained, self.hparams, lambda: self.trainer.estimated_stepping_batches)


def check_names(class_names: Sequence[str] | None, num_classes: int) -> None:
    """Raise ValueError unless there is a name for each class, or no names."""
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"class_names: {len(class_names)} names for num_classes = {num_classes}")


def rows_of(logits: Tensor, asked: Conditions) -> Tensor:
    """Of the logits of all classes, those of the candidates (B, K)."""
    return logits if asked.rows is None else logits[:, asked.rows.to(logits.device)]
