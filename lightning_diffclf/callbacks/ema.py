"""Exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_diffclf.errors import UserError


class EMA(L.Callback):
    """Keeps an exponential moving average of the weights: used for validation, and what is left after training.

    Checkpoints hold the average in ``state_dict`` and the weights being trained in ``current_model_state``, whenever
    they are written: also during validation and after the end of training, when the two have changed places. So
    plain loading gives the average, and resuming goes on from the trained weights.

    Weights that are sharded over processes (ModelParallelStrategy) are averaged where they are: each process keeps the
    average of its own shards, which needs no communication, and checkpoints are those of whole weights.

    Args:
        decay: Share of the old average that is kept at each step, in [0, 1). It is approached as
            ``min(decay, (1 + n) / (10 + n))`` after n steps, so that early averages are already useful. None for no
            average.

    Raises:
        ValueError: if ``decay`` is out of range, or the weights are not float32 (in half precision, the steps of the
            average would be rounded away: use ``bf16-mixed`` rather than ``bf16-true``), or sharded in a way that
            checkpoints of one file cannot hold.
    """

    def __init__(self, decay: float | None = 0.9999) -> None:
        if decay is not None and not 0 <= decay < 1:
            raise UserError(f"ema: decay {decay}, expected a number in [0, 1)")
        self.decay = decay
        self._average: dict[str, Tensor] = {}  # by the names of the module's parameters; shards of sharded ones
        self._count = 0  # optimizer steps in it
        self._step = 0
        self._swapped = False  # whether the module holds the average and the average the trained weights
        self._swaps_back = False  # whether this validation has put the average in place

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or self.decay is None:
            return
        strategy, decay = trainer.strategy, f"ema: decay {self.decay}"
        if isinstance(strategy, FSDPStrategy):
            raise UserError(f"{decay} with FSDPStrategy, expected ModelParallelStrategy to shard weights, or null")
        if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
            raise UserError(
                f"{decay} with save_distributed_checkpoint, expected save_distributed_checkpoint: false, as a "
                "checkpoint of many files has no room for it; or null"
            )
        self._average, self._count, self._swapped = {}, 0, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with the weights as they are, unless a checkpoint brought an average already.

        Not earlier: only now weights are sharded, on their device, and of the Trainer's precision.
        """
        if self.decay is None:
            return
        for name, parameter in pl_module.named_parameters():
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                raise UserError(
                    f"ema: {name} is {parameter.dtype}, expected float32 weights; "
                    "train with precision bf16-mixed, not bf16-true"
                )
        weights = weights_of(pl_module)
        self._average = {
            name: self._average[name].to(weight.device) if name in self._average else weight.clone()
            for name, weight in weights.items()
        }

    # --- the average -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._step = self._step, trainer.global_step
        if self.decay is None or self._step == before:
            return
        n = self._count
        share = 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0  # the first step's weights are the first average
        weights = weights_of(pl_module)
        with torch.no_grad():
            torch._foreach_lerp_(local(self._average.values()), local(weights[name] for name in self._average), share)
        self._count += 1

    def _swap(self, pl_module: L.LightningModule) -> None:
        weights = weights_of(pl_module)
        with torch.no_grad():
            pairs = local(self._average.values()), local(weights[name] for name in self._average)
            for one, other in zip(*pairs, strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)
        self._swapped = not self._swapped

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._swaps_back = bool(self._average) and not self._swapped
        if self._swaps_back:  # after training, the average is in place already
            self._swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Not at the end of its epoch: other callbacks may still use the weights there, whatever their order."""
        if self._swaps_back:
            self._swap(pl_module)
        self._swaps_back = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Change places rather than copy, so that a checkpoint written from here on still has both.
        if self._average:
            self._swap(pl_module)

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of sharded weights, the first process gets whole ones, one after the other; all have to take part."""
        if not self._average:
            return
        placed = checkpoint["state_dict"]  # empty on other processes, where weights are sharded
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        kept = {name: whole(value, keep=name in placed) for name, value in self._average.items()}
        shared = pl_module.named_parameters(remove_duplicate=False)  # tied weights have several names
        kept = {name: kept[names[id(parameter)]] for name, parameter in shared if names[id(parameter)] in kept}
        other = {name: kept.get(name, value) for name, value in placed.items()}
        average, trained = (placed, other) if self._swapped else (other, placed)
        checkpoint["state_dict"], checkpoint["current_model_state"] = average, trained
        checkpoint["averaging_state"] = {"n_averaged": torch.tensor(self._count)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The module has been given the average, or weights without one: take it, and place the trained weights."""
        if self.decay is None or trainer.state.fn != "fit":
            return
        self._average = {name: weight.clone() for name, weight in weights_of(pl_module).items()}
        if "current_model_state" not in checkpoint:
            return
        self._count = int(checkpoint["averaging_state"]["n_averaged"])
        trained = checkpoint["current_model_state"]
        if isinstance(trainer.strategy, ModelParallelStrategy):
            set_model_state_dict(pl_module, trained, options=StateDictOptions(full_state_dict=True))
        else:
            pl_module.load_state_dict(trained)


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters by name, not copied; of sharded ones the shards, which make the weights of the next forward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward without backward leaves whole weights behind
    return {name: weight.detach() for name, weight in module.named_parameters() if weight.is_floating_point()}


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def whole(tensor: Tensor, keep: bool) -> Tensor:
    """The whole of a tensor, of a sharded one on the CPU; empty where it is not to be kept."""
    if not isinstance(tensor, DTensor):
        return tensor
    full = tensor.full_tensor()
    return full.cpu() if keep else full.new_empty(0)
