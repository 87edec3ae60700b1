"""The logs of a run: one set of files, however often it is interrupted and resumed."""

from __future__ import annotations

import csv
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import replacing

PACKAGES = {
    "WandbLogger": ("wandb", "wandb"),
    "CometLogger": ("comet_ml", "comet-ml"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "LitLogger": ("litlogger", "litlogger"),
}  # module and package of Lightning's loggers that need one


class AppendingWriter(ExperimentWriter):
    """Lightning's writer of ``metrics.csv``, which adds to a file that is there instead of deleting it.

    What a kill left of a last line is removed; a kill while columns are added leaves the file as it was.
    """

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        with path.open(newline="") as file:
            self.metrics_keys = next(csv.reader(file), [])
        if not self.metrics_keys:  # killed in its first line; the base class would take an empty file for a whole one
            path.unlink()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with open(self.metrics_file_path, newline="") as file:
            rows = list(csv.DictReader(file))
        with replacing(self.metrics_file_path, "logs") as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)


class AppendingCSVLogger(CSVLogger):
    """A CSVLogger that goes on with the ``metrics.csv`` of its version; steps that are done again have rows again."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            os.makedirs(self.root_dir, exist_ok=True)
            self._experiment = AppendingWriter(self.log_dir)
        return self._experiment


def check_packages(loggers: Any) -> None:
    """Check that the packages of loggers are installed.

    Args:
        loggers: ``trainer.logger`` of a configuration: settings of a logger, a list of these, or something else.

    Raises:
        ValueError: names the first package that is missing, and how it is installed.
    """
    for one in loggers if isinstance(loggers, list) else [loggers]:
        name = str(getattr(one, "class_path", "")).rpartition(".")[2]
        if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
            package = PACKAGES[name][1]
            raise UserError(f"trainer.logger: {name} needs {package}, which is not installed: pip install {package}")


def run_loggers(run_dir: str | Path, resumes: bool) -> list[Logger]:
    """Loggers to ``logs/version_N`` and ``tensorboard/version_N`` of a run's folder.

    A run that resumes goes on with its newest version. One that begins takes the next, or one that got no further than
    to begin.

    Args:
        run_dir: The run's folder.
        resumes: Whether the run goes on from a checkpoint.
    """
    folders = Path(run_dir).glob("logs/version_*")
    newest = max((int(number) for path in folders if (number := path.name.partition("_")[2]).isdecimal()), default=-1)
    again = resumes or not (Path(run_dir) / "logs" / f"version_{newest}" / "metrics.csv").exists()
    version = max(newest, 0) if again else newest + 1
    return [
        AppendingCSVLogger(run_dir, name="logs", version=version),
        TensorBoardLogger(run_dir, name="tensorboard", version=version, default_hp_metric=False),
    ]
