import argparse
import json
import pickle
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

from lightning_diffclf import ClassConditionalDiT, DiT, NoiseSchedule
from lightning_diffclf.models.export import export_pipeline, to_diffusers
from lightning_diffclf.models.published import is_published, load_published, read_published
from tests.conftest import GOLDEN
from tests.photos import autoencoder

SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "depth": 2, "num_heads": 4}


def network(seed=0, **settings):
    net = DiT(**SIZES | {"num_classes": 10} | settings).eval()
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return net


def inputs(count=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 4, 8, 8, generator=generator)
    return x, torch.tensor([0, 3, 250, 700, 999][:count]), torch.tensor([0, 9, 10, 5, 10][:count])  # 10: the null label


def as_published(model):
    """The frequencies that the published networks were trained with; see to_diffusers."""
    for module in model.modules():
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
    return model.eval()


@pytest.mark.parametrize("learn_sigma", [True, False])
@torch.no_grad()
def test_equal_to_diffusers_own_forward(learn_sigma, tmp_path):
    net, (x, t, y) = network(learn_sigma=learn_sigma), inputs()
    expected = net(x, t, y)
    theirs = as_published(to_diffusers(net))
    torch.testing.assert_close(theirs(x, timestep=t, class_labels=y).sample, expected, rtol=1e-4, atol=1e-5)
    # and the way back, from a network that diffusers made
    theirs = as_published(
        DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learn_sigma else 4,
            num_layers=2,
            sample_size=8,
            num_embeds_ada_norm=10,
            norm_eps=1e-6,
        )
    )
    generator = torch.Generator().manual_seed(2)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    first = theirs.transformer_blocks[0].norm1.emb
    theirs.transformer_blocks[1].norm1.emb.load_state_dict(first.state_dict())  # copies of one, as in published folders
    theirs.save_pretrained(tmp_path / "transformer")
    ours = DiT(**SIZES, num_classes=10, learn_sigma=learn_sigma).eval()
    load_published(ours, NoiseSchedule.linear(), tmp_path)
    torch.testing.assert_close(ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_how_far_diffusers_frequencies_are(tmp_path):
    """What the docstring of to_diffusers says about a DiTPipeline as it is."""
    net, (x, t, y) = network(), inputs()
    theirs = to_diffusers(net).eval()
    difference = theirs(x, timestep=t, class_labels=y).sample - net(x, t, y)
    assert 1e-4 < difference.std() / net(x, t, y).std() < 0.5
    t = torch.zeros_like(t)  # where frequencies do not matter
    torch.testing.assert_close(theirs(x, timestep=t, class_labels=y).sample, net(x, t, y), rtol=1e-4, atol=1e-5)


def unshifted_autoencoder(folder):
    vae = autoencoder(folder)
    vae.register_to_config(shift_factor=None)
    vae.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("schedule", "written"),
    [
        (NoiseSchedule.linear(), {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}),
        (NoiseSchedule.scaled_linear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (NoiseSchedule.linear(500, prediction="v_prediction"), {"num_train_timesteps": 500}),
        (NoiseSchedule.cosine(), {}),
    ],
    ids=["linear", "scaled_linear", "short", "cosine"],
)
def test_a_pipeline_of_diffusers_and_back(schedule, written, tmp_path):
    net, folder = network(), tmp_path / "pipeline"
    vae = unshifted_autoencoder(tmp_path / "vae")
    names = [f"name {i}, synonym {i}" for i in range(10)]
    export_pipeline(net, schedule, folder, vae, names)
    pipeline = DiTPipeline.from_pretrained(folder)
    assert pipeline.get_label_ids(["synonym 3"]) == [3]
    assert {name: pipeline.scheduler.config[name] for name in written} == written
    assert pipeline.scheduler.config.prediction_type == schedule.prediction
    torch.testing.assert_close(
        pipeline.scheduler.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-3, atol=1e-7
    )
    images = pipeline([1, 2], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 64, 64, 3)
    back = read_published(folder)
    assert back.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(back[name], value)
    again = network(seed=1)
    load_published(again, schedule, folder)
    for name, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    with pytest.raises(ValueError, match="is not empty"):
        export_pipeline(net, schedule, folder, vae, names)


def test_the_pipeline_guides_a_network_of_1000_classes(tmp_path):
    vae = unshifted_autoencoder(tmp_path / "vae")
    export_pipeline(
        network(num_classes=1000), NoiseSchedule.linear(), tmp_path / "out", vae, [str(i) for i in range(1000)]
    )
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    one, two = (
        pipeline(
            [999],
            guidance_scale=scale,
            num_inference_steps=2,
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        ).images
        for scale in (1.0, 4.0)
    )
    assert (one != two).any()


@pytest.mark.parametrize("wrapped", [None, "ema", "model"])
@torch.no_grad()
def test_the_published_files(wrapped, tmp_path, golden_dit):
    weights = load_file(GOLDEN / "dit" / "dit_tiny.safetensors")
    path = tmp_path / "DiT-XL-2-8x8.pt"
    other = {name: value + 1 for name, value in weights.items()}
    settings = argparse.Namespace(image_size=64)  # which the published training scripts save too
    saved = {None: weights, "ema": {"model": other, "ema": weights}, "model": {"model": weights}}[wrapped]
    torch.save(saved | ({"opt": {}, "args": settings} if wrapped else {}), path)
    assert is_published(path)
    net = DiT(**json.loads((GOLDEN / "dit" / "dit_golden.json").read_text())["model"]).eval()
    load_published(net, NoiseSchedule.linear(), path)
    a = golden_dit.arrays
    torch.testing.assert_close(net(a["x"], a["t"], a["y"]), a["out"], rtol=1e-4, atol=1e-5)
    save_file(weights, tmp_path / "weights.safetensors")
    assert is_published(tmp_path / "weights.safetensors")
    for name, value in read_published(tmp_path / "weights.safetensors").items():
        assert torch.equal(value, weights[name])


@torch.no_grad()
def test_sit(tmp_path):
    """SiT by its own convention: x_t = t x0 + (1 - t) noise, the network is given t and says d x_t / d t."""
    theirs, (x0, _, y) = network(learn_sigma=True), inputs()
    torch.save(theirs.state_dict(), tmp_path / "SiT.pt")
    settings = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    module = ClassConditionalDiT(**settings, schedule="sit", learn_sigma=False).eval()
    load_published(module.net, module.schedule, tmp_path / "SiT.pt")
    t = torch.tensor([0.001, 0.25, 0.5, 0.75, 0.999], dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    share = t.float().view(-1, 1, 1, 1)
    x_t = share * x0 + (1 - share) * noise
    torch.testing.assert_close(module.schedule.add_noise(x0, noise, t), x_t)
    velocity = theirs(x_t, t.float(), y)[:, :4]
    expected = x_t - share * velocity  # if velocity is x0 - noise, this is the noise
    inputs_, time = module.schedule.network_rows(x_t, t)
    output = module.predict(inputs_, time, y)
    torch.testing.assert_close(module.schedule.to_epsilon(output, x_t, t), expected, rtol=1e-4, atol=1e-5)
    perfect = module.schedule.to_epsilon(x0 - noise, x_t, t)
    torch.testing.assert_close(perfect, noise, rtol=1e-3, atol=1e-4)


def written(tmp_path, net=None):
    path = tmp_path / "weights.pt"
    torch.save((net or network()).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_size": 16}, "input_size: 8 there, 16 here"),
        ({"input_size": (8, 16)}, "input_size: 8 there, that of 32 tokens here"),
        ({"patch_size": 4}, "input_size: 16 there, 8 here|patch_size: 2 there, 4 here"),
        ({"in_channels": 3}, "in_channels: 4 there, 3 here"),
        ({"hidden_size": 64, "depth": 3}, "hidden_size: 32 there, 64 here; depth: 2 there, 3 here"),
        ({"depth": 1}, "depth: 2 there, 1 here"),
        ({"mlp_ratio": 2.0}, "mlp_ratio: 4.0 there, 2.0 here"),
        ({"num_classes": 1000}, r"rows for classes \(one more with the null label\): 11 there, 1001 here"),
        ({"class_dropout_prob": 0.0}, "11 there, 10 here"),
        ({"learn_sigma": False}, r"output channels \(doubled by learn_sigma\): 8 there, 4 here"),
    ],
)
@pytest.mark.parametrize("form", ["file", "folder"])
def test_other_sizes_are_refused(form, settings, message, tmp_path):
    path = written(tmp_path)
    if form == "folder":  # which holds no position codes, so shapes alone do not show the input's size
        path = tmp_path / "folder"
        to_diffusers(network()).save_pretrained(path / "transformer")
    net = network(seed=1, **settings)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_published(net, NoiseSchedule.linear(), path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_folders_of_two_sizes_are_told_apart(tmp_path):
    """Their weights have the same shapes: position codes are not stored."""
    large = network(input_size=16)
    to_diffusers(large).save_pretrained(tmp_path / "transformer")
    with pytest.raises(ValueError, match="input_size: 16 there, 8 here"):
        load_published(network(), NoiseSchedule.linear(), tmp_path)
    again = network(seed=1, input_size=16)
    load_published(again, NoiseSchedule.linear(), tmp_path)
    for name, value in large.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_missing_and_unknown_tensors_are_named(tmp_path):
    weights = network().state_dict()
    torch.save({name: value for name, value in weights.items() if name != "blocks.1.mlp.fc2.bias"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"1 tensors are missing there, such as blocks.1.mlp.fc2.bias"):
        load_published(network(), NoiseSchedule.linear(), tmp_path / "a.pt")
    torch.save(weights | {"blocks.1.attn.q_norm.weight": torch.ones(8)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"1 tensors are unknown here, such as blocks.1.attn.q_norm.weight"):
        load_published(network(), NoiseSchedule.linear(), tmp_path / "b.pt")
    torch.save(weights | {"blocks.1.attn.proj.bias": torch.ones(8)}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"blocks.1.attn.proj.bias is \(8,\) there and \(32,\) here"):
        load_published(network(), NoiseSchedule.linear(), tmp_path / "c.pt")


def test_what_is_no_dit_is_refused(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    for content, message in (
        (pickle.dumps(Harm()), "cannot be read"),
        (b"", "cannot be read"),
        (written(tmp_path).read_bytes()[:2000], "cannot be read"),
    ):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_published(tmp_path / "bad.pt")
        assert "\n" not in str(error.value)
    torch.save({"state": Harm()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"it holds (_?io.open|builtins.open|open), expected weights only") as error:
        is_published(tmp_path / "bad.pt")
    assert "weights_only" not in str(error.value)  # torch's advice is to run the code
    assert not (tmp_path / "harm").exists()
    torch.save(network().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert read_published(tmp_path / "old.pt").keys() == network().state_dict().keys()
    torch.save([1, 2], tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="holds a list, expected weights by name"):
        read_published(tmp_path / "bad.pt")
    torch.save({"conv.weight": torch.zeros(2)}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="has no weights of a DiT"):
        read_published(tmp_path / "bad.pt")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_published(tmp_path / "nothing.pt")
    changed = network().state_dict() | {"pos_embed": torch.zeros(1, 16, 32)}
    torch.save(changed, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="other position codes"):
        load_published(network(), NoiseSchedule.linear(), tmp_path / "bad.pt")


def test_folders_that_do_not_fit_are_refused(tmp_path):
    folder = tmp_path / "pipeline"
    to_diffusers(network()).save_pretrained(folder / "transformer")
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="predicts 'v_prediction', expected 'epsilon'"):
        load_published(network(), NoiseSchedule.linear(), folder)
    load_published(network(), NoiseSchedule.linear(prediction="v_prediction"), folder)
    with pytest.raises(ValueError, match="has other noise levels than the schedule as configured"):
        load_published(network(), NoiseSchedule.cosine(prediction="v_prediction"), folder)
    (folder / "scheduler" / "scheduler_config.json").write_text('{"_class_name": "OtherScheduler"}')
    with pytest.raises(ValueError, match="has a 'OtherScheduler', expected a scheduler of diffusers"):
        load_published(network(), NoiseSchedule.linear(), folder)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match="has 4 heads, expected 2"):
        load_published(network(num_heads=2), NoiseSchedule.linear(), folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    theirs = {name: value.clone() for name, value in load_file(weights).items()}  # not a view of the file
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    save_file(theirs | {name: theirs[name] + 1}, weights)
    with pytest.raises(ValueError, match=r"another timestep_embedder.linear_1 in block 1"):
        read_published(folder)
    del theirs["proj_out_1.bias"]
    save_file(theirs, weights)
    with pytest.raises(ValueError, match=r"lacks 'proj_out_1.bias'"):
        read_published(folder)
    weights.unlink()
    with pytest.raises(ValueError, match="no weights"):
        read_published(folder)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    for changed, message in (
        ({"activation_fn": "gelu"}, "has activation_fn 'gelu', expected 'gelu-approximate'"),
        ({"norm_type": "ada_norm_single"}, "has norm_type 'ada_norm_single', expected 'ada_norm_zero'"),
        ({"sample_size": None}, "has sample_size None, expected an integer"),
    ):
        file.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            read_published(folder)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config.json' cannot be read"):
        read_published(folder)
    file.write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="is a UNet2DModel, expected DiTTransformer2DModel"):
        read_published(folder)
    with pytest.raises(ValueError, match=r"has no transformer/config.json"):
        read_published(tmp_path)


def test_what_diffusers_cannot_express_is_refused(tmp_path):
    with pytest.raises(ValueError, match="squares only"):
        to_diffusers(network(input_size=(8, 16)))
    with pytest.raises(ValueError, match="has a null label"):
        to_diffusers(network(class_dropout_prob=0.0))
    with pytest.raises(ValueError, match="has discrete timesteps only"):
        export_pipeline(network(), NoiseSchedule.rectified_flow(), tmp_path / "out", "vae", [])
    with pytest.raises(ValueError, match="mlp_ratio is 2, but diffusers' network has 4"):
        to_diffusers(network(mlp_ratio=2.0))
    linear = NoiseSchedule.linear()
    with pytest.raises(ValueError, match="vae: no folder"):
        export_pipeline(network(), linear, tmp_path / "out", str(tmp_path / "none"), [])
    autoencoder(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"a shift_factor of 0.1, which DiTPipeline leaves out"):
        export_pipeline(network(), linear, tmp_path / "out", str(tmp_path / "vae"), [])
    with pytest.raises(ValueError, match="has latents of 4 channels, expected 3"):
        export_pipeline(network(in_channels=3), linear, tmp_path / "out", str(tmp_path / "vae"), [])
    assert not (tmp_path / "out").exists()
