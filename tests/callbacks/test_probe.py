"""A search that learns, under a Trainer: fitted to training images of the data module, once, and kept with the run."""

import json
import pickle
import time
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_diffclf import (
    CovarianceSearch,
    DiffusionClassifier,
    DiffusionClassifierCallback,
    LikelihoodRatio,
    LinearProbe,
)
from lightning_diffclf.callbacks import probe as callbacks_probe
from lightning_diffclf.callbacks.probe import PROBE
from lightning_diffclf.data.protocols import HasTrainingImages
from tests.gaussians import CLASSES, Gaussians, Samples

TOP, DRAWS = 3, 4


class WithLayer(Gaussians):
    """Predicts as before; what a layer gives tells classes apart."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(9, 12)

    def predict(self, x_t, t, candidate):
        self.layer(x_t.flatten(1))
        return super().predict(x_t, t, candidate)


class Data(L.LightningDataModule):
    """Test images, and others to learn from."""

    def __init__(self, images: int = 20, train: int = 60, labelled: bool = True) -> None:
        super().__init__()
        self.test = Samples(images)
        self._train = Subset(Samples(400, labelled), range(300, 300 + train))

    def test_dataloader(self):
        return DataLoader(self.test, batch_size=8)

    def train_dataloader(self):
        return DataLoader(self._train, batch_size=8)

    val_dataloader = test_dataloader

    def training_images(self, count: int):
        return DataLoader(self._train, batch_size=8)  # of which an evaluation takes as many as it wants


def probe(**settings) -> LinearProbe:
    return LinearProbe("layer", timestep=100, top=TOP, **settings)


def trainer(*callbacks: L.Callback, **settings) -> L.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(callbacks=list(callbacks), **quiet | {"enable_model_summary": False} | settings)


def evaluate(out: Path | None, module=None, data=None, given=None, limit: int | None = None, **settings):
    """Candidates kept of each image by id, as stored or in memory."""
    given = {"proposal": given or probe()} | settings
    callback = DiffusionClassifierCallback(draws=DRAWS, output_dir=None if out is None else str(out), **given)
    runner = trainer(callback, **({} if limit is None else {"limit_test_batches": limit}))
    runner.test(module or WithLayer(), datamodule=data or Data(), verbose=False)
    if out is None:
        return {str(one.image_id): one.candidates_K.tolist() for one in callback.results}
    rows = pq.read_table(out / "predictions.parquet").to_pydict()
    return dict(zip(rows["id"], rows["candidates_K"], strict=True))


def in_python(count: int = 60, module=None) -> dict[str, list[int]]:
    """The same by a probe fitted without a Trainer."""
    module, train, test = module or WithLayer(), Samples(400), Samples(20)
    some = slice(300, 300 + count)
    fitted = probe().fit(module, [(train.images[some], train.labels[some])])
    scores = fitted._scores(module, test.images)
    return {str(100 + i): sorted(row.topk(TOP).indices.tolist()) for i, row in enumerate(scores)}


def test_the_probe_is_that_of_the_training_images(tmp_path, capsys):
    assert isinstance(Data(), HasTrainingImages)
    given = probe()
    kept = evaluate(tmp_path / "run", given=given)
    assert kept == in_python()
    assert not given.fitted  # another network needs another one
    rows = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    assert set(rows["nfe"]) == {1 + TOP * DRAWS}
    assert set(rows["search_nfe"]) == {1}
    numbers = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]
    assert (numbers["search_nfe_per_image"], numbers["contest_nfe_per_image"]) == (1, TOP * DRAWS)
    assert numbers["kept_per_image"] == TOP
    right = sum(label in kept[i] for i, label in zip(rows["id"], rows["label"], strict=True))
    assert numbers["proposal_recall"] == right / 20
    assert load_file(tmp_path / "run" / PROBE)["weight"].shape == (13, CLASSES)
    assert "LinearProbe: fitted to 60 training images" in capsys.readouterr().out
    assert evaluate(None, given=given) == kept
    assert evaluate(None, WithLayer(1), given=given) == in_python(module=WithLayer(1))


def test_a_search_without_labels_is_fitted_to_the_same_images(tmp_path, monkeypatch):
    given = {"anchors": 2, "temper": 1.0, "miss": 0.2}
    kept = evaluate(tmp_path / "run", data=Data(labelled=False), given=CovarianceSearch(**given, images=50))
    module, test = WithLayer(), Samples(20).images
    found = CovarianceSearch(**given).fit(module, [(Samples(400).images[300:350], None)])
    classifier = DiffusionClassifier(module, draws=DRAWS, proposal=found)
    expected = {str(one.image_id): one.candidates_K.tolist() for one in classifier(test, range(100, 120))}
    assert kept == expected
    assert 2 < sum(map(len, kept.values())) / 20 < CLASSES
    monkeypatch.setattr(CovarianceSearch, "fit", lambda *_: pytest.fail("fitted again"))
    again = CovarianceSearch(**given, images=50)
    assert evaluate(tmp_path / "run", data=Data(labelled=False), given=again) == kept


def test_the_rule_takes_the_inflation_that_the_fit_measured(tmp_path, capsys):
    given, rule = {"anchors": 2, "temper": 1.0, "miss": 0.001, "least": 3}, LikelihoodRatio(0.05)
    evaluate(tmp_path / "run", given=CovarianceSearch(**given), elimination=rule)
    found = CovarianceSearch(**given).fit(WithLayer(), [(Samples(400).images[300:360], None)])
    assert f"measured inflation {found.inflation:.2f}" in capsys.readouterr().out
    classifier = DiffusionClassifier(WithLayer(), draws=DRAWS, proposal=found, elimination=rule)
    assert classifier.rule.inflation == found.inflation != 1
    rows = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    assert rows["nfe"] == [one.nfe for one in classifier(Samples(20).images, range(100, 120))]
    with pytest.raises(ValueError, match="run"):  # an inflation of one's own is another run
        evaluate(tmp_path / "run", given=CovarianceSearch(**given), elimination=LikelihoodRatio(0.05, inflation=1.0))


def test_no_more_images_than_asked_for(tmp_path):
    assert evaluate(None, given=probe(images=30)) == in_python(30) != in_python()


def test_a_resumed_run_reads_the_probe_that_it_began_with(tmp_path, monkeypatch):
    whole = evaluate(tmp_path / "whole")
    assert len(evaluate(tmp_path / "run", limit=1)) == 8

    def refused(*_):
        raise AssertionError("fitted again")

    monkeypatch.setattr(LinearProbe, "fit", refused)
    assert evaluate(tmp_path / "run") == whole
    with pytest.raises(AssertionError, match="fitted again"):
        evaluate(tmp_path / "another")


def test_other_training_images_are_another_run(tmp_path):
    evaluate(tmp_path / "run")
    with pytest.raises(ValueError, match=r"made with other ones \(fitted_to\.dataset\.indices"):
        evaluate(tmp_path / "run", data=Data(train=50))
    with pytest.raises(ValueError, match=r"made with other ones \(recipe\.proposal\.images: 20000 there, 40 here"):
        evaluate(tmp_path / "run", given=probe(images=40))
    evaluate(tmp_path / "run", data=Data(train=50), next_free=True)
    assert sorted(path.parent.name for path in tmp_path.rglob(PROBE)) == ["run", "run-2"]


def test_a_probe_that_was_changed_is_refused(tmp_path):
    evaluate(tmp_path / "run", limit=1)
    path = tmp_path / "run" / PROBE
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-1] ^= 1
    other = save({"weight": torch.zeros(13, CLASSES)}, {"run": "other", "checksum": "0"})
    for contents, message in (
        (bytes(changed), "has checksum .* was changed or belongs to something else"),
        (other, "has run other, expected"),
        (save({"weight": torch.zeros(13, CLASSES)}), "has run None, expected"),
        (whole[:-9], "cannot be read"),
        (pickle.dumps(print), "cannot be read"),
        (b"", "cannot be read"),
    ):
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=rf"probe: '.*{PROBE}' {message}"):
            evaluate(tmp_path / "run")
    path.unlink()
    assert evaluate(tmp_path / "run") == in_python()


def test_without_training_images_there_is_one_error_before_any_work(tmp_path):
    class Without(Data):
        training_images = None  # type: ignore[assignment]

    class Bare(L.LightningDataModule):
        def test_dataloader(self):
            return DataLoader(Samples(4), batch_size=2)

    module = WithLayer()
    with pytest.raises(ValueError, match=r"proposal: LinearProbe\(.* but Bare has no training_images\(count\)"):
        evaluate(tmp_path / "out", module, Bare())
    callback = DiffusionClassifierCallback(draws=2, proposal=probe(), output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="but no data module, expected a data module with them"):
        trainer(callback).test(module, Bare().test_dataloader(), verbose=False)
    with pytest.raises(ValueError, match="no layer 'blocks' in WithLayer"):
        evaluate(tmp_path / "out", module, given=LinearProbe("blocks"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="probe: training images without labels"):
        evaluate(None, module, Data(labelled=False))
    assert module.autocast_seen == set()


def test_validation_during_fit_tries_all_candidates():
    callback = DiffusionClassifierCallback(draws=2, proposal=probe(), fit_images=5)
    runner = trainer(callback, max_steps=2, val_check_interval=2)
    runner.fit(WithLayer(), datamodule=Data())
    assert callback.metrics["nfe_per_image"] == 2 * CLASSES
    assert "proposal_recall" not in callback.metrics
    runner.validate(WithLayer(), datamodule=Data(), verbose=False)
    assert callback.metrics["nfe_per_image"] == 1 + 2 * TOP


def test_a_plan_fits_for_a_moment_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(callbacks_probe, "PLAN_SECONDS", 0.0)
    callback = DiffusionClassifierCallback(draws=DRAWS, proposal=probe(), output_dir=str(tmp_path / "out"), plan=True)
    trainer(callback).test(WithLayer(), datamodule=Data(), verbose=False)
    shown = capsys.readouterr().out
    assert "LinearProbe: fitted to 8 training images" in shown
    assert callback.planned.fitting == 60
    assert "at most 60 network calls" in " ".join(shown.split())
    assert callback.planned.nfe == 1 + TOP * DRAWS
    callback = DiffusionClassifierCallback(draws=DRAWS, proposal=CovarianceSearch(anchors=2), plan=True)
    trainer(callback).test(WithLayer(), datamodule=Data(), verbose=False)
    assert callback.planned.fitting == 60 * (CLASSES + 3 * 8)
    assert not (tmp_path / "out").exists()


def test_seconds_are_also_those_of_the_proposal(tmp_path):
    def slow(images):
        time.sleep(0.05)
        return [[0, 1]] * len(images)

    evaluate(tmp_path / "run", given=slow)
    assert sum(pq.read_table(tmp_path / "run" / "predictions.parquet")["seconds"].to_pylist()) >= 3 * 0.05
