"""What trackers are shown while a network trains."""

from unittest.mock import MagicMock

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_diffclf import EMA, ClassConditionalDiT, DiffusionClassifierCallback
from lightning_diffclf.callbacks.pictures import log_picture
from lightning_diffclf.callbacks.samples import SampleGrid
from lightning_diffclf.data.digits import DigitsDataModule


@pytest.mark.parametrize("ema_first", [True, False])
def test_samples_and_classifier_pictures_reach_tensorboard(ema_first, tmp_path):
    module = ClassConditionalDiT(
        input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=1, num_heads=2, latents=False, warmup_steps=1
    )
    callbacks = [SampleGrid(columns=1, classes=3, steps=2), DiffusionClassifierCallback(draws=3, fit_images=8)]
    board = TensorBoardLogger(tmp_path, name="tensorboard")
    trainer = L.Trainer(
        accelerator="cpu",
        logger=[board, CSVLogger(tmp_path, name="logs")],
        default_root_dir=tmp_path,
        max_steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        callbacks=[EMA(0.9), *callbacks] if ema_first else [*callbacks, EMA(0.9)],
    )
    trainer.fit(module, DigitsDataModule(batch_size=64))
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "diffclf/confusion", "diffclf/timesteps"}
    assert [event.step for event in events.Images("diffclf/confusion")] == [2, 4]
    assert [event.step for event in events.Images("samples")][:2] == [2, 4]
    assert "diffclf/accuracy" in events.Tags()["scalars"]
    for name in ("samples.png", "validation/confusion.png", "validation/timesteps.png"):
        assert (tmp_path / name).is_file()


def test_other_trackers_are_given_the_file(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    wandb, mlflow = MagicMock(spec=WandbLogger), MagicMock(spec=MLFlowLogger)
    mlflow.run_id = "7"
    log_picture(MagicMock(loggers=[wandb, mlflow], global_step=5), "samples", tmp_path / "a.png")
    wandb.log_image.assert_called_once_with("samples", [str(tmp_path / "a.png")], 5)
    mlflow.experiment.log_artifact.assert_called_once_with("7", str(tmp_path / "a.png"), "samples/5")


def test_bad_settings():
    with pytest.raises(ValueError, match="every_n_validations -1"):
        SampleGrid(every_n_validations=-1)
