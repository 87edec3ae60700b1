"""Fit a tiny DiT on N processes with sharded weights and save it; see tests/ranks.py."""

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_diffclf import EMA, ClassConditionalDiT
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.modules import objectives
from lightning_diffclf.modules.objectives import of_another_class
from tests.ranks import answer

OBJECTIVES = {
    # Of the batch's first quarter, which the processes have half of each, errors of several classes are compared.
    "compared": {"classification": 1.0, "separation": 1.0, "margin": 0.5, "compared_classes": 3, "class_sets": 0.5},
    "contrasted": {"contrastive": 0.3, "schedule": "rectified_flow", "learn_sigma": False},
}


def of_the_same_half(labels, uniform):
    """The other images that two processes would choose: each has every second image, and looks among these."""
    index, found = torch.empty_like(labels), torch.empty_like(labels, dtype=torch.bool)
    for half in range(2):
        own, found[half::2] = of_another_class(labels[half::2], uniform[half::2])
        index[half::2] = 2 * own + half
    return index, found


class Recording(ClassConditionalDiT):
    seen: list  # loss of each batch
    validated: list  # that of each validation
    share: float  # of the weights, on this process

    def on_train_start(self):
        local = sum(getattr(p, "_local_tensor", p).numel() for p in self.parameters())
        self.share = local / sum(p.numel() for p in self.parameters())

    def on_validation_end(self):
        if not self.trainer.sanity_checking:
            self.validated.append(self.trainer.callback_metrics["val/loss"].item())

    def configure_optimizers(self):
        # Of gradients that are zero but for rounding, Adam makes steps of full size: such runs could not be compared.
        found = super().configure_optimizers()
        found["optimizer"].param_groups[0]["eps"] = 1e-2
        return found

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append(loss.item())
        return loss


def work(devices: int, steps: int, folder: str, objective: str, checkpoint: str | None = None) -> dict:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = Recording(**sizes, **OBJECTIVES[objective], latents=False, lr=1e-2)
    if devices == 1:
        objectives.of_another_class = of_the_same_half
    model.seen, model.validated = [], []
    sharding = ModelParallelStrategy(devices, 1, save_distributed_checkpoint=False, process_group_backend="gloo")
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=sharding if devices > 1 else "auto",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[EMA(0.9)],
    )
    trainer.fit(model, DigitsDataModule(batch_size=96), ckpt_path=checkpoint)
    trainer.save_checkpoint(f"{folder}/{devices}-{steps}.ckpt")
    return {"losses": model.seen, "validated": model.validated, "share": model.share}


if __name__ == "__main__":
    answer(work)
