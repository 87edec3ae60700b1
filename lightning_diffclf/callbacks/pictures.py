"""Pictures for experiment trackers."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image


def log_picture(trainer: L.Trainer, name: str, path: Path) -> None:
    """Show the picture in ``path`` under ``name`` in the Trainer's TensorBoard, W&B and MLflow loggers. Rank 0 only."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(path)], trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), f"{name}/{trainer.global_step}")
