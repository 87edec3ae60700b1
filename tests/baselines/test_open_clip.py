"""CLIP with a ResNet as open_clip itself runs it, through our data and store; what its folders may say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import UserError
from tests.baselines.evaluation import evaluate

open_clip = pytest.importorskip("open_clip")

CLASSES = ["cat", "dog", "owl"]
SIZES = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
PREPARED = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A folder as open_clip writes it, beside a config.json of timm, as in the repositories of OpenAI's ResNets."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    model = open_clip.CLIP(**SIZES).eval()
    for name, value in model.state_dict().items():  # as made, all images look alike
        if value.ndim > 1:
            torch.nn.init.normal_(value, std=value[0].numel() ** -0.5)
        elif name.endswith("running_mean"):
            torch.nn.init.normal_(value)
        elif "bn" in name and name.endswith("weight"):
            torch.nn.init.ones_(value)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    write(folder, SIZES)
    (folder / "config.json").write_text(json.dumps({"architecture": "resnet50_clip", "pretrained_cfg": {}}))
    return folder


def write(folder: Path, sizes) -> None:
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": PREPARED}))


def test_it_is_open_clips_own_zero_shot(clip, tmp_path):
    """Whole evaluations: what open_clip's loader, transform, tokenizer and forward give for the same files."""
    rng = np.random.default_rng(1)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (4, 5, 3)).astype(np.uint8)
            Image.fromarray(pixels).resize((50, 41)).save(tmp_path / "photos" / name / f"{number}.png")
    data = ZeroShotDataModule(root=str(tmp_path / "photos"), num_workers=0)
    rows, report = evaluate(tmp_path / "out", ZeroShotCLIP(str(clip)), data)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{clip}")
    tokens = open_clip.get_tokenizer(f"local-dir:{clip}")([f"a photo of a {name}." for name in CLASSES])
    files = [path for name in CLASSES for path in sorted((tmp_path / "photos" / name).iterdir())]
    with torch.no_grad():
        images, texts, scale = model.eval()(torch.stack([transform(Image.open(path)) for path in files]), tokens)
    logits = (scale * images @ texts.T).numpy()
    assert logits.std(0).min() > 0.01  # random, but not blind
    assert np.allclose(-np.array(rows["scores_K"]), logits, atol=1e-4)
    assert rows["prediction"] == logits.argmax(1).tolist()
    assert report["metrics"]["nfe_per_image"] == 1


def test_a_file_of_weights_for_an_architecture_by_name(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", SIZES)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-gelu", SIZES | {"quick_gelu": False})
    weights = load_file(clip / "open_clip_model.safetensors")
    trained = {"epoch": 3, "state_dict": {f"module.{name}": value for name, value in weights.items()}}
    torch.save(trained, tmp_path / "epoch_3.pt")
    whole, one, other = (
        ZeroShotCLIP(str(clip), class_names=CLASSES),
        ZeroShotCLIP(str(tmp_path / "epoch_3.pt"), class_names=CLASSES, architecture="tiny"),
        ZeroShotCLIP(str(tmp_path / "epoch_3.pt"), class_names=CLASSES, architecture="tiny-gelu"),
    )
    assert one.identity()["network"] == whole.identity()["network"] != other.identity()["network"]
    assert one.identity()["normalised"] != whole.identity()["normalised"]  # OpenAI's, where no file says another
    one.towers.mean, one.towers.std = whole.towers.mean, whole.towers.std
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(one.logits(images), whole.logits(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_cfg": {"hf_model_name": "evil/code"}}, "has hf_model_name, expected a CLIP with towers of open_clip"),
        ({"vision_cfg": {"timm_model_name": "hf-hub:evil/code"}}, "has timm_model_name"),
        ({"vision_cfg": SIZES["vision_cfg"] | {"depth": 3}}, "describes no CLIP"),
        ({"embed_dim": 24}, "does not fit the network as"),
        ({"vision_cfg": SIZES["vision_cfg"] | {"layers": [1, 1, 1, 2]}}, r"visual\.layer4\.1.* is missing there, and"),
        ({"vision_cfg": None}, "describes no CLIP"),
    ],
)
def test_folders_that_are_refused(clip, tmp_path, change, message):
    (tmp_path / "open_clip_model.safetensors").symlink_to(clip / "open_clip_model.safetensors")
    write(tmp_path, SIZES | change)
    with pytest.raises(UserError, match=message):
        _ = ZeroShotCLIP(str(tmp_path)).model


def test_what_is_missing(clip, tmp_path, monkeypatch):
    write(tmp_path, SIZES)
    with pytest.raises(UserError, match=r"no weights in .*, expected open_clip_model.safetensors or open_clip"):
        _ = ZeroShotCLIP(str(tmp_path)).model
    with pytest.raises(UserError, match="architecture: 'RN5', expected one that open_clip has"):
        _ = ZeroShotCLIP("x.pt", architecture="RN5").model
    with pytest.raises(UserError, match=r"pretrained: no file .x\.pt., expected weights of RN50"):
        _ = ZeroShotCLIP("x.pt", architecture="RN50").model
    with pytest.raises(UserError, match="14 tokens, but the tokenizer takes 12; it would be cut to 'cat cat"):
        ZeroShotCLIP(str(clip), "{}" + " cat" * 11, ["cat"]).logits(torch.zeros(1, 3, 32, 32))
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(UserError, match=r"needs it \(pip install 'lightning-diffclf\[baselines\]'"):
        _ = ZeroShotCLIP(str(clip)).model
