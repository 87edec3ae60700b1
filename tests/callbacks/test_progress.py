"""What is shown from the first second of a zero-shot evaluation on."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_diffclf.callbacks.certification import CertificationTrial
from lightning_diffclf.callbacks.progress import ClassifierProgressBar
from lightning_diffclf.callbacks.trial import TrialCallback
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.cli import main
from lightning_diffclf.results.stored import read_table
from tests.gaussians import SHAPE, Gaussians


class Recording(ClassifierProgressBar):
    """Also keeps what the line of images said."""

    shown: list[str]

    def tell(self, what, done, total):
        super().tell(what, done, total)
        if self._images is not None:
            self.shown.append(self.progress.tasks[self._images].description)


@pytest.fixture
def shown(monkeypatch):
    Recording.shown = []
    monkeypatch.setattr("lightning_diffclf.cli.ClassifierProgressBar", Recording)
    return Recording.shown


def test_every_stage_is_told(shown, tmp_path, capsys):
    flags = ["--trainer.limit_test_batches=1", "--data.eval_batch_size=2", "--classifier.draws=3"]
    main(["test", "--config=sd_digits.yaml", f"--run_dir={tmp_path}", "--trainer.accelerator=cpu", *flags])
    assert "loading assets/sd_digits\n" in capsys.readouterr().out
    assert shown[0] == "Embedding prompts: 0 of 10"
    assert shown[1] == "Encoding images"
    calls = [int(line.split(": ")[1]) for line in shown[2:] if line.startswith("Network calls")]
    assert calls
    assert calls == sorted(calls)
    assert calls[-1] <= 2 * 3 * 10


def test_a_logger_s_number_of_the_run_is_not_shown(tmp_path):
    bar = ClassifierProgressBar()
    trainer = L.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[bar])
    assert "v_num" in RichProgressBar().get_metrics(trainer, L.LightningModule())
    assert "v_num" not in bar.get_metrics(trainer, L.LightningModule())


def test_a_limit_of_images_ends_a_whole_bar(tmp_path):
    bar = Recording(leave=True)
    Recording.shown, ended = [], []

    class Last(L.Callback):
        def on_test_end(self, trainer, module):
            ended.append(bar.test_progress_bar)

    limited = TrialCallback(CertificationTrial(0.5, n0=2, n=10, draws=1), Recipe(), str(tmp_path), limit=5)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "inference_mode": False}
    trainer = L.Trainer(**settings, callbacks=[limited, bar, Last()])
    images, labels = torch.zeros(2, *SHAPE), torch.ones(2, dtype=torch.int64)
    batches = [{"image": images, "label": labels, "id": [i, i + 1]} for i in (0, 2, 4, 6, 8)]
    trainer.test(Gaussians(), DataLoader(batches, batch_size=None), verbose=False)
    assert (ended[0].completed, ended[0].total) == (3, 3)
    assert read_table(tmp_path).num_rows == 5
