"""What is shown from the first second of a zero-shot evaluation on."""

import lightning as L
import pytest
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_diffclf.callbacks.progress import ClassifierProgressBar
from lightning_diffclf.cli import main


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
