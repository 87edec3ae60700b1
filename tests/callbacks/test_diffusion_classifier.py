import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_diffclf import EMA, ClassConditionalDiT, DiffusionClassifier, DiffusionClassifierCallback, Draws, Stages
from lightning_diffclf.callbacks.diffusion_classifier import free_folder, images_on_this_rank
from lightning_diffclf.data.digits import DigitsDataModule
from tests.gaussians import CLASSES, Gaussians, Samples, loader

ROOT = Path(__file__).parents[2]


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
    assert {"predictions.parquet", "metrics.json", "confusion.png", "timesteps.png"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }


def test_agrees_with_the_classifier_without_a_trainer(tmp_path):
    callback = DiffusionClassifierCallback(elimination=Stages((5, 20), (3, 1)), output_dir=str(tmp_path / "out"))
    module, data = Gaussians(), Samples(10)
    trainer(callback).validate(module, loader(10), verbose=False)
    rows, _ = read(tmp_path / "out")
    direct = list(DiffusionClassifier(module, elimination=Stages((5, 20), (3, 1)))(data.images, range(100, 110)))
    assert rows["prediction"] == [r.label for r in direct]
    assert rows["draws_K"] == [r.draws_K.tolist() for r in direct]
    torch.testing.assert_close(torch.tensor(rows["scores_K"]), torch.stack([r.scores_K for r in direct]).float())


def run_processes(devices: int, images: int, out: Path, *flags: str) -> tuple[dict, dict]:
    command = [sys.executable, "tests/scripts/evaluate_gaussians.py", str(devices), str(images), str(out), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return read(out)


@pytest.mark.ddp
def test_processes_do_not_change_results(tmp_path):
    """11 images on 1, 2 and 3 processes, with shards that Lightning pads: same rows, same counts, same metrics."""
    rows, report = run_processes(1, 11, tmp_path / "1")
    assert report["metrics"]["images"] == len(rows["id"]) == 11
    for devices in (2, 3):
        more_rows, more = run_processes(devices, 11, tmp_path / str(devices), *(["fit"] if devices == 2 else []))
        scores, more_scores = np.array(rows.pop("scores_K")), np.array(more_rows.pop("scores_K"))
        np.testing.assert_allclose(more_scores, scores, rtol=1e-6)
        assert more_rows == rows
        rows["scores_K"] = scores
        for name in ("accuracy", "mean_per_class", "nll", "ece", "images", "nfe_per_image", "top5"):
            assert more["metrics"][name] == pytest.approx(report["metrics"][name], rel=1e-5), name
        assert more["settings"]["ranks"] == devices
        assert not list((tmp_path / str(devices)).glob("*rank*"))


@pytest.mark.ddp
def test_ranks_without_images_take_part(tmp_path):
    rows, report = run_processes(3, 2, tmp_path / "out")
    assert rows["id"] == ["100", "101"]
    assert report["metrics"]["images"] == 2


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
    ema._swap_models(module)  # and not the trained ones
    trained = list(DiffusionClassifier(module, Draws(4))(batch["image"][:7], batch["id"][:7]))
    assert not torch.allclose(callback.results[0].scores_K, trained[0].scores_K, rtol=1e-4)


def test_fit_classifies_every_nth_validation_and_skips_the_sanity_check():
    calls = []

    class Spy(DiffusionClassifierCallback):
        def _end(self, trainer, pl_module):
            calls.append(trainer.global_step)
            super()._end(trainer, pl_module)

    spy = Spy(draws=2, fit_images=3, every_n_validations=2)
    fitting = trainer(spy, max_steps=8, val_check_interval=2, check_val_every_n_epoch=None)
    fitting.fit(Gaussians(), loader(40), loader(6))
    assert calls == [4, 8]
    assert fitting.callback_metrics["diffclf/images"] == 3


def test_predict_needs_no_labels(tmp_path):
    callback = DiffusionClassifierCallback(draws=5, output_dir=str(tmp_path / "out"))
    trainer(callback).predict(Gaussians(), loader(6, labelled=False))
    rows, report = read(tmp_path / "out")
    assert rows["label"] == [None] * 6
    assert report["metrics"] == {"images": 6, "nfe": 6 * 5 * CLASSES}


def test_images_without_ids_do_not_depend_on_order(tmp_path):
    data = Samples(6)
    for name, order in (("a", [0, 1, 2, 3, 4, 5]), ("b", [3, 1, 5, 0, 4, 2])):
        callback = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / name))
        pairs = TensorDataset(data.images[order], data.labels[order])
        trainer(callback).test(Gaussians(), DataLoader(pairs, 4), verbose=False)
    a, b = (read(tmp_path / name)[0] for name in "ab")
    assert a["id"] == b["id"]
    np.testing.assert_allclose(a["scores_K"], b["scores_K"], rtol=1e-6)


def test_candidates_restrict_the_choice(tmp_path):
    callback = DiffusionClassifierCallback(draws=4, candidates=[2, 5], output_dir=str(tmp_path / "out"))
    trainer(callback).predict(Gaussians(), loader(6))
    rows, _ = read(tmp_path / "out")
    assert set(rows["prediction"]) <= {2, 5}
    assert rows["candidates_K"] == [[2, 5]] * 6


def test_what_was_decided_before_an_error_is_kept(tmp_path):
    data = Samples(8)
    data.labels[6] = 99
    callback = DiffusionClassifierCallback(draws=4, output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"label: 99 of image 106 belongs to no candidate, expected one of the 7"):
        trainer(callback).test(Gaussians(), DataLoader(data, 4), verbose=False)
    kept = pq.read_table(tmp_path / "out" / "predictions.rank0.parquet").to_pydict()
    assert kept["id"] == ["100", "101", "102", "103"]


def test_results_are_never_overwritten(tmp_path):
    for expected in ("out", "out-2", "out-3"):
        assert free_folder(tmp_path / "out") == tmp_path / expected
        callback = DiffusionClassifierCallback(draws=1, output_dir=str(tmp_path / "out"))
        trainer(callback).predict(Gaussians(), loader(1))
        assert (tmp_path / expected / "predictions.parquet").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 0}, "draws: 0, expected at least 1"),
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


def test_two_classifiers_side_by_side():
    cheap, dear = DiffusionClassifierCallback(draws=2, name="cheap"), DiffusionClassifierCallback(draws=9, name="dear")
    logged = trainer(cheap, dear).test(Gaussians(), loader(4), verbose=False)[0]
    assert logged["cheap/nfe_per_image"] == 2 * CLASSES
    assert logged["dear/nfe_per_image"] == 9 * CLASSES
