"""Fit a tiny DiT on N processes and print what each rank drew and the losses: fit_dit.py DEVICES [ACCUMULATE]."""

import json
import sys

import lightning as L
import torch

from lightning_diffclf import EMA, ClassConditionalDiT
from lightning_diffclf.data.digits import DigitsDataModule


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


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"input_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "depth": 1, "num_heads": 2}
    model = Recording(**sizes, latents=False, class_sets=0.5, classification=0.5, compared_share=1.0)
    model.drawn, model.seen = [], []
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(sys.argv[1]),
        strategy="ddp",
        max_steps=6,
        accumulate_grad_batches=int((sys.argv[2:] or ["1"])[0]),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[EMA(0.9)],
    )
    trainer.fit(model, DigitsDataModule(batch_size=96))
    weight = model.net.final_layer.linear.weight.double().abs().sum().item()
    line = (
        f"RANK {trainer.global_rank} "
        + json.dumps({"drawn": model.drawn, "losses": model.seen, "weight": weight})
        + "\n"
    )
    sys.stdout.write(line)  # at once: ranks share the pipe, and print may write the end of the line apart
    sys.stdout.flush()
