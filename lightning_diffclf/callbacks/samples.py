"""A picture of what the network generates, written and logged while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_diffclf.callbacks.pictures import log_picture
from lightning_diffclf.errors import UserError, WrongType
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
from lightning_diffclf.results.figures import save_image_grid


class SampleGrid(L.Callback):
    """Writes ``samples.png`` into the Trainer's ``default_root_dir``: a row for each class.

    In validations of ``fit`` and at its end, with the averaged weights where an EMA callback puts them in place, listed
    before or after it. TensorBoard, W&B and MLflow loggers are given the picture as well.

    Args:
        columns: Images of each class; 0 for no picture.
        every_n_validations: Make it in every n-th validation; 0 for only at the end.
        classes: Number of classes shown at most, the first ones.
        guidance_scale: Classifier-free guidance; 1 is none.
        steps: Denoising steps.
        seed: Key of the initial noise.

    Raises:
        ValueError: if ``columns`` or ``classes`` is out of range; from ``setup``, if weights are sharded.
        TypeError: from ``setup``, if the module is no ClassConditionalDiT, or one on latents without ``vae``.
    """

    def __init__(
        self,
        columns: int = 10,
        classes: int = 10,
        guidance_scale: float = 1.5,
        steps: int = 50,
        seed: int = 0,
        every_n_validations: int = 1,
    ) -> None:
        if columns < 0 or classes < 1:
            raise UserError(f"samples: columns {columns}, classes {classes}, expected at least 0 and 1")
        if every_n_validations < 0:
            raise UserError(f"samples: every_n_validations {every_n_validations}, expected at least 0")
        self.every_n_validations, self._validations = every_n_validations, 0
        self.columns, self.classes, self.guidance_scale = columns, classes, guidance_scale
        self.steps, self.seed = steps, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.columns or stage != "fit":
            return
        if not isinstance(pl_module, ClassConditionalDiT):
            raise WrongType(f"samples: {type(pl_module).__name__}, expected a ClassConditionalDiT")
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("samples: weights are sharded, but one process draws alone; expected columns: 0")
        if pl_module.hparams["latents"] and pl_module.hparams["vae"] is None:
            raise WrongType("samples: pictures of latents need an autoencoder, expected model.vae, or columns: 0")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # Not at the start of the epoch: the averaged weights may come in after this callback's turn.
        if batch_idx or trainer.state.fn != "fit" or trainer.sanity_checking or not self.every_n_validations:
            return
        self._validations += 1
        if self._validations % self.every_n_validations == 0:
            self._draw(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    @rank_zero_only
    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.columns or not isinstance(pl_module, ClassConditionalDiT):
            return
        names = pl_module.candidates.names[: self.classes]
        labels = torch.arange(len(names), device=pl_module.device).repeat_interleave(self.columns)
        guidance_scale = self.guidance_scale if pl_module.hparams["class_dropout_prob"] > 0 else 1.0
        images = pl_module.sample(labels, guidance_scale, self.steps, self.seed)
        if pl_module.hparams["latents"]:
            images = torch.cat([pl_module.autoencoder.decode(some) for some in images.split(8)])
        path = Path(trainer.default_root_dir) / "samples.png"
        save_image_grid(images, names, path)
        log_picture(trainer, "samples", path)
