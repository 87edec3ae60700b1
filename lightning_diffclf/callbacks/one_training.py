"""One training at a time in the folder of a run."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_diffclf.callbacks.first_rank import on_first_rank
from lightning_diffclf.files import FolderLock, make_folder


class OneTraining(L.Callback):
    """Keeps ``default_root_dir`` to one training: two would write to the same checkpoints and logs, in turns.

    Raises:
        UserError: from ``setup``, on all ranks, if another process trains there.
        FailedWrite: likewise, if the folder cannot be written.
    """

    def __init__(self) -> None:
        self._lock: FolderLock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            on_first_rank(trainer, lambda: self._take(Path(trainer.default_root_dir)))

    def _take(self, folder: Path) -> Path:
        make_folder(folder)
        self._lock = FolderLock(folder)
        return folder

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")
