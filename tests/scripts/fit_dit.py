"""Fit a tiny DiT on N processes: what each rank drew, and the losses; see tests/ranks.py."""

import lightning as L
import torch

from lightning_diffclf import EMA, ClassConditionalDiT
from lightning_diffclf.data.digits import DigitsDataModule
from tests.ranks import answer


class Recording(ClassConditionalDiT):
    drawn: list
    seen: list  # mean loss of each batch

    def losses(self, x0, labels, t, noise, drop):
        if self.training:
            self.drawn.append([t[:4].tolist(), noise[0, 0, 0, :3].tolist()])
        losses = super().losses(x0, labels, t, noise, drop)
        if self.training:
            self.seen.append(losses["loss"].mean().item())
        return losses


def work(devices: int, accumulate: int) -> dict:
    torch.manual_seed(0)
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "depth": 1, "num_heads": 2}
    model = Recording(**sizes, latents=False, class_sets=0.5, classification=0.5, compared_share=1.0)
    model.drawn, model.seen = [], []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp",
        max_steps=6,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[EMA(0.9)],
    )
    trainer.fit(model, DigitsDataModule(batch_size=96))
    weight = model.net.final_layer.linear.weight.double().abs().sum().item()
    return {"drawn": model.drawn, "losses": model.seen, "weight": weight}


if __name__ == "__main__":
    answer(work)
