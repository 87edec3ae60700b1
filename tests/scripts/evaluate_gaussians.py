"""Test on N processes, under three rules; see tests/ranks.py."""

import lightning as L

from lightning_diffclf import DiffusionClassifierCallback, LikelihoodRatio, PairedTest
from lightning_diffclf.results import charts
from tests.gaussians import Gaussians, loader
from tests.ranks import answer


def work(devices: int, images: int, out: str, fit: bool = False) -> None:
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
    if fit:
        trainer.fit(module, loader(4 * devices, 2), loader(images, 2))  # two steps, then validation
        assert callback.metrics["images"] == min(5, images), callback.metrics
    trainer.test(module, loader(images, batch_size=2), verbose=False)


if __name__ == "__main__":
    charts.drawing.pictures = lambda charts: {}  # which takes longer than all the rest
    answer(work)
