"""Features are what the layer gives; each image is computed once; a head that is trained on them learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from lightning_diffclf import ClassConditionalDiT, NoiseSchedule
from lightning_diffclf.baselines.feature_cache import FeatureCache
from lightning_diffclf.baselines.sd_features import DenoiserFeatures, Extractor, as_map, resnet_head, unconditional
from lightning_diffclf.commands import main
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.digit_scenes import DigitScenesDataModule
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.features import timestep_at
from tests.baselines.evaluation import evaluate, trainer

SD = str(Path(__file__).parents[2] / "assets" / "sd_digits")


def scenes(count: int) -> torch.Tensor:
    data = DigitScenesDataModule()
    data.setup()
    return data.test.parts["image"][:count]


def dit(folder: Path, **settings) -> str:
    """A checkpoint of random weights, in Lightning's form."""
    tiny = {"hidden_size": 24, "depth": 3, "num_heads": 2, "num_classes": 10, "input_size": 8, "patch_size": 2}
    module = ClassConditionalDiT(**tiny | {"in_channels": 1, "latents": False, "learn_sigma": False} | settings)
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(saved | {"pytorch-lightning_version": "2.6.6"}, folder / "dit.ckpt")
    return str(folder / "dit.ckpt")


def test_features_of_stable_diffusion_are_those_of_its_own_parts():
    """The empty prompt, t = 100 and the mid-block, by diffusers alone."""
    images = scenes(3)
    found = Extractor(unconditional(SD, None, "float32"))
    pipeline = StableDiffusionPipeline.from_pretrained(SD, torch_dtype=torch.float32)
    seen: list[torch.Tensor] = []
    pipeline.unet.mid_block.register_forward_hook(lambda part, inputs, output: seen.append(output))
    with torch.no_grad():
        x0 = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        x_t = pipeline.scheduler.alphas_cumprod[100].sqrt() * x0
        text = pipeline.encode_prompt("", "cpu", 1, False)[0].expand(3, -1, -1)
        pipeline.unet(x_t, 100, text)
    assert (found.layer, found.timestep, found.channels) == ("mid_block", 100, 48)
    torch.testing.assert_close(found(images), seen[0], atol=5e-3, rtol=2e-3)  # kept in half precision


def test_features_of_a_dit_are_tokens_in_rows_for_the_null_label(tmp_path):
    extractor = Extractor(unconditional(dit(tmp_path), None, "auto"), "net.blocks.0", 500)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    net, schedule = extractor.denoiser.network.net, NoiseSchedule.linear()
    t = torch.full((2,), 500)
    seen: list[torch.Tensor] = []
    hook = net.blocks[0].register_forward_hook(lambda part, inputs, output: seen.append(output))
    with torch.no_grad():
        net(schedule.alpha(t).float().view(-1, 1, 1, 1) * images, t, torch.full((2,), 10))
    hook.remove()
    found = extractor(images)
    assert found.shape == (2, 24, 4, 4)
    torch.testing.assert_close(found[:, :, 1, 2], seen[0][:, 1 * 4 + 2], atol=5e-3, rtol=2e-3)
    assert Extractor(unconditional(dit(tmp_path), None, "auto")).layer == "net.blocks.1"


def test_a_tenth_of_the_time_axis():
    assert timestep_at(NoiseSchedule.linear(), 0.1) == 100
    assert timestep_at(NoiseSchedule.rectified_flow(), 0.1) == pytest.approx(0.1, abs=1e-3)
    assert timestep_at(NoiseSchedule.rectified_flow(noise_at=0), 0.1) == pytest.approx(0.9, abs=1e-3)


def test_maps():
    x0 = torch.zeros(1, 4, 4, 8)
    assert as_map(torch.zeros(1, 5, 2, 4), x0).shape == (1, 5, 2, 4)
    assert as_map(torch.zeros(1, 5), x0).shape == (1, 5, 1, 1)
    assert as_map(torch.zeros(1, 8, 5), x0).shape == (1, 5, 2, 4)
    with pytest.raises(ValueError, match=r"layer: it gives \(1, 9, 5\), expected maps, or a token for each patch"):
        as_map(torch.zeros(1, 9, 5), x0)


def test_the_head_has_the_paper_s_widths():
    with torch.device("meta"):
        widths = [p.shape[0] for n, p in resnet_head(1024, 37).named_parameters() if n.endswith("conv2.weight")]
    assert widths == [1280, 1280, 2560, 2560, 2560, 2560]
    assert resnet_head(8, 3)(torch.zeros(2, 8, 8, 8)).shape == (2, 3)


def test_a_head_learns_and_each_image_is_seen_once(tmp_path, monkeypatch):
    seen: list[str] = []
    own = Extractor.__call__

    def counted(self, images):
        seen.extend(content_ids(images))
        return own(self, images)

    def module():
        torch.manual_seed(0)
        return DenoiserFeatures(SD, head="linear", num_classes=10, lr=2e-2, cache=str(tmp_path / "features"))

    first = module()
    monkeypatch.setattr(Extractor, "__call__", counted)
    trainer(max_steps=10, limit_val_batches=0).fit(first, DigitScenesDataModule(batch_size=64))
    assert len(seen) == len(set(seen)) == 640
    trainer(max_steps=80, limit_val_batches=0).fit(again := module(), DigitScenesDataModule(batch_size=64))
    assert len(seen) == len(set(seen)) == 1437 + 1  # what the first training has computed, the second one reads
    _, report = evaluate(tmp_path / "out", again, DigitScenesDataModule())
    assert report["metrics"]["accuracy"] > 0.5  # chance is 0.1
    assert report["metrics"]["nfe_per_image"] == 1
    assert not any("extractor" in name for name in again.state_dict())


def test_a_cache_gives_back_what_it_was_given(tmp_path):
    keys = content_ids(torch.arange(6.0)[:, None])
    features = torch.randn(6, 3, 2, 2)
    cache = FeatureCache(tmp_path / "f", {"net": "a"})
    cache.add(keys[:4], features[:4])
    cache.flush()
    cache.add(keys[4:5], features[4:5])
    assert len(cache) == 5
    assert torch.equal(cache.get(keys[4]), features[4].half())
    again = FeatureCache(tmp_path / "f", {"net": "a"})  # as after a kill: what was in no file is gone
    assert len(again) == 4
    assert again.get(keys[4]) is None
    for key, row in zip(keys[:4], features, strict=False):
        assert torch.equal(again.get(key), row.half())
    with pytest.raises(ValueError, match="features: not finite in float16"):
        again.add(keys[5:], torch.full((1, 3, 2, 2), 1e6))


def test_bad_caches_are_refused(tmp_path):
    folder = tmp_path / "f"
    cache = FeatureCache(folder, {"net": "a", "layer": "mid"})
    cache.add(content_ids(torch.zeros(1, 2)), torch.zeros(1, 3, 2, 2))
    cache.flush()
    with pytest.raises(ValueError, match=r"those of another network \(layer differ\); give another folder"):
        FeatureCache(folder, {"net": "a", "layer": "other"})
    [path] = folder.glob("*.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"has checksum .* remove it to make it anew"):
        FeatureCache(folder, {"net": "a", "layer": "mid"})
    save_file(load_file_of(whole, tmp_path), path)
    with pytest.raises(ValueError, match="has network None"):
        FeatureCache(folder, {"net": "a", "layer": "mid"})
    path.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="cannot be read"):
        FeatureCache(folder, {"net": "a", "layer": "mid"})
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="is not empty, expected a new folder or one of features"):
        FeatureCache(folder, {"net": "a"})


def load_file_of(contents: bytes, folder: Path) -> dict[str, torch.Tensor]:
    (folder / "some.safetensors").write_bytes(contents)
    return load_file(folder / "some.safetensors")


def test_what_cannot_be_done_is_said(tmp_path):
    own = dit(tmp_path)
    for settings, message in (
        ({}, "num_classes: None, and the data do not say"),
        ({"num_classes": 2, "class_names": ["a"]}, "class_names: 1 names for num_classes = 2"),
        ({"num_classes": 2, "layer": "blocks.9"}, "layer: no layer 'blocks.9' in ClassConditionalDiT"),
        ({"num_classes": 2, "timestep": 1000}, r"timestep: 1000, expected 0 … 999"),
        ({"num_classes": 2, "head": "svm"}, r"head: 'svm', expected one of \['linear', 'resnet'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            DenoiserFeatures(own, **settings)
    with pytest.raises(ValueError, match="without label dropout, expected one with a null label"):
        DenoiserFeatures(dit(tmp_path, class_dropout_prob=0.0), num_classes=10)
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        DenoiserFeatures("nothing.ckpt", num_classes=10)
    with pytest.raises(ValueError, match="num_classes: 9, but the data have 10 classes"):
        evaluate(tmp_path / "out", DenoiserFeatures(dit(tmp_path), num_classes=9), DigitsDataModule())


def test_features_of_a_checkpoint_are_trained_on_from_the_command_line(tmp_path, monkeypatch):
    """Where the module is made while Lightning keeps the arguments of another."""
    monkeypatch.chdir(tmp_path)
    given = ["--model.num_classes=null", "--model.layer=net.blocks.0", f"--model.pretrained={dit(tmp_path)}"]
    small = [
        "--trainer.max_steps=1",
        "--trainer.limit_val_batches=0",
        "--trainer.accelerator=cpu",
        "--data.batch_size=8",
    ]
    main(
        ["fit", "--config=sd_features_digits.yaml", "--config=on_pixel_digits.yaml", *given, *small, "--run_dir=runs/f"]
    )
    assert len(list((tmp_path / "runs" / "f" / "features").glob("*.safetensors"))) == 1
    main(["evaluate", "--ckpt=runs/f/checkpoints/last.ckpt", "--trainer.limit_test_batches=1"])
    report = json.loads((tmp_path / "runs" / "f" / "evaluation" / "metrics.json").read_text())
    assert report["metrics"]["images"] == 60


def test_the_index_says_what_features_are_of(tmp_path):
    module = DenoiserFeatures(dit(tmp_path), num_classes=10, layer="net.blocks.2")
    FeatureCache(tmp_path / "f", module.extractor)
    index = json.loads((tmp_path / "f" / "index.json").read_text())
    assert index["network"]["layer"] == "net.blocks.2"
    assert np.isclose(index["network"]["timestep"], 100)
