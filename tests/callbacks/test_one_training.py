from pathlib import Path

import lightning as L
import pytest

from lightning_diffclf import files
from lightning_diffclf.callbacks.one_training import OneTraining
from lightning_diffclf.errors import FailedWrite, UserError
from lightning_diffclf.files import LOCK, FolderLock
from tests.gaussians import Gaussians, loader


class Looking(L.Callback):
    def __init__(self, fails: bool) -> None:
        self.locked, self.fails = False, fails

    def on_train_batch_end(self, trainer, *_):
        with pytest.raises(UserError, match="is being written to by process"):
            FolderLock(Path(trainer.default_root_dir))
        self.locked = True
        if self.fails:
            raise RuntimeError("enough")


def fit(folder, *callbacks):
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[OneTraining(), *callbacks],
    )  # fmt: skip
    trainer.fit(Gaussians(), loader(8))


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_takes_one_training_at_a_time(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    run_dir, looking = tmp_path / "new" / "run", Looking(fails)
    if fails:
        with pytest.raises(RuntimeError, match="enough"):
            fit(run_dir, looking)
    else:
        fit(run_dir, looking)
    assert looking.locked
    assert not (run_dir / LOCK).exists()
    with FolderLock(run_dir), pytest.raises(UserError, match=r"output: '.*run' is being written to by process \d+ on"):
        fit(run_dir)
    fit(run_dir)


def test_a_folder_that_cannot_be_written_is_told_before_the_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedWrite, match=r"output: '.*file/run' cannot be written"):
        fit(tmp_path / "file" / "run")
