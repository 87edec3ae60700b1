"""Published networks: equal to what the papers say they compute, on tiny twins; tests/models/published_twins.py."""

import pytest
import torch
from safetensors.torch import save_file

from lightning_diffclf import DiT
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.families import EDM2_MEAN, EDM2_STD, read_network, read_statistics
from lightning_diffclf.models.ldm_autoencoder import ldm_autoencoder
from tests.models import published_twins as twins

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def written(folder, weights, name="weights.safetensors"):
    path = folder / name
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return str(path)


def inputs(channels=4, side=8, count=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, channels, side, side, generator=generator)
    return x, torch.linspace(0.01, 0.99, count), torch.tensor([0, 3, 9, 5, 7][:count])


def noise_of(found, x_t, t, y):
    """The noise that the network sees in x_t, by the package's own way from inputs to noise."""
    given, time = found.schedule.network_rows(x_t, t)
    return found.schedule.to_epsilon(found.net(given, time, y), x_t, t)


SWITCHES = {
    "dit": {},
    "lightningdit": {"rms": True, "swiglu": True, "rope": True},
    "lightningdit_1": {"rms": True, "swiglu": True, "rope": True, "qk": True, "no_shift": True},
    "lightningdit_2": {"rope": True},
    "lightningdit_3": {"qk": True},
    "lightningdit_4": {"swiglu": True, "no_shift": True},
    "lightningdit_5": {"rms": True},
}


@pytest.mark.parametrize("name", SWITCHES)
@torch.no_grad()
def test_transformers(name, tmp_path):
    w, (x, t, y) = twins.transformer(**SWITCHES[name]), inputs()
    y[-1] = 10  # the null label
    family = name.partition("_")[0]
    found = read_network(written(tmp_path, w), family, num_heads=4)
    torch.testing.assert_close(found.net(x, t, y), twins.transformer_forward(w, x, t, y), **CLOSE)
    embedded = found.net(x, t, w["y_embedder.embedding_table.weight"][y])
    torch.testing.assert_close(embedded, found.net(x, t, y), **CLOSE)


@torch.no_grad()
def test_dit_of_safetensors_predicts_noise_and_a_variance(tmp_path):
    w, (x, _, y) = twins.transformer(sigma=True), inputs()
    found = read_network(written(tmp_path, w), "dit", num_heads=4)
    t = torch.tensor([0, 250, 500, 750, 999])
    expected = twins.transformer_forward(w, x, t, y)
    torch.testing.assert_close(found.net(x, t, y), expected, **CLOSE)
    torch.testing.assert_close(noise_of(found, x, t, y), expected[:, :4], **CLOSE)


@pytest.mark.parametrize("sigma", [True, False])
@torch.no_grad()
def test_sit_goes_from_noise_to_data(sigma, tmp_path):
    w, (x, t, y) = twins.transformer(sigma=sigma), inputs()
    path = written(tmp_path, {"model": {}, "ema": w, "opt": {}}, "SiT-XL-2-256.pt")
    found = read_network(path, "sit", num_heads=4)
    velocity = twins.transformer_forward(w, x, t, y)[:, :4]  # d x_t / d t of x_t = t x0 + (1 - t) noise
    torch.testing.assert_close(noise_of(found, x, t, y), x - t[:, None, None, None] * velocity, **CLOSE)


@torch.no_grad()
def test_repa_goes_from_data_to_noise_and_has_its_autoencoder_with_it(tmp_path):
    w, (x, t, y) = twins.transformer(qk=True), inputs()
    mean, variance = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([4.0, 9.0, 0.25, 1.0])
    beside = {"bn.running_mean": mean, "bn.running_var": variance, "bn.num_batches_tracked": torch.tensor(7)}
    beside |= {"projectors.0.0.weight": torch.zeros(3, 32)}
    vae = twins.ldm()
    path = written(tmp_path, {"ema": w | beside, "vae": vae, "discriminator": {}, "steps": 400000}, "0400000.pt")
    found = read_network(path, num_heads=4)
    velocity = twins.transformer_forward(w, x, t, y)  # d x_t / d t of x_t = (1 - t) x0 + t noise
    torch.testing.assert_close(noise_of(found, x, t, y), x + (1 - t[:, None, None, None]) * velocity, **CLOSE)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    normalised = torch.nn.functional.batch_norm(twins.ldm_encoded(vae, images), mean, variance, eps=1e-4)
    assert isinstance(found.vae, Autoencoder)
    torch.testing.assert_close(found.vae.to_latents(found.vae.moments(images)[0]), normalised, **CLOSE)
    torch.testing.assert_close(
        found.vae.decode(normalised),
        twins.ldm_decoded(vae, twins.ldm_encoded(vae, images)).clamp(-1, 1),
        rtol=1e-4,
        atol=1e-4,
    )
    other = read_network(path, num_heads=4, vae="another")
    assert other.vae == "another"
    torch.testing.assert_close(other.scale.mean, mean)


@pytest.mark.parametrize("attends", [True, False])
@torch.no_grad()
def test_autoencoders_of_latent_diffusion(attends):
    w = twins.ldm(channels=8, widths=(32, 64, 64, 32), blocks=2, attends=attends)
    vae = ldm_autoencoder(w | {"loss.logvar": torch.zeros(()), "foundation_model.x": torch.zeros(2)}, "here")
    images = torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean = twins.ldm_encoded(w, images)
    torch.testing.assert_close(vae.encode(images).latent_dist.mean, mean, **CLOSE)
    torch.testing.assert_close(vae.decode(mean).sample, twins.ldm_decoded(w, mean), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", [("mean", "std"), ("latents_bias", "latents_scale")])
@torch.no_grad()
def test_lightningdit_sees_latents_by_a_file_of_statistics(form, tmp_path):
    mean, std = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([4.0, 9.0, 0.25, 1.0])
    spread = std if form[1] == "std" else 1 / std
    statistics = {form[0]: mean.reshape(1, 4, 1, 1), form[1]: spread.reshape(1, 4, 1, 1)}
    latents = written(tmp_path, statistics, "latents_stats.pt")
    vae = twins.ldm()
    file = written(tmp_path, {"state_dict": vae | {"loss.logvar": torch.zeros(1)}}, "vavae.pt")
    w, (x, t, y) = twins.transformer(rope=True, rms=True, swiglu=True), inputs()
    found = read_network(written(tmp_path, w), None, file, latents)  # heads are told by the rotary positions
    velocity = twins.transformer_forward(w, x, t, y)
    torch.testing.assert_close(noise_of(found, x, t, y), x - t[:, None, None, None] * velocity, **CLOSE)
    own = Autoencoder.load(found.vae, scale=found.scale)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    expected = (twins.ldm_encoded(vae, images) - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(own.to_latents(own.moments(images)[0]), expected, **CLOSE)


@pytest.mark.parametrize("prefix", ["", "unet."])
@torch.no_grad()
def test_edm2(prefix, tmp_path):
    sizes = {"widths": (64, 128, 192), "blocks": 2, "attention": (4, 2)}
    w, (x, _, y) = twins.edm2(prefix=prefix, **sizes), inputs()
    found = read_network(written(tmp_path, w))
    sigma = torch.tensor([0.01, 0.2, 1.0, 5.0, 70.0])
    scale = 1 + sigma[:, None, None, None]
    x_t = x * scale
    given, time = found.schedule.network_rows(x_t, sigma)
    own = {name.removeprefix(prefix): value for name, value in w.items()}
    torch.testing.assert_close(found.net(given, time, y), twins.edm2_forward(own, given, time, y), **CLOSE)
    denoised = x_t - sigma[:, None, None, None] * noise_of(found, x_t, sigma, y)
    torch.testing.assert_close(denoised / scale, twins.edm2_denoised(own, x_t, sigma, y) / scale, **CLOSE)
    embedded = found.net(given, time, found.net.y_embedder(y))
    torch.testing.assert_close(embedded, found.net(given, time, y), **CLOSE)
    assert found.net.null_label is None


@torch.no_grad()
def test_edm2_gives_its_autoencoder_pixels_from_0_to_1(tmp_path):
    found = read_network(written(tmp_path, twins.edm2()))
    vae = twins.ldm()
    own = Autoencoder(ldm_autoencoder(vae, "here"), found.scale)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    raw = twins.ldm_encoded(vae, (images + 1) / 2)
    mean, std = (torch.tensor(one)[:, None, None] for one in (EDM2_MEAN, EDM2_STD))
    latents = own.to_latents(own.moments(images)[0])
    torch.testing.assert_close(latents, (raw - mean) / std / 2, **CLOSE)
    decoded = (twins.ldm_decoded(vae, raw) * 2 - 1).clamp(-1, 1)
    torch.testing.assert_close(own.decode(latents), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["edm2", "dit", "lightningdit_1", "lightningdit_3"])
@torch.no_grad()
def test_in_half_precision_by_autocast(name, tmp_path):
    w = twins.edm2() if name == "edm2" else twins.transformer(**SWITCHES[name])
    found = read_network(written(tmp_path, w), name.partition("_")[0], num_heads=4)
    x, t, y = inputs()
    expected = found.net(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        output = found.net(x, t, y)
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).std() < 0.05 * expected.std()


def test_a_network_on_pixels_has_no_autoencoder(tmp_path):
    assert read_network(written(tmp_path, twins.edm2(channels=3))).vae is None
    assert read_network(written(tmp_path, twins.transformer(channels=3)), "sit", num_heads=4).vae is None


def test_sizes_are_those_of_the_weights(tmp_path):
    w = twins.transformer(width=384, depth=1, heads=6, side=16, classes=3)
    net = read_network(written(tmp_path, w), "sit").net
    assert isinstance(net, DiT)
    assert (net.blocks[0].attn.num_heads, net.num_classes, net.input_size) == (6, 3, (16, 16))


@pytest.mark.parametrize(
    ("weights", "arguments", "message"),
    [
        (twins.transformer(), {}, "weights of dit and sit look the same"),
        (twins.transformer(rope=True), {"family": "sit"}, "are of family lightningdit, not of sit"),
        (twins.edm2(), {"family": "dit"}, "are of family edm2, not of dit"),
        (twins.transformer(), {"family": "ddt"}, "family: 'ddt', expected one of dit, sit"),
        (twins.transformer(), {"family": "sit"}, "is 32 wide, expected one of .*1152"),
        (twins.transformer(channels=6), {"family": "sit", "num_heads": 4}, "vae: none given"),
        (twins.edm2(classes=0), {}, "of a network without classes"),
        ({k: v for k, v in twins.edm2().items() if "out_gain" not in k}, {}, "no EDM2 network .*out_gain"),
        (twins.edm2() | {"enc.9x9_conv.weight": torch.zeros(1)}, {}, r"no EDM2 network .*resolutions \[9, 8, 4\]"),
        (twins.transformer(rope=True) | {"feat_rope.freqs_sin": torch.zeros(16, 8)}, {}, "other rotary positions"),
        (twins.transformer(rms=True) | {"blocks.1.norm3.weight": torch.zeros(1)}, {"num_heads": 4}, "unknown here"),
        ({"conv.weight": torch.zeros(1)}, {}, "has no weights of a DiT"),
    ],
    ids=range(12),
)
def test_what_cannot_be_read(weights, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_network(written(tmp_path, weights), **arguments)


def test_files_that_are_missing_or_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder 'nowhere"):
        read_network("nowhere.pt")
    with pytest.raises(FileNotFoundError, match="latents: no file"):
        read_statistics("nowhere.pt")
    with pytest.raises(ValueError, match=r"has \['x'\], expected mean and std"):
        read_statistics(written(tmp_path, {"x": torch.zeros(2)}, "stats.pt"))
    with pytest.raises(ValueError, match="no mean and positive spread"):
        read_statistics(written(tmp_path, {"mean": torch.zeros(2), "std": torch.zeros(2)}, "stats.pt"))
    with pytest.raises(ValueError, match="is a folder, which only a DiT of diffusers is"):
        read_network(tmp_path, "sit")
    with pytest.raises(ValueError, match="no autoencoder of latent diffusion"):
        Autoencoder.load(written(tmp_path, {"encoder.conv_in.weight": torch.zeros(1)}, "vae.pt"))
    statistics = written(tmp_path, {"mean": torch.zeros(2), "std": torch.ones(2)}, "two.pt")
    with pytest.raises(ValueError, match="statistics of 2 channels, expected 4"):
        Autoencoder(ldm_autoencoder(twins.ldm(), "here"), read_statistics(statistics))
