"""Each corruption against something independent, and an evaluation on corrupted images."""

import io

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from lightning_diffclf import Candidates
from lightning_diffclf.data.corruptions import KINDS, Corruption
from lightning_diffclf.data.digits import DigitsDataModule
from tests.baselines.evaluation import evaluate

IDS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth, (3, 3, 24, 40) in [-0.8, 0.8]: nothing is clipped by chance."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(3, 3, 24, 40)), (0, 0, 3, 3))
    return torch.tensor(0.8 * noise / np.abs(noise).max(), dtype=torch.float32)


def corrupted(kind: str, severity: int, images: torch.Tensor) -> np.ndarray:
    """In 0 … 1."""
    return (Corruption(kind, severity)(images, IDS[: len(images)]).numpy() + 1) / 2


def test_each_is_what_its_name_says(images):
    x = (images.numpy() + 1) / 2
    assert (corrupted("gaussian_noise", 1, images) - x).std() == pytest.approx(0.08, rel=0.05)
    assert corrupted("brightness", 2, images) == pytest.approx((x + 0.2).clip(0, 1), abs=1e-6)
    mean = x.mean((2, 3), keepdims=True)
    assert corrupted("contrast", 3, images) == pytest.approx(mean + 0.2 * (x - mean), abs=1e-6)
    blurred = gaussian_filter(x, (0, 0, 1.0, 1.0), mode="mirror", truncate=3)
    assert corrupted("gaussian_blur", 4, images) == pytest.approx(blurred, abs=1e-4)
    blocks = corrupted("pixelate", 2, images).reshape(3, 3, 12, 2, 20, 2)
    assert np.ptp(blocks, axis=(3, 5)).max() == 0
    file = io.BytesIO()
    Image.fromarray((x[0] * 255).round().astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=7)
    own = np.asarray(Image.open(file)).transpose(2, 0, 1) / 255
    assert np.abs(corrupted("jpeg", 5, images)[0] - own).mean() < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_severities_grow_and_do_not_depend_on_the_batch(kind, images):
    for some in (images, images[:, :1, :8, :8]):  # colours, and small greys
        harm = [np.abs(corrupted(kind, severity, some) - (some.numpy() + 1) / 2).mean() for severity in range(1, 6)]
        assert 0 < harm[0] < harm[4]
        if kind != "pixelate":  # whose pixels lie better or worse on those of the image
            assert harm == sorted(harm)
        whole = Corruption(kind, 3)(some, IDS)
        assert torch.equal(whole[1:2], Corruption(kind, 3)(some[1:2], IDS[1:2]))
        assert float(whole.abs().max()) <= 1


def test_blur_is_wider_in_larger_images():
    point = torch.full((1, 1, 64, 64), -1.0)
    point[..., 32, 32] = 1
    assert Corruption("gaussian_blur", 3)(point, IDS[:1])[0, 0, 32, 36] > -0.999  # 0.8 pixels of 32 are 1.6 of 64


@pytest.mark.parametrize("text", ["fog/3", "jpeg/6", "jpeg/0", "jpeg", "jpeg/x", ""])
def test_unknown_ones_are_refused(text):
    with pytest.raises(ValueError, match=r"corruption: .*expected one of gaussian_noise, gaussian_blur"):
        Corruption.parse(text)


def test_latents_are_refused(images):
    for some in (torch.zeros(1, 4, 8, 8), images[:1] * 3):
        with pytest.raises(ValueError, match=r"corruption: images of shape .*, expected pixels in \[-1, 1\]"):
            Corruption("jpeg", 1)(some, IDS[:1])


class Counting(L.LightningModule):
    """Tells images by how bright they are: classes in equal steps."""

    candidates = Candidates(list("0123456789"))

    def logits(self, images):
        middles = torch.linspace(-0.8, -0.2, 10)
        return -(images.mean((1, 2, 3))[:, None] - middles).square()

    def test_step(self, batch, batch_idx):
        pass


def test_an_evaluation_of_corrupted_images(tmp_path):
    data = DigitsDataModule()
    rows, report = evaluate(tmp_path / "out", Counting(), data, limit=2, corruption="gaussian_noise/4")
    images, ids = data.test.parts["image"][:120], data.test.parts["id"][:120].tolist()
    expected = Counting().logits(Corruption("gaussian_noise", 4)(images, ids))
    in_order = [rows["prediction"][rows["id"].index(str(i))] for i in ids]
    assert in_order == expected.argmax(1).tolist()
    assert in_order != Counting().logits(images).argmax(1).tolist()
    assert report["settings"]["corruption"]["severity"] == 4
    with pytest.raises(ValueError, match="corruption"):
        evaluate(tmp_path / "out", Counting(), data, limit=2)
    with pytest.raises(ValueError, match="expected one of gaussian_noise"):
        evaluate(tmp_path / "out", Counting(), data, corruption="rain/1")
