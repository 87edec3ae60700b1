"""Fit a tiny DiT whose last process gets a signal in the third step: fit_requeue.py FOLDER DEVICES SIGNAL [full].

With ``full``, no file may grow beyond 10 kB, as on a full disk.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_diffclf import EMA, ClassConditionalDiT
from lightning_diffclf.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_diffclf.callbacks.requeue import Requeue
from lightning_diffclf.data.digits import DigitsDataModule


class Signalling(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.Signals[sys.argv[3]])


if __name__ == "__main__":
    torch.manual_seed(0)
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    if "full" in sys.argv:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=8,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Signalling(), EMA(0.9), ModelCheckpoint(folder, every_n_train_steps=8), Requeue()],
        plugins=[AtomicCheckpointIO()],
    )
    model = ClassConditionalDiT(
        input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=1, num_heads=2, latents=False
    )
    trainer.fit(model, DigitsDataModule(batch_size=96))
