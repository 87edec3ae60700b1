"""What training wrote, through ``diffclf export``, to what diffusers reads."""

import json

import lightning as L
import pytest
import torch
from diffusers import DiTPipeline
from torch.utils.data import DataLoader, TensorDataset

from lightning_diffclf import EMA, ClassConditionalDiT
from lightning_diffclf.cli import main
from lightning_diffclf.models.published import read_published
from tests.photos import autoencoder

TINY = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 3, "lr": 1e-2}


def fit(path, ema=True, **settings):
    """A checkpoint as training writes it."""
    torch.manual_seed(0)
    module = ClassConditionalDiT(**TINY | settings)
    latents = torch.randn(16, module.image_shape[0], 8, 8).clamp(-1, 1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
        callbacks=[EMA(0.9 if ema else None)],
    )
    trainer.fit(module, DataLoader(TensorDataset(latents, torch.arange(16) % 3), batch_size=8))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    network = autoencoder(folder)
    network.register_to_config(shift_factor=None)
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, vae):
    names = ["tabby, cat", "dog", "owl"]
    return fit(tmp_path_factory.mktemp("run") / "last.ckpt", vae=vae, class_names=names)


def test_published_weights_of_a_dit_are_written_too(checkpoint, tmp_path):
    main(["export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'one'}"])
    main(["export", f"--ckpt={tmp_path / 'one'}", f"--out={tmp_path / 'two'}"])
    assert_holds(tmp_path / "two", torch.load(checkpoint, weights_only=True)["state_dict"])


def assert_holds(folder, weights):
    found = read_published(folder)
    assert {f"net.{name}" for name in found} == weights.keys()
    for name, value in found.items():
        assert torch.equal(weights[f"net.{name}"], value)


def error_of(args) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    message = str(exit_info.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_the_average_goes_out_by_default(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["export", f"--ckpt={checkpoint}", "--out=out"])
    assert "DiTPipeline: out" in capsys.readouterr().out
    saved = torch.load(checkpoint, weights_only=True)
    assert_holds(tmp_path / "out", saved["state_dict"])
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.labels == {"cat": 0, "dog": 1, "owl": 2, "tabby": 0}
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline([2], guidance_scale=1.0, num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["id2label"]["1"] == "dog"


def test_the_trained_weights_on_request(checkpoint, vae, tmp_path):
    main(["export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'raw'}", "--weights=raw"])
    saved = torch.load(checkpoint, weights_only=True)
    name = "net.blocks.0.mlp.fc1.weight"
    assert not torch.equal(saved["current_model_state"][name], saved["state_dict"][name])
    assert_holds(tmp_path / "raw", saved["current_model_state"])
    alone = fit(tmp_path / "no_average.ckpt", ema=False)  # both are the same then
    for weights in ("ema", "raw"):
        main(["export", f"--ckpt={alone}", f"--out={tmp_path / weights}2", f"--weights={weights}", f"--vae={vae}"])
        assert_holds(tmp_path / f"{weights}2", torch.load(alone, weights_only=True)["state_dict"])


def test_mistakes_are_told_in_one_line(checkpoint, vae, tmp_path):
    out = f"--out={tmp_path / 'out'}"
    assert "no file" in error_of(["export", f"--ckpt={tmp_path / 'none.ckpt'}", out])
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:1000])
    assert "cannot be read" in error_of(["export", f"--ckpt={tmp_path / 'cut.ckpt'}", out])
    torch.save({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    assert "is of no ClassConditionalDiT" in error_of(["export", f"--ckpt={tmp_path / 'other.ckpt'}", out])
    torch.save({"weight": torch.ones(1)}, tmp_path / "weights.pt")
    assert "has no weights of a DiT" in error_of(["export", f"--ckpt={tmp_path / 'weights.pt'}", out])
    pixels = fit(tmp_path / "pixels.ckpt", in_channels=1, latents=False)
    assert "works on pixels" in error_of(["export", f"--ckpt={pixels}", out])
    flow = fit(tmp_path / "flow.ckpt", schedule="sit", learn_sigma=False)
    assert "has discrete timesteps only" in error_of(["export", f"--ckpt={flow}", out, f"--vae={vae}"])
    assert "vae: no folder" in error_of(["export", f"--ckpt={checkpoint}", out, f"--vae={tmp_path / 'none'}"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "is not empty" in error_of(["export", f"--ckpt={checkpoint}", out])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("mine")
    assert "is not empty" in error_of(["export", f"--ckpt={checkpoint}", f"--out={tmp_path / 'file'}"])
