"""Test on N processes, under three rules: evaluate_gaussians.py DEVICES IMAGES OUT [fit]."""

import sys

import lightning as L

from lightning_diffclf import DiffusionClassifierCallback, LikelihoodRatio, PairedTest
from tests.gaussians import Gaussians, loader

if __name__ == "__main__":
    devices, images, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    callback = DiffusionClassifierCallback(draws=12, microbatch=16, output_dir=out, fit_images=5)
    rules = [
        DiffusionClassifierCallback(
            draws=12, microbatch=16, elimination=rule, output_dir=f"{out}/{name}", fit_images=0, name=name
        )
        for name, rule in (("paired", PairedTest(0.2)), ("ratio", LikelihoodRatio(0.2)))
    ]
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        max_steps=2,
        callbacks=[*rules, callback],
    )
    module = Gaussians()
    if "fit" in sys.argv:
        trainer.fit(module, loader(4 * devices, 2), loader(images, 2))  # two steps, then validation
        assert callback.metrics["images"] == min(5, images), callback.metrics
    trainer.test(module, loader(images, batch_size=2), verbose=False)
