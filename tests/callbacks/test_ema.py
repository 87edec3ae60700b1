from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_diffclf import EMA
from tests.gaussians import Gaussians, loader


class Walker(Gaussians):
    """Its one weight takes a step of exactly 1 at each training step."""

    def training_step(self, batch, batch_idx):
        return -self.unused.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(
    folder: Path, *callbacks: L.Callback, max_steps: int = 6, ckpt_path: str | None = None, module=None, **kwargs
) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        max_steps=max_steps,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **kwargs,
    )
    trainer.fit(module or Walker(), loader(40), loader(4), ckpt_path=ckpt_path)
    return trainer


def expected_average(steps: int, decay: float) -> float:
    average = 1.0  # the first update copies
    for n in range(1, steps):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * (n + 1)
    return average


def weights(path: Path) -> tuple[float, float]:
    checkpoint = torch.load(path, weights_only=True)
    return checkpoint["state_dict"]["unused"].item(), checkpoint["current_model_state"]["unused"].item()


def test_average_follows_its_formula(tmp_path):
    trainer = fit(tmp_path, EMA(0.5), enable_checkpointing=False)
    assert trainer.model.unused.item() == pytest.approx(expected_average(6, 0.5))


class SaveEverywhere(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")

    def on_validation_batch_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "validation.ckpt")

    def on_train_end(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "end.ckpt")


def test_checkpoints_hold_average_and_weights_whenever_they_are_written(tmp_path):
    """Also in the middle of validation and after training, when the two have changed places."""
    fit(tmp_path, EMA(0.5), SaveEverywhere(tmp_path), val_check_interval=6)
    for name in ("step6", "validation", "end"):
        assert weights(tmp_path / f"{name}.ckpt") == pytest.approx((expected_average(6, 0.5), 6.0)), name


@pytest.mark.parametrize("stop", ["step3", "validation", "end"])
def test_resuming_goes_on_from_the_trained_weights(tmp_path, stop):
    fit(tmp_path, EMA(0.5), SaveEverywhere(tmp_path), max_steps=3, val_check_interval=3)
    last = ModelCheckpoint(dirpath=tmp_path, filename="resumed", every_n_train_steps=6)
    fit(tmp_path, EMA(0.5), last, ckpt_path=str(tmp_path / f"{stop}.ckpt"))
    assert weights(tmp_path / "resumed.ckpt") == pytest.approx((expected_average(6, 0.5), 6.0))


def test_plain_loading_gives_the_average(tmp_path):
    fit(tmp_path, EMA(0.5), SaveEverywhere(tmp_path))
    loaded = Walker.load_from_checkpoint(tmp_path / "end.ckpt")
    assert loaded.unused.item() == pytest.approx(expected_average(6, 0.5))


def test_validation_after_training_sees_the_average(tmp_path):
    class Looking(L.Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_validation_batch_start(self, trainer, module, *_):
            self.seen.append(module.unused.item())

    trainer = fit(tmp_path, EMA(0.5), Looking(), enable_checkpointing=False)
    during = len(Looking.seen)
    trainer.validate(trainer.lightning_module, loader(4), verbose=False)
    assert Looking.seen[during:] == [pytest.approx(expected_average(6, 0.5))]
    assert trainer.lightning_module.unused.item() == Looking.seen[-1]


def test_bad_settings(tmp_path):
    for decay in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"decay {decay}"):
            EMA(decay)
    with pytest.raises(ValueError, match=r"unused is torch.bfloat16, expected float32 weights; .* bf16-mixed"):
        fit(tmp_path, EMA(0.5), precision="bf16-true", enable_checkpointing=False)


def test_no_average(tmp_path):
    trainer = fit(tmp_path, EMA(None), SaveEverywhere(tmp_path), enable_checkpointing=False)
    assert trainer.model.unused.item() == 6
    saved = torch.load(tmp_path / "step3.ckpt", weights_only=True)
    assert saved["state_dict"]["unused"].item() == 3
    assert "current_model_state" not in saved
    resumed = fit(tmp_path, EMA(None), enable_checkpointing=False, ckpt_path=str(tmp_path / "step3.ckpt"))
    assert resumed.model.unused.item() == 6
    with pytest.raises(ValueError, match=r"decay 1.5, expected a number"):
        EMA(1.5)


@pytest.mark.parametrize(
    ("strategy", "complaint"),
    [
        (ModelParallelStrategy(1, 1), "with save_distributed_checkpoint, expected save_distributed_checkpoint: false"),
        (FSDPStrategy(), "with FSDPStrategy, expected ModelParallelStrategy"),
    ],
)
def test_what_cannot_be_averaged_is_refused(strategy, complaint):
    trainer = L.Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(ValueError, match=rf"ema: decay 0.9999 {complaint}"):
        EMA().setup(trainer, Gaussians(), "fit")
    EMA(None).setup(trainer, Gaussians(), "fit")


class Tied(Walker):
    """Its weight has a second name, and beside it there is a count that is no weight."""

    def __init__(self):
        super().__init__()
        self.again = self.unused
        self.count = torch.nn.Parameter(torch.tensor(3), requires_grad=False)


def test_tied_weights_are_averaged_under_all_their_names(tmp_path):
    fit(tmp_path, EMA(0.5), SaveEverywhere(tmp_path), module=Tied())
    for name in ("step6", "end"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        for alias in ("unused", "again"):
            assert checkpoint["state_dict"][alias].item() == pytest.approx(expected_average(6, 0.5))
            assert checkpoint["current_model_state"][alias].item() == 6
        assert checkpoint["state_dict"]["count"].item() == 3


def test_validating_after_training_uses_the_average(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_validation_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.unused.item())

    trainer = fit(tmp_path, EMA(0.5), Look(), enable_checkpointing=False, limit_val_batches=1, val_check_interval=6)
    trainer.validate(trainer.lightning_module, loader(4), verbose=False)
    assert seen == pytest.approx([expected_average(6, 0.5)] * 2)
    assert trainer.model.unused.item() == pytest.approx(expected_average(6, 0.5))


def test_weights_without_an_average_begin_one(tmp_path):
    fit(tmp_path, EMA(None), SaveEverywhere(tmp_path), max_steps=3)
    resumed = fit(tmp_path, EMA(0.5), ckpt_path=str(tmp_path / "step3.ckpt"), max_steps=5, enable_checkpointing=False)
    assert resumed.model.unused.item() == pytest.approx(4 + (1 - 2 / 11) * 1)
