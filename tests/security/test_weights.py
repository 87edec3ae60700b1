"""Files of weights, pipelines and arrays run nothing, and take no more memory than they have bytes."""

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer

from lightning_diffclf import ClassConditionalDiT
from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.baselines.timm_classifier import TimmClassifier
from lightning_diffclf.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_diffclf.cli import CONFIG_KEY, evaluate, main, read_checkpoint
from lightning_diffclf.data.latents import Latents
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_checked_json
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.pipeline import load
from lightning_diffclf.models.published import is_published, load_published, read_published
from lightning_diffclf.models.weight_files import read_file
from lightning_diffclf.modules.checkpoints import trained_module
from lightning_diffclf.results.sample_quality import load_reference
from lightning_diffclf.shipped import shipped

SIZES = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
ARGUMENTS = SIZES | {"latents": False, "learn_sigma": False}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")


class Harm:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch PWNED",)


def archive(path, content: bytes) -> None:
    """A file as torch.save writes it, with another pickle in it."""
    torch.save({"a": torch.zeros(2)}, "plain.pt")
    with zipfile.ZipFile("plain.pt") as plain, zipfile.ZipFile(path, "w") as out:
        for name in plain.namelist():
            out.writestr(name, content if name.endswith("data.pkl") else plain.read(name))


PICKLES = {
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps(Harm())),
    "a pickle in a mapping": lambda path: path.write_bytes(pickle.dumps({"state_dict": Harm()})),
    "old protocol": lambda path: path.write_bytes(pickle.dumps(Harm(), protocol=0)),
    "torch's file": lambda path: archive(path, pickle.dumps({"state_dict": Harm()}, protocol=2)),
    "saved by torch": lambda path: torch.save({"state_dict": {}, "hyper_parameters": Harm()}, path),
    "saved by an old torch": lambda path: torch.save({"a": Harm()}, path, _use_new_zipfile_serialization=False),
    "another function": lambda path: archive(path, b"\x80\x02cbuiltins\nexec\nX\x01\x00\x00\x00x\x85R."),
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".safetensors"])
def test_pickles_run_nothing(name, suffix):
    path = Path(f"evil{suffix}")
    PICKLES[name](path)
    readers = [read_file, read_checkpoint, read_published, trained_module, AtomicCheckpointIO().load_checkpoint]
    for read in readers:
        with pytest.raises(UserError, match="cannot be read"):
            read(path)
    commands = [(evaluate, []), (main, ["sample", "--out=x.png"]), (main, ["export", "--out=x"])]
    for command, args in commands:
        with pytest.raises(SystemExit) as exit_info:
            command([*args, f"--ckpt={path}"])
        assert "cannot be read" in str(exit_info.value.code)
        assert "weights_only" not in str(exit_info.value.code)
    assert not Path("PWNED").exists()


def test_resuming_unpickles_nothing():
    model = ClassConditionalDiT(**ARGUMENTS)
    torch.save({"state_dict": model.state_dict(), "callbacks": Harm()}, "last.ckpt")
    trainer = Trainer(accelerator="cpu", logger=False, plugins=[AtomicCheckpointIO()], enable_checkpointing=False)
    for weights_only in (None, False):
        with pytest.raises(UserError, match="cannot be read"):
            trainer.fit(model, [], ckpt_path="last.ckpt", weights_only=weights_only)
    assert not Path("PWNED").exists()


# --- hyperparameters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 2**20},
        {"depth": 2**20},
        {"num_classes": 2**40},
        {"input_size": 2**20},
        {"input_size": [2**20, 1]},
        {"mlp_ratio": 1e9},
        {"vae": {"class_path": "os.system"}},
        {"hidden_size": "os.system"},
        {"num_heads": 0},
        {"depth": -1},
        {"class_names": [["a"], {"b": 1}]},
        {"schedule": "__class__"},
        {"betas": torch.zeros(2)},
    ],
)
def test_hyperparameters_are_values(changed):
    model = ClassConditionalDiT(**ARGUMENTS)
    weights = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams) | changed}
    torch.save(weights, "evil.ckpt")
    for command in (["sample", "--out=x.png"], ["export", "--out=x"]):
        with pytest.raises(SystemExit) as exit_info:
            main([*command, "--ckpt=evil.ckpt"])
        assert str(exit_info.value.code).startswith("error: ")
    assert sorted(path.name for path in Path().iterdir()) == ["evil.ckpt"]


def test_a_class_to_make_is_not_made():
    model = ClassConditionalDiT(**ARGUMENTS)
    for path in ("os.system", "lightning.pytorch.cli.instantiate_module"):
        harm = {"_instantiator": path, "_class_path": "evil.Model", "command": "touch PWNED"}
        torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams) | harm}, "evil.ckpt")
        assert type(trained_module("evil.ckpt")) is ClassConditionalDiT
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    "found",
    [
        {"state_dict": [1]},
        {"state_dict": {"a": "b"}},
        {"state_dict": {}, "hyper_parameters": [1]},
        {"state_dict": None},
        {1: 2, "state_dict": 3},
        {CONFIG_KEY: "data: {}"},
        [1],
    ],
)
def test_checkpoints_of_another_kind_are_one_error(found):
    torch.save(found, "strange.ckpt")
    for command, args in ((evaluate, []), (main, ["sample", "--out=x.png"]), (main, ["export", "--out=x"])):
        with pytest.raises(SystemExit) as exit_info:
            command([*args, "--ckpt=strange.ckpt"])
        assert str(exit_info.value.code).startswith("error: checkpoint: 'strange.ckpt'")


# --- bombs ---------------------------------------------------------------------------------------------------------


def refused_in_little_memory(read, match) -> None:
    tracemalloc.start()
    with pytest.raises(UserError, match=match):
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def test_a_tensor_of_one_value_does_not_fill_the_memory():
    weights = ClassConditionalDiT(**ARGUMENTS).net.state_dict()
    weights["pos_embed"] = torch.zeros(1, dtype=torch.float16).expand(2**20, 2**20)
    torch.save(weights, "bomb.pt")
    assert Path("bomb.pt").stat().st_size < 2**20
    refused_in_little_memory(lambda: read_published("bomb.pt"), "not as many values")
    torch.save({"a": torch.sparse_coo_tensor(torch.zeros(1, 1), torch.ones(1), (2**40,))}, "sparse.pt")
    refused_in_little_memory(lambda: read_published("sparse.pt"), "not dense")
    torch.save({"a": torch.empty(2**40, device="meta")}, "meta.pt")
    refused_in_little_memory(lambda: read_published("meta.pt"), "not dense")


def test_a_compressed_archive_does_not_fill_the_memory():
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as out, out.open("bomb/data.pkl", "w") as file:
        for _ in range(256):
            file.write(bytes(2**20))
    assert Path("bomb.pt").stat().st_size < 2**20
    refused_in_little_memory(lambda: read_file(Path("bomb.pt")), "compressed or larger than the file")
    refused_in_little_memory(lambda: is_published("bomb.pt"), "compressed or larger than the file")


def test_safetensors_that_claim_too_much():
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    for content in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**62), b"", b"\xff" * 64):
        Path("bomb.safetensors").write_bytes(content)
        refused_in_little_memory(lambda: read_file(Path("bomb.safetensors")), "cannot be read")


# --- arrays --------------------------------------------------------------------------------------------------------


def test_arrays_hold_no_objects():
    harm = np.array([Harm()], dtype=object)
    np.savez("evil.npz", mu=harm, sigma=harm, features=harm)
    with pytest.raises(UserError):
        load_reference(Path("evil.npz"))
    Path("evil.npz").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError):
        load_reference(Path("evil.npz"))
    assert not Path("PWNED").exists()


def latents(folder="latents") -> Path:
    """A folder of two latents."""
    index = {
        "source": "x", "chunk_ends": [2], "shape": [1, 2, 2], "size": 16, "vae": "v", "fingerprint": "f",
        "scaling": 1.0, "shift": 0.0, "classes": ["a"], "complete": True, "kind": "diffclf latents 1",
    }  # fmt: skip
    Path(folder).mkdir()
    Path(folder, "index.json").write_text(json.dumps(index))
    np.save(Path(folder, "moments.npy"), np.zeros((2, 2, 2, 2, 2), dtype="<f2"))
    np.save(Path(folder, "labels.npy"), np.zeros((2, 2), dtype="<i8"))
    return Path(folder)


def test_latents_hold_no_objects():
    folder = latents()
    assert len(Latents(str(folder))) == 2
    np.save(folder / "labels.npy", np.full((2, 2), Harm()), allow_pickle=True)
    with pytest.raises(UserError, match="is damaged"):
        Latents(str(folder))
    for content in (pickle.dumps(Harm()), b"", b"\x93NUMPY"):
        (folder / "labels.npy").write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            Latents(str(folder))
    with open(folder / "labels.npy", "wb") as file:
        np.savez(file, a=np.zeros(1))
    with pytest.raises(UserError, match="is damaged"):
        Latents(str(folder))
    assert not Path("PWNED").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chunk_ends", []),
        ("chunk_ends", [0]),
        ("chunk_ends", [2, 1]),
        ("chunk_ends", ["2"]),
        ("chunk_ends", 2),
        ("shape", [1, 2]),
        ("shape", "abc"),
        ("shape", [1, -2, -2]),
        ("size", "16"),
        ("scaling", "pipe:touch PWNED"),
        ("scaling", float("nan")),
        ("classes", [1]),
        ("network_classes", [[0], "a"]),
        ("complete", "yes"),
        ("vae", 3),
        ("what", 3),
    ],
)
def test_an_index_of_latents_holds_values(name, value):
    folder = latents()
    values = read_checked_json(folder / "index.json") | {name: value}
    (folder / "index.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="cannot be read"):
        Latents(str(folder))
    (folder / "index.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read"):
        Latents(str(folder))
    (folder / "index.json").write_text("3")
    with pytest.raises(UserError, match="cannot be read"):
        Latents(str(folder))


# --- pipelines -----------------------------------------------------------------------------------------------------

CODE = "open('PWNED', 'w')\nclass Evil:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Evil"]},
        {"_class_name": None},
        {"_class_name": "evil.Evil"},
        {"_class_name": "StableDiffusionPipeline", "unet": ["evil", "Evil"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["evil_module", "Evil"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["os", "system"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "DiffusionPipeline"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "AutoModel"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["transformers", "AutoModel"]},
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers"]},
        {"_class_name": "StableDiffusionPipeline", "unet": []},
        {"_class_name": "StableDiffusionPipeline", "unet": [["diffusers"], "UNet2DConditionModel"]},
        {"_class_name": "StableDiffusionPipeline", "../unet": ["diffusers", "UNet2DConditionModel"]},
        [],
    ],
)
def test_pipelines_bring_no_code(index, monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("evil_module.py").write_text(CODE)
    for folder in ("pipe", "pipe/unet"):
        Path(folder).mkdir()
        Path(folder, "evil.py").write_text(CODE)
        Path(folder, "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil.Evil"}}))
        Path(folder, "model_index.json").write_text(json.dumps({"_class_name": ["evil", "Evil"]}))
    Path("pipe/model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="expected"):
        load("pipe")
    assert not Path("PWNED").exists()


def test_a_pipeline_of_the_hub_is_looked_at_before_it_is_made(monkeypatch):
    from diffusers import DiffusionPipeline

    def forbidden(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *a, **k: {"_class_name": ["pipeline", "Evil"]})
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", forbidden)
    with pytest.raises(UserError, match=r"is a pipeline \['pipeline', 'Evil'\]"):
        load("somebody/evil")


def test_an_autoencoder_brings_no_code():
    Path("vae").mkdir()
    Path("vae/evil.py").write_text(CODE)
    Path("vae/config.json").write_text(json.dumps({"_class_name": ["evil", "Evil"], "auto_map": {"AutoModel": "evil"}}))
    Path("vae/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match="vae: 'vae' cannot be loaded"):
        Autoencoder.load("vae")
    assert not Path("PWNED").exists()


def test_a_published_folder_brings_no_code():
    model = ClassConditionalDiT(**ARGUMENTS)
    Path("dit/transformer").mkdir(parents=True)
    Path("dit/scheduler").mkdir()
    Path("dit/transformer/evil.py").write_text(CODE)
    config = {
        "_class_name": "DiTTransformer2DModel", "norm_type": "ada_norm_zero", "activation_fn": "gelu-approximate",
        "num_attention_heads": 2, "sample_size": 8,
    }  # fmt: skip
    Path("dit/transformer/config.json").write_text(json.dumps(config))
    Path("dit/transformer/x.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match="cannot be read"):
        load_published(model.net, model.schedule, "dit")
    assert not Path("PWNED").exists()
    shutil.rmtree("dit")
    buffer = io.BytesIO()
    torch.save({CONFIG_KEY: "data: {class_path: os.system}"}, buffer)
    Path("published.pt").write_bytes(buffer.getvalue())
    with pytest.raises(SystemExit, match="has no weights of a DiT"):
        evaluate(["--ckpt=published.pt"])


def pickled_timm(folder: Path, pickled) -> None:
    told = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(told))
    pickled(folder / "pytorch_model.bin")
    _ = TimmClassifier(f"local-dir:{folder}").net


def pickled_clip(folder: Path, pickled) -> None:
    shutil.copytree(shipped("assets/clip_digits"), folder)
    (folder / "model.safetensors").unlink()
    pickled(folder / "pytorch_model.bin")
    _ = ZeroShotCLIP(str(folder), class_names=["a", "b"]).model


def pickled_open_clip(folder: Path, pickled) -> None:
    pytest.importorskip("open_clip")
    vision = {"image_size": 8, "patch_size": 4, "layers": 1, "width": 8, "head_width": 4}
    text = {"context_length": 8, "vocab_size": 10, "width": 8, "heads": 2, "layers": 1}
    folder.mkdir()
    told = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(told))
    pickled(folder / "open_clip_pytorch_model.bin")
    _ = ZeroShotCLIP(str(folder)).model


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("load_one", [pickled_timm, pickled_clip, pickled_open_clip])
def test_pickles_of_other_classifiers_run_nothing(load_one, name):
    with pytest.raises(UserError, match="evil"):
        load_one(Path("evil"), PICKLES[name])
    assert not Path("PWNED").exists()
