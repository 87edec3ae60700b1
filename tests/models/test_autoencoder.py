import pytest
import torch

from lightning_diffclf.models.autoencoder import Autoencoder
from tests.photos import autoencoder


@pytest.fixture
def folder(tmp_path):
    autoencoder(tmp_path / "pipeline" / "vae")
    return tmp_path / "pipeline" / "vae"


@torch.no_grad()
def test_it_is_diffusers_own(folder):
    theirs, ours = autoencoder(folder), Autoencoder.load(str(folder))
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = theirs.encode(images).latent_dist
    mean, std = ours.moments(images)
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    assert (ours.channels, ours.factor, ours.scaling, ours.shift) == (4, 8, 0.5, 0.1)
    latents = ours.to_latents(mean)
    torch.testing.assert_close(latents, (posterior.mean - 0.1) * 0.5)
    torch.testing.assert_close(
        ours.decode(latents), theirs.decode(posterior.mean).sample.clamp(-1, 1), atol=1e-5, rtol=0
    )
    assert not any(p.requires_grad for p in ours.vae.parameters())


def test_half_precision_gives_float32(folder):
    ours = Autoencoder.load(str(folder), dtype=torch.bfloat16)
    images = torch.zeros(1, 3, 16, 16)
    mean, std = ours.moments(images)
    assert {mean.dtype, std.dtype, ours.decode(mean).dtype} == {torch.float32}
    torch.testing.assert_close(mean, Autoencoder.load(str(folder)).moments(images)[0], atol=0.05, rtol=0.05)


def test_the_folder_of_a_pipeline_will_do(folder):
    ours, again = Autoencoder.load(str(folder)), Autoencoder.load(str(folder.parent))
    assert ours.fingerprint == again.fingerprint
    with torch.no_grad():
        next(again.vae.parameters()).add_(1)
    assert Autoencoder(again.vae).fingerprint != ours.fingerprint


def test_mistakes_are_told(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for long
    with pytest.raises(ValueError, match=r"vae: no folder 'no/such', and the Hub did not give it .*sd-vae-ft-ema"):
        Autoencoder.load("no/such")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        Autoencoder.load(str(tmp_path / "empty"))
    for shape in ((1, 1, 16, 16), (1, 3, 20, 16)):
        with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\), sides multiples of 8"):
            Autoencoder.load(str(folder)).moments(torch.zeros(shape))
