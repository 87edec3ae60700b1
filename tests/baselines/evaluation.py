"""A short evaluation on the CPU, and what it left."""

import json
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq

from lightning_diffclf import DiffusionClassifierCallback


def trainer(**settings) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", **quiet, **settings)


def evaluate(out: Path, module: L.LightningModule, data: L.LightningDataModule, limit=1.0, **settings):
    """Columns of the predictions, and metrics.json."""
    callback = DiffusionClassifierCallback(output_dir=str(out), **settings)
    trainer(limit_test_batches=limit, callbacks=[callback]).test(module, data, verbose=False)
    table = pq.read_table(out / "predictions.parquet")
    return table.to_pydict(), json.loads((out / "metrics.json").read_text())
