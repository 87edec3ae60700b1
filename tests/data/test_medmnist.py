"""Tiny files in the form of MedMNIST's."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.baselines.timm_classifier import TimmFromScratch
from lightning_diffclf.data.medmnist import CLASSES, MedMNISTDataModule, MedMNISTImages
from tests.baselines.evaluation import evaluate
from tests.baselines.tiny_clip import write_clip


def write(path, count=5, shape=(28, 28), labels=None, compressed=True):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count)[:, None] % 2 if labels is None else labels
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return str(path), arrays


@pytest.mark.parametrize(("name", "shape"), [("pneumoniamnist", (28, 28)), ("breastmnist_64", (64, 64, 3))])
def test_a_file_says_it_all(name, shape, tmp_path):
    path, arrays = write(tmp_path / f"{name}.npz", shape=shape)
    data = MedMNISTDataModule(path, eval_batch_size=2, num_workers=0)
    rows, report = evaluate(tmp_path / "out", ZeroShotCLIP(write_clip(tmp_path / "clip"), "a scan: {}"), data)
    assert dict(zip(map(int, rows["id"]), rows["label"], strict=True)) == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    assert report["settings"]["class_names"] == list(CLASSES[name.partition("_")[0]])
    np.testing.assert_array_equal(np.asarray(data.source[3][0]), arrays["test_images"][3])
    assert MedMNISTImages(path, "val")[0][1] == 0
    batch = next(iter(MedMNISTDataModule(path, size=28, batch_size=5, num_workers=0).train_dataloader()))
    assert sorted(batch["id"]) == list(range(5))
    if len(shape) == 2:  # as large as asked for: nothing is resized
        first = torch.from_numpy(arrays["train_images"][0]).expand(3, -1, -1)
        assert torch.equal(batch["image"][batch["id"].index(0)], first / 127.5 - 1)


def test_names_of_other_files(tmp_path):
    path, _ = write(tmp_path / "mine.npz")
    assert MedMNISTDataModule(path, class_names=["well", "ill"]).class_names == ["well", "ill"]
    with pytest.raises(ValueError, match=r"class_names: none given, and .* is no name of MedMNIST: pathmnist, "):
        _ = MedMNISTDataModule(path).source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (8, 8, 8)}, r"are uint8 \(5, 8, 8, 8\), expected uint8"),
        ({"labels": np.zeros((5, 14), np.uint8)}, r"are uint8 \(5, 14\), expected one whole number for each image"),
        ({"labels": np.full((5, 1), 7)}, "labels 7 … 7 in .*, expected 0 … 1"),
        ({"labels": np.zeros(5)}, "are float64"),
        ({"labels": np.array([{}] * 5, dtype=object)}, "cannot be read .*allow_pickle"),
    ],
    ids=range(5),
)
def test_files_of_another_kind(changes, message, tmp_path):
    path, _ = write(tmp_path / "pneumoniamnist.npz", **changes)
    with pytest.raises(ValueError, match=message):
        _ = MedMNISTDataModule(path).source


def test_files_that_are_damaged_or_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .nowhere\.npz., expected one of MedMNIST"):
        MedMNISTImages("nowhere.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ValueError, match=r"cannot be read .* expected test_images and test_labels"):
        MedMNISTImages(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="expected test_images and test_labels"):
        MedMNISTImages(tmp_path / "other.npz")


def test_a_network_is_trained_whose_classes_have_names_of_their_own(tmp_path):
    """Lightning refuses modules and data modules that log the same argument with different values."""
    path, _ = write(tmp_path / "pneumoniamnist.npz", count=6)
    data = MedMNISTDataModule(path, size=16, batch_size=6, eval_batch_size=3, num_workers=0)
    module = TimmFromScratch("test_vit", input_size=16, num_classes=2, class_names=["well", "ill"], patch_size=8)
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", max_steps=2, logger=CSVLogger(tmp_path), **quiet).fit(module, data)
    assert any(not torch.equal(value, before[name]) for name, value in module.net.state_dict().items())
