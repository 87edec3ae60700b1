"""A picture of what the network generates, written when training ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
from lightning_diffclf.results.figures import save_image_grid


class SampleGrid(L.Callback):
    """Writes ``samples.png`` into the Trainer's ``default_root_dir`` at the end of ``fit``: a row for each class.

    List it after the EMA callback or not: the averaged weights are in place by then.

    Args:
        columns: Images of each class; 0 for no picture.
        classes: Number of classes shown at most, the first ones.
        guidance_scale: Classifier-free guidance; 1 is none.
        steps: Denoising steps.
        seed: Key of the initial noise.

    Raises:
        ValueError: if ``columns`` or ``classes`` is out of range.
        TypeError: from ``setup``, if the module is no ClassConditionalDiT on pixels (latents would need a decoder).
    """

    def __init__(
        self, columns: int = 10, classes: int = 10, guidance_scale: float = 1.5, steps: int = 50, seed: int = 0
    ) -> None:
        if columns < 0 or classes < 1:
            raise ValueError(f"samples: columns {columns}, classes {classes}, expected at least 0 and 1")
        self.columns, self.classes, self.guidance_scale = columns, classes, guidance_scale
        self.steps, self.seed = steps, seed

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        on_pixels = isinstance(pl_module, ClassConditionalDiT) and not pl_module.hparams["latents"]
        if self.columns and stage == "fit" and not on_pixels:
            raise TypeError(f"samples: {type(pl_module).__name__}, expected a ClassConditionalDiT with latents: false")

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.columns or not isinstance(pl_module, ClassConditionalDiT):
            return
        names = pl_module.candidates.names[: self.classes]
        labels = torch.arange(len(names), device=pl_module.device).repeat_interleave(self.columns)
        guidance_scale = self.guidance_scale if pl_module.hparams["class_dropout_prob"] > 0 else 1.0
        images = pl_module.sample(labels, guidance_scale, self.steps, self.seed)
        save_image_grid(images, names, Path(trainer.default_root_dir) / "samples.png")
