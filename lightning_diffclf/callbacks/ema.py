"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_diffclf.errors import UserError


class EMA(WeightAveraging):
    """Keeps an exponential moving average of the weights: used for validation, and what is left after training.

    Checkpoints hold the average in ``state_dict`` and the weights being trained in ``current_model_state``, whenever
    they are written: also during validation and after the end of training, when the two have changed places. So
    plain loading gives the average, and resuming goes on from the trained weights.

    Args:
        decay: Share of the old average that is kept at each step, in [0, 1). It is approached as
            ``min(decay, (1 + n) / (10 + n))`` after n steps, so that early averages are already useful. None for no
            average, as weights that are sharded over processes (FSDP) need.

    Raises:
        ValueError: if ``decay`` is out of range, or the weights are not float32 (in half precision, the steps of the
            average would be rounded away: use ``bf16-mixed`` rather than ``bf16-true``), or sharded.
    """

    def __init__(self, decay: float | None = 0.9999) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise UserError(f"ema: decay {decay}, expected a number in [0, 1)")
        self.decay = decay
        self._swapped = False  # whether the module holds the average and the average the trained weights
        self._swaps_back = False  # whether this validation has put the average in place
        super().__init__(use_buffers=False, multi_avg_fn=self._average)

    def _average(self, averages: Any, currents: Any, num_averaged: Tensor | int) -> None:
        assert self.decay is not None
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))(averages, currents, num_averaged)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.decay is None:
            return
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise UserError(
                f"ema: decay {self.decay} with {type(trainer.strategy).__name__}, expected null, as sharded weights "
                "cannot be averaged; or use ddp"
            )
        self._swapped = False
        # The module is still on the CPU here; without its future device, the average would stay there. The base class
        # would also call configure_model, which is for sharding.
        self._average_model = AveragedModel(
            pl_module, device=trainer.strategy.root_device, use_buffers=False, multi_avg_fn=self._average
        )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.decay is None:
            return
        # Not in setup: the Trainer converts weights to its precision after it.
        for name, parameter in pl_module.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise UserError(
                    f"ema: {name} is {parameter.dtype}, expected float32 weights; "
                    "train with precision bf16-mixed, not bf16-true"
                )

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return self.decay is not None and step_idx is not None

    def _swap_models(self, pl_module: L.LightningModule) -> None:
        super()._swap_models(pl_module)
        self._swapped = not self._swapped

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swaps_back = self._average_model is not None and not self._swapped
        if self._swaps_back:  # after training, the average is in place already
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing yet: other callbacks may still use the weights in this hook, whatever the order of callbacks."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._swaps_back:
            self._swap_models(pl_module)
        self._swaps_back = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Change places rather than copy, so that a checkpoint written from here on still has both.
        if self._average_model is not None:
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is None:
            return
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            checkpoint["state_dict"], checkpoint["current_model_state"] = (
                checkpoint["current_model_state"],
                checkpoint["state_dict"],
            )

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
