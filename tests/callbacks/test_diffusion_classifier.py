import copy
import io
import json
import os
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging
from PIL import Image
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_diffclf import (
    EMA,
    ClassConditionalDiT,
    DiffusionClassifier,
    DiffusionClassifierCallback,
    Draws,
    LikelihoodRatio,
    Stages,
    files,
)
from lightning_diffclf.callbacks import rank_evaluation
from lightning_diffclf.callbacks.sharding import images_on_this_rank
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.stored import read_table
from tests.gaussians import CLASSES, Gaussians, Samples, class_means, loader
from tests.ranks import run_ranks


def trainer(*callbacks: L.Callback, **kwargs: object) -> L.Trainer:
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(callbacks=list(callbacks), **settings | kwargs)


def read(folder: Path) -> tuple[dict, dict]:
    return pq.read_table(folder / "predictions.parquet").to_pydict(), json.loads((folder / "metrics.json").read_text())


def test_metrics_agree_with_independent_ones(tmp_path):
    callback = DiffusionClassifierCallback(draws=20, output_dir=str(tmp_path / "out"), temperature=3.0)
    logged = trainer(callback).test(Gaussians(), loader(41), verbose=False)[0]
    rows, report = read(tmp_path / "out")
    scores, labels = np.array(rows["scores_K"]), np.array(rows["label"])
    predictions = np.array(rows["prediction"])
    assert (predictions == scores.argmin(1)).all()
    log_p = log_softmax(-scores * 9 / 3.0, axis=1)  # 9 values in an image
    expected = {
        "accuracy": (predictions == labels).mean(),
        "mean_per_class": balanced_accuracy_score(labels, predictions),
        "top5": top_k_accuracy_score(labels, -scores, k=5, labels=range(CLASSES)),
        "nll": -log_p[np.arange(41), labels].mean(),
        "images": 41,
        "nfe_per_image": 20 * CLASSES,
    }
    for name, value in expected.items():
        assert logged[f"diffclf/{name}"] == pytest.approx(value, rel=1e-5), name
        assert report["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert 0.3 < expected["accuracy"] < 1  # neither chance nor trivial
    assert rows["id"] == [str(100 + i) for i in range(41)]
    assert set(map(len, rows["draws_K"])) == {CLASSES}
    assert {d for row in rows["draws_K"] for d in row} == {20}
    assert sum(rows["nfe"]) == 41 * 20 * CLASSES
    assert {"predictions.parquet", "settings.json", "metrics.json", "confusion.png", "timesteps.png"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_one_draw_is_enough(tmp_path):
    trainer(DiffusionClassifierCallback(draws=1, output_dir=str(tmp_path / "out"))).test(
        Gaussians(), loader(4), verbose=False
    )
    assert read(tmp_path / "out")[1]["metrics"]["nfe_per_image"] == CLASSES
    assert (tmp_path / "out" / "confusion.png").is_file()
    assert not (tmp_path / "out" / "timesteps.png").exists()  # of one point


def test_agrees_with_the_classifier_without_a_trainer(tmp_path):
    callback = DiffusionClassifierCallback(elimination=Stages((5, 20), (3, 1)), output_dir=str(tmp_path / "out"))
    module, data = Gaussians(), Samples(10)
    trainer(callback).validate(module, loader(10), verbose=False)
    rows, _ = read(tmp_path / "out")
    direct = list(DiffusionClassifier(module, elimination=Stages((5, 20), (3, 1)))(data.images, range(100, 110)))
    assert rows["prediction"] == [r.prediction for r in direct]
    assert rows["draws_K"] == [r.draws_K.tolist() for r in direct]
    torch.testing.assert_close(torch.tensor(rows["scores_K"]), torch.stack([r.scores_K for r in direct]).float())


@pytest.mark.ddp
def test_processes_do_not_change_results(tmp_path):
    """11 images on 1, 2 and 3 processes, with shards that Lightning pads: same rows, same counts, same metrics.

    And two images on three, of which one has nothing to do but to take part.
    """
    calls = [(devices, 11, tmp_path / str(devices), devices == 2) for devices in (1, 2, 3)]
    run_ranks("evaluate_gaussians.py", *calls, (3, 2, tmp_path / "few"))
    rows, report = read(tmp_path / "few")
    assert rows["id"] == ["100", "101"]
    assert report["metrics"]["images"] == 2
    for rule in ("", "paired", "ratio"):
        rows, report = read(tmp_path / "1" / rule)
        assert report["metrics"]["images"] == len(rows["id"]) == 11
        assert (report["metrics"]["nfe_per_image"] < 12 * CLASSES) == bool(rule)  # the others do eliminate
        floats = {name: np.array(rows.pop(name)) for name in ("scores_K", "differences_K", "margin")}
        for name in ("seconds", "rank", "error_map"):
            rows.pop(name)
        for devices in (2, 3):
            more_rows, more = read(tmp_path / str(devices) / rule)
            assert set(more_rows.pop("rank")) == set(range(devices))
            assert sum(m is not None for m in more_rows.pop("error_map")) > 0
            more_rows.pop("seconds")
            for name, values in floats.items():
                np.testing.assert_allclose(np.array(more_rows.pop(name)), values, rtol=1e-5)
            assert more_rows == rows
            for name in ("accuracy", "mean_per_class", "nll", "ece", "images", "nfe_per_image", "top5"):
                assert more["metrics"][name] == pytest.approx(report["metrics"][name], rel=1e-5), name
            assert more["settings"]["ranks"] == devices
            assert not list((tmp_path / str(devices)).glob("**/*rank*"))


@given(st.integers(1, 50), st.integers(1, 6), st.none() | st.integers(1, 60), st.booleans())
def test_ranks_share_every_image_once(images, world_size, cap, shuffle):
    dataset = TensorDataset(torch.arange(images))
    counted = []
    for rank in range(world_size):
        sampler = DistributedSampler(dataset, world_size, rank, shuffle=shuffle)
        share = images_on_this_rank(DataLoader(dataset, sampler=sampler), rank, world_size, cap)
        counted += list(sampler)[:share]
    assert len(counted) == len(set(counted)) == (images if cap is None else min(cap, images))


def test_unsharded_and_dropping_loaders_are_refused():
    dataset = TensorDataset(torch.arange(5))
    with pytest.raises(ValueError, match="each of 2 ranks would see all images"):
        images_on_this_rank(DataLoader(dataset), 0, 2, None)
    with pytest.raises(ValueError, match="drop_last"):
        images_on_this_rank(DataLoader(dataset, sampler=DistributedSampler(dataset, 2, 0, drop_last=True)), 0, 2, None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_network_runs_in_the_trainers_precision(precision):
    module = Gaussians()
    trainer(DiffusionClassifierCallback(draws=3), precision=precision).test(module, loader(4), verbose=False)
    assert module.autocast_seen == {precision == "bf16-mixed"}


def tiny_dit() -> ClassConditionalDiT:
    torch.manual_seed(0)
    return ClassConditionalDiT(
        input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=1, num_heads=2, latents=False, lr=0.05
    )


@pytest.mark.parametrize("ema_first", [True, False])
def test_validation_sees_averaged_weights_whatever_the_order(ema_first, tmp_path):
    callback, ema = DiffusionClassifierCallback(draws=4, fit_images=7), EMA(0.9)
    module, data = tiny_dit(), DigitsDataModule(batch_size=64)
    fitting = trainer(
        *([ema, callback] if ema_first else [callback, ema]),
        max_steps=6,
        val_check_interval=6,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    fitting.fit(module, data)
    assert callback.metrics["images"] == 7
    batch = next(iter(data.val_dataloader()))  # training has ended: the module holds the averaged weights
    averaged = list(DiffusionClassifier(module, Draws(4))(batch["image"][:7], batch["id"][:7]))
    for seen, expected in zip(callback.results, averaged, strict=True):
        torch.testing.assert_close(seen.scores_K, expected.scores_K, rtol=1e-5, atol=1e-7)
    ema._swap(module)  # and not the trained ones
    trained = list(DiffusionClassifier(module, Draws(4))(batch["image"][:7], batch["id"][:7]))
    assert not torch.allclose(callback.results[0].scores_K, trained[0].scores_K, rtol=1e-4)


class WrongLength(IterableDataset):
    """Says that it has more images than it gives, as a folder of shards may."""

    def __init__(self, images: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor, said: int | None) -> None:
        self.parts, self.said = (images, labels, ids), said

    def __iter__(self):
        return iter(zip(*self.parts, strict=True))

    def __len__(self):
        if self.said is None:
            raise TypeError("unknown")
        return self.said


@pytest.mark.parametrize(
    ("averaging", "said"), [(EMA, None), (EMA, 40), (partial(EMAWeightAveraging, use_buffers=False), None)]
)
def test_streams_of_unknown_length_are_classified_with_averaged_weights(averaging, said):
    """Also the last images, which fill no micro-batch, where the averaging callback comes first."""
    callback, seen = DiffusionClassifierCallback(draws=4, fit_images=None, microbatch=256), {}
    module, data = tiny_dit(), DigitsDataModule(batch_size=64)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    images, ids, labels = (batch[name][:7] for name in ("image", "id", "label"))

    class Keep(L.Callback):  # the averaged weights, while they are in place
        def on_validation_batch_start(self, trainer, pl_module, *_):
            seen.update({name: value.clone() for name, value in pl_module.net.state_dict().items()})

    stream = DataLoader(WrongLength(images, ids, labels, said), batch_size=2)
    fitting = trainer(
        averaging(decay=0.9),
        callback,
        Keep(),
        max_steps=3,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
    )
    fitting.fit(module, data.train_dataloader(), stream)
    assert callback.metrics["images"] == 7
    averaged = copy.deepcopy(module)
    averaged.net.load_state_dict(seen)
    expected = list(DiffusionClassifier(averaged, Draws(4))(images, ids))
    for one, other in zip(callback.results, expected, strict=True):
        torch.testing.assert_close(one.scores_K, other.scores_K, rtol=1e-5, atol=1e-7)


def test_fit_classifies_every_nth_validation_and_skips_the_sanity_check():
    steps = []

    class Seen(Gaussians):
        def predict(self, x_t, t, candidate):
            steps.append(self.trainer.global_step)
            return super().predict(x_t, t, candidate)

    callback = DiffusionClassifierCallback(draws=2, fit_images=3, every_n_validations=2)
    fitting = trainer(callback, max_steps=8, val_check_interval=2, check_val_every_n_epoch=None)
    fitting.fit(Seen(), loader(40), loader(6))
    assert sorted(set(steps)) == [4, 8]
    assert fitting.callback_metrics["diffclf/images"] == 3


def test_predict_looks_at_no_labels_which_may_be_of_other_classes(tmp_path):
    callback = DiffusionClassifierCallback(draws=5, output_dir=str(tmp_path))
    trainer(callback).predict(Gaussians(), loader(6))
    rows, report = read(tmp_path)
    assert rows["label"] == [None] * 6
    assert "accuracy" not in report["metrics"]


def test_predict_needs_no_labels(tmp_path):
    callback = DiffusionClassifierCallback(draws=5, output_dir=str(tmp_path / "out"))
    trainer(callback).predict(Gaussians(), loader(6, labelled=False))
    rows, report = read(tmp_path / "out")
    assert rows["label"] == [None] * 6
    assert set(report["metrics"]) == {"images", "nfe_per_image", "speedup", "images_per_second", "seconds"}
    assert report["metrics"]["speedup"] == 1
    assert report["metrics"]["images"] == 6
    assert report["metrics"]["nfe_per_image"] == 5 * CLASSES


def test_images_without_ids_do_not_depend_on_order(tmp_path):
    data = Samples(6)
    for name, order in (("a", [0, 1, 2, 3, 4, 5]), ("b", [3, 1, 5, 0, 4, 2])):
        callback = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / name))
        pairs = TensorDataset(data.images[order], data.labels[order])
        trainer(callback).test(Gaussians(), DataLoader(pairs, 4), verbose=False)
    a, b = (read(tmp_path / name)[0] for name in "ab")
    assert a["id"] == b["id"]
    np.testing.assert_allclose(a["scores_K"], b["scores_K"], rtol=1e-6)


def test_an_image_without_an_id_counts_as_often_as_it_is_there(tmp_path):
    data = Samples(6)
    again = [0, 1, 2, 3, 4, 5, 2, 2]
    callback = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / "out"))
    pairs = TensorDataset(data.images[again], data.labels[again])
    trainer(callback).test(Gaussians(), DataLoader(pairs, 3), verbose=False)
    rows, report = read(tmp_path / "out")
    assert len(set(rows["id"])) == len(rows["id"]) == report["metrics"]["images"] == 8
    assert sorted(rows["label"]) == sorted(data.labels[again].tolist())


def test_an_id_that_comes_again_is_refused_at_once_also_when_the_run_is_resumed(tmp_path):
    samples = [Samples(12)[i] for i in (0, 1, 2, 3, 0, *range(4, 12))]
    for _ in range(2):
        callback = DiffusionClassifierCallback(draws=4, microbatch=28, output_dir=str(tmp_path / "out"))
        with pytest.raises(UserError, match="image 100: its id has come before, expected an id of its own"):
            trainer(callback).test(Gaussians(), DataLoader(samples, 2), verbose=False)
        assert read_table(tmp_path / "out")["id"].to_pylist() == ["100", "101", "102", "103"]


def test_an_id_that_two_processes_have_counts_once_and_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_evaluation, "DistinctIds", lambda: lambda ids, images: list(ids))  # as of several
    samples = [Samples(6)[i] for i in (0, 1, 2, 3, 4, 5, 0, 1)]
    callback = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="2 images have ids that images on other processes had as well"):
        trainer(callback).test(Gaussians(), DataLoader(samples, 2), verbose=False)
    rows, report = read(tmp_path / "out")
    assert len(rows["id"]) == report["metrics"]["images"] == callback.metrics["images"] == 6
    assert (
        report["metrics"]["accuracy"]
        == callback.metrics["accuracy"]
        == np.mean(np.array(rows["label"]) == np.array(rows["prediction"]))
    )


def test_candidates_restrict_the_choice(tmp_path):
    callback = DiffusionClassifierCallback(draws=4, candidates=[2, 5], output_dir=str(tmp_path / "out"))
    trainer(callback).predict(Gaussians(), loader(6))
    rows, _ = read(tmp_path / "out")
    assert set(rows["prediction"]) <= {2, 5}
    assert rows["candidates_K"] == [[2, 5]] * 6


def test_what_was_decided_before_an_error_is_kept(tmp_path):
    data = Samples(8)
    data.labels[6] = 99
    callback = DiffusionClassifierCallback(draws=4, microbatch=16, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"label: 99 of image 106 belongs to no candidate, expected one of the 7"):
        trainer(callback).test(Gaussians(), DataLoader(data, 4), verbose=False)
    assert read_table(tmp_path / "out")["id"].to_pylist() == ["100", "101", "102", "103"]


def test_the_same_again_goes_on_and_others_go_elsewhere(tmp_path):
    out = tmp_path / "out"

    def evaluate(images, **settings):
        callback = DiffusionClassifierCallback(output_dir=str(out), **settings)
        trainer(callback, limit_test_batches=images // 2).test(Gaussians(), loader(12, batch_size=2), verbose=False)
        return callback

    first = evaluate(6, draws=4)
    assert first.results == []  # what is in the folder is not in memory
    rows, _ = read(out)
    again = evaluate(12, draws=4)
    more_rows, more = read(out)
    assert {name: values[:6] for name, values in more_rows.items()} == rows  # seconds as well: they were there
    assert more["metrics"]["images"] == again.metrics["images"] == 12
    fresh = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / "fresh"))
    trainer(fresh).test(Gaussians(), loader(12), verbose=False)
    fresh_rows, _ = read(tmp_path / "fresh")
    for name in ("id", "label", "prediction", "top5", "draws_K", "nfe", "choice_S", "leader_S", "thumbnail"):
        assert fresh_rows[name] == more_rows[name], name
    for name, value in fresh.metrics.items():
        if "second" not in name:
            assert again.metrics[name] == pytest.approx(value), name
    with pytest.raises(
        ValueError, match=r"settings: the run in '.*out' was made with other ones \(recipe\.draws: 4 there, 5"
    ):
        evaluate(12, draws=5)
    assert read(out)[1] == more
    for expected in ("out-2", "out-3"):
        evaluate(2, draws=5 if expected == "out-2" else 6, next_free=True)
        assert (tmp_path / expected / "predictions.parquet").is_file()
    evaluate(4, draws=5, next_free=True)  # back to its own
    assert len(read(tmp_path / "out-2")[0]["id"]) == 4
    assert not (tmp_path / "out-4").exists()


class Fails(L.Callback):
    """Raises an error at the end of a batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, *_):
        if batch_idx == self.at:
            raise RuntimeError("the power failed")


def test_a_folder_takes_one_evaluation_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    out = tmp_path / "out"

    def evaluate(*others, **settings):
        callback = DiffusionClassifierCallback(draws=2, output_dir=str(out), **settings)
        trainer(callback, *others).test(Gaussians(), loader(4), verbose=False)

    evaluate()
    with files.FolderLock(out):  # as another process that evaluates the same
        for settings in ({}, {"next_free": True}):
            with pytest.raises(UserError, match=rf"output: '.*out' is being written to by process {os.getpid()} on"):
                evaluate(**settings)
        evaluate(seed=1, next_free=True)  # other results do not wait
    assert (tmp_path / "out-2" / "metrics.json").is_file()
    evaluate()  # neither an evaluation that ended nor one that failed keeps the folder
    with pytest.raises(RuntimeError, match="the power failed"):
        evaluate(Fails(at=0))
    assert not list(tmp_path.rglob(files.LOCK))
    evaluate()


def test_what_another_process_has_half_written_is_not_resumed(tmp_path):
    out = tmp_path / "out"
    callback = DiffusionClassifierCallback(draws=2, microbatch=16, output_dir=str(out), keep_errors=True, flush_every=2)
    with pytest.raises(RuntimeError, match="the power failed"):
        trainer(callback, Fails(at=0)).test(Gaussians(), loader(6), verbose=False)
    errors, *_ = sorted((out / "parts").glob("*.errors.parquet"))
    orphan = errors.with_name("00000-000000000000-000000.errors.parquet")
    shutil.copy(errors, orphan)  # killed before the records were written
    (out / "parts" / "00000-000000000000-000001.parquet.12345678.tmp").write_bytes(b"half")
    again = DiffusionClassifierCallback(draws=2, output_dir=str(out), keep_errors=True)
    trainer(again).test(Gaussians(), loader(6), verbose=False)
    assert [image.image_id for image in StoredErrors(out / "errors.parquet")] == [str(100 + i) for i in range(6)]
    assert not (out / "parts").exists()


def test_other_weights_or_data_are_other_settings(tmp_path):
    module, out = Gaussians(), str(tmp_path / "out")
    trainer(DiffusionClassifierCallback(draws=2, output_dir=out)).test(module, loader(4), verbose=False)
    for change, message in (
        (lambda: module.means.mul_(2), r"module\.weights\.means: .* there"),
        (lambda: None, "images: 4 there, 5 here"),
    ):
        callback = DiffusionClassifierCallback(draws=2, output_dir=out)
        change()
        with pytest.raises(ValueError, match=message):
            trainer(callback).test(module, loader(5), verbose=False)


def test_seconds_and_ranks_of_rows_add_up(tmp_path):
    callback = DiffusionClassifierCallback(draws=6, microbatch=8, output_dir=str(tmp_path / "out"))
    trainer(callback).test(Gaussians(), loader(20), verbose=False)
    rows, report = read(tmp_path / "out")
    assert sum(rows["seconds"]) == pytest.approx(report["metrics"]["seconds"])
    assert set(rows["rank"]) == {0}


def test_thumbnails_are_the_images_and_maps_show_where_errors_differ(tmp_path):
    module, data = Gaussians(), Samples(30)
    callback = DiffusionClassifierCallback(draws=16, error_maps=3, output_dir=str(tmp_path / "out"))
    trainer(callback).test(module, loader(30), verbose=False)
    rows, report = read(tmp_path / "out")
    for image, picture in zip(data.images, rows["thumbnail"], strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("L")) / 127.5 - 1
        np.testing.assert_allclose(pixels, image[0].clamp(-1, 1), atol=2 / 127)
    wrong = [i for i in range(30) if rows["prediction"][i] != rows["label"][i]]
    assert len(wrong) > 3
    mapped = [i for i in range(30) if rows["error_map"][i] is not None]
    assert mapped == wrong[:3]
    for i in mapped:
        k, b = rows["label"][i], rows["prediction"][i]
        difference = rows["scores_K"][i][k] - rows["scores_K"][i][b]
        assert np.mean(rows["error_map"][i]) == pytest.approx(difference, rel=1e-4)
        assert np.shape(rows["error_map"][i]) == (3, 3)
    assert report["metrics"]["nfe_per_image"] == 16 * CLASSES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_maps_are_made_where_the_network_is(tmp_path):
    callback = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / "out"))
    trainer(callback, accelerator="gpu", devices=1).test(Gaussians(), loader(30), verbose=False)
    assert any(one is not None for one in read(tmp_path / "out")[0]["error_map"])


def test_rows_say_who_led_when(tmp_path):
    callback = DiffusionClassifierCallback(
        draws=12, elimination=LikelihoodRatio(0.2), keep_errors=True, output_dir=str(tmp_path / "out")
    )
    trainer(callback).test(Gaussians(), loader(20), verbose=False)
    rows, _ = read(tmp_path / "out")
    stored = {one.image_id: one for one in StoredErrors(tmp_path / "out" / "errors.parquet")}
    for i, image_id in enumerate(rows["id"]):
        errors_SK = stored[image_id].errors_SK.astype(float)
        for s, (choice, leader) in enumerate(zip(rows["choice_S"][i], rows["leader_S"][i], strict=True)):
            alive = [k for k in range(CLASSES) if rows["draws_K"][i][k] > s]
            assert choice == min(alive, key=lambda k: errors_SK[s, k])
            assert leader == min(alive, key=lambda k: errors_SK[: s + 1, k].mean())
        assert len(rows["choice_S"][i]) == max(rows["draws_K"][i])
        assert rows["leader_S"][i][-1] == rows["prediction"][i] == rows["top5"][i][0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws: 0, expected at least 1"),
        ({"keep_distances": True}, "keep_distances: .* expected keep_errors as well"),
        ({"microbatch": 0}, "microbatch: 0"),
        ({"candidates": []}, "candidates: an empty list"),
        ({"reduction": "max"}, "reduction 'max'"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"every_n_validations": 0}, "every_n_validations: 0"),
    ],
)
def test_bad_settings_are_refused_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionClassifierCallback(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 1001}, "1001 draws: the schedule allows 1 … 1000"),
        ({"loss": "l3"}, "loss: 'l3'"),
        ({"budget": 6}, "budget: 6 network calls for the 7 candidates of image 100, expected at least 7"),
        ({"budget": 0}, "budget: 0, expected at least 1"),
        ({"abstain": -1.0}, "abstain: -1.0, expected a margin in nats"),
        ({"weights": "heavy"}, "weights: 'heavy'"),
        ({"loss": "l2+l1", "elimination": LikelihoodRatio()}, "loss 'l2.l1' is no distance between noises"),
        ({"candidates": [7]}, r"candidates: \[7\], expected indices in 0 … 6"),
        ({"draws": 10, "elimination": Stages()}, "draws: 10, but the elimination rule spends up to 500"),
    ],
)
def test_settings_that_do_not_fit_the_module_are_refused_before_any_work(settings, message):
    module = Gaussians()
    with pytest.raises(ValueError, match=message):
        trainer(DiffusionClassifierCallback(**settings)).test(module, loader(4), verbose=False)
    assert not module.autocast_seen  # the network was never called


def test_other_modules_and_unlabelled_tests_are_refused():
    class NoDenoiser(L.LightningModule):
        def test_step(self, batch, batch_idx): ...

    with pytest.raises(TypeError, match=r"NoDenoiser lacks \['schedule', 'candidates', 'encode', 'predict'\]"):
        trainer(DiffusionClassifierCallback(draws=1)).test(NoDenoiser(), loader(2), verbose=False)
    with pytest.raises(ValueError, match="no labels"):
        trainer(DiffusionClassifierCallback(draws=1)).test(Gaussians(), loader(2, labelled=False), verbose=False)


def test_unsure_answers_are_left_out_of_the_accuracy_of_answers(tmp_path):
    everything = DiffusionClassifierCallback(draws=6, output_dir=str(tmp_path / "a"))
    trainer(everything).test(Gaussians(), loader(60), verbose=False)
    rows, _ = read(tmp_path / "a")
    margin = float(np.median(rows["margin"]))
    picky = DiffusionClassifierCallback(draws=6, abstain=margin, output_dir=str(tmp_path / "b"))
    logged = trainer(picky).test(Gaussians(), loader(60), verbose=False)[0]
    answered = np.array(rows["margin"]) >= margin
    right = np.array(rows["prediction"]) == np.array(rows["label"])
    assert read(tmp_path / "b")[0]["abstained"] == (~answered).tolist()
    assert logged["diffclf/coverage"] == pytest.approx(answered.mean())
    assert logged["diffclf/answered_accuracy"] == pytest.approx(right[answered].mean())
    assert logged["diffclf/accuracy"] == pytest.approx(right.mean())
    assert right[answered].mean() > right.mean()  # a small margin means something


class NearestMeans:
    """Proposes the classes whose means are nearest, at a cost of three calls."""

    nfe = 3

    def __init__(self, top: int) -> None:
        self.top = top

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        distances = (images[:, None] - class_means()).square().flatten(2).sum(2)
        return distances.topk(self.top, largest=False).indices


def test_recall_of_a_proposal_is_reported(tmp_path):
    data = Samples(40)
    callback = DiffusionClassifierCallback(draws=6, proposal=NearestMeans(2), output_dir=str(tmp_path / "out"))
    logged = trainer(callback).test(Gaussians(), loader(40), verbose=False)[0]
    rows, _ = read(tmp_path / "out")
    proposed = NearestMeans(2)(data.images)
    assert rows["candidates_K"] == proposed.tolist()
    recall = (proposed == data.labels[:, None]).any(1).float().mean().item()
    assert 0.5 < recall < 1
    assert logged["diffclf/proposal_recall"] == pytest.approx(recall)
    assert logged["diffclf/accuracy"] <= recall
    assert set(rows["nfe"]) == {2 * 6 + 3}


def test_two_classifiers_side_by_side():
    cheap, dear = DiffusionClassifierCallback(draws=2, name="cheap"), DiffusionClassifierCallback(draws=9, name="dear")
    logged = trainer(cheap, dear).test(Gaussians(), loader(4), verbose=False)[0]
    assert logged["cheap/nfe_per_image"] == 2 * CLASSES
    assert logged["dear/nfe_per_image"] == 9 * CLASSES
