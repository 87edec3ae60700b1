import numpy as np
import pytest
import torch
from scipy.stats import binomtest, norm

from lightning_diffclf.classifier.smoothing import Denoised, certify, largest_radius
from lightning_diffclf.errors import UserError
from tests.classifier.toys import Toy
from tests.gaussians import SPREAD, Gaussians

DIRECTION = torch.randn(1, 3, 3, generator=torch.Generator().manual_seed(0))


def half_space(images: torch.Tensor) -> torch.Tensor:
    """Class 1 beyond a plane: the smoothed classifier has the same plane, so that the true radius is the distance."""
    side = (images * DIRECTION).sum((1, 2, 3)) - 0.5
    return torch.stack([-side, side], 1)


def test_the_radius_is_cohens_and_never_beyond_the_truth():
    rng, beyond = np.random.default_rng(0), 0
    for i in range(40):
        image = torch.from_numpy(rng.random((1, 3, 3), dtype=np.float32))
        found = certify(half_space, image, 0.25, n0=20, n=200, alpha=0.05, image_id=i)
        distance = float(half_space(image[None])[0, 1] / DIRECTION.norm())
        if found.prediction is None:
            assert abs(distance) < 0.2
            continue
        assert found.prediction == (distance > 0)
        low = binomtest(found.votes, 200, alternative="greater").proportion_ci(0.95, "exact").low
        assert found.radius == pytest.approx(0.25 * norm.ppf(low))
        assert found.votes / 200 == pytest.approx(norm.cdf(abs(distance) / 0.25), abs=0.13)
        beyond += found.radius > abs(distance)
    assert beyond <= 6  # 5 % of 40, with luck


def test_a_certificate_depends_on_the_image_alone():
    image = torch.full((1, 3, 3), 0.45)
    found = certify(half_space, image, 0.5, n0=30, n=100, image_id="a")
    assert certify(half_space, image, 0.5, n0=30, n=100, image_id="a", batch_size=7) == found
    assert certify(half_space, image, 0.5, n0=30, n=100, image_id="b") != found


def test_the_largest_radius_is_that_of_all_votes():
    """And with one noisy image fewer than is said to be needed, there is none."""
    sure = certify(lambda x: torch.tensor([[0.0, 1.0]]).expand(len(x), 2), torch.zeros(1, 3, 3), 0.5, n0=1, n=10)
    assert (sure.prediction, sure.votes) == (1, 10)
    assert sure.radius == pytest.approx(largest_radius(0.5, 10, 0.001))
    assert binomtest(9, 9, alternative="greater").proportion_ci(0.999, "exact").low < 0.5


def test_the_denoiser_takes_the_noise_away():
    """Of Gaussian classes, the mean of the clean image is known."""
    denoiser = Gaussians()
    denoised = Denoised(denoiser, half_space, sigma=0.3)
    image = denoiser.means[2] * 0.5 + 0.5
    noise = torch.randn(200, *image.shape, generator=torch.Generator().manual_seed(1))
    noisy = image + 0.3 * noise
    t = denoised.timestep
    ratio = float(denoiser.schedule.sigma(t) / denoiser.schedule.alpha(t))
    assert ratio == pytest.approx(0.6, rel=0.01)  # noise of images in [-1, 1]
    means, x = denoiser.means.mean(0), 2 * noisy - 1
    expected = (means + SPREAD**2 / (SPREAD**2 + ratio**2) * (x - means)) / 2 + 0.5
    torch.testing.assert_close(denoised.denoise(noisy), expected.clamp(0, 1), atol=1e-4, rtol=0)
    error = (denoised.denoise(noisy) - image).square().mean()
    assert float(error) < 0.6 * float((noisy - image).square().mean())
    assert torch.equal(denoised(noisy), half_space(denoised.denoise(noisy)))


class Latent(Toy):
    def predict(self, x_t, t, candidate):
        return x_t[:, :, ::2, ::2]


def test_what_cannot_be_certified_is_said():
    image = torch.zeros(1, 3, 3)
    for settings, message in (
        ({"sigma": 0}, "sigma: 0, expected a standard deviation above 0"),
        ({"sigma": 64}, r"sigma: 64, expected .*in units of images in \[0, 1\]; 0.25 is 64 grey levels"),
        ({"sigma": float("nan")}, "sigma: nan, expected a standard deviation"),
        ({"sigma": 0.5, "alpha": 0}, "alpha: 0, expected a probability"),
        ({"sigma": 0.5, "n": 9}, "n: 9, which certifies nothing with alpha 0.001, expected at least 10"),
        ({"sigma": 0.5, "alpha": 1.5}, "alpha: 1.5, expected a probability"),
        ({"sigma": 0.5, "n": 0}, "n: 0, expected at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            certify(half_space, image, **settings)
    with pytest.raises(UserError, match="smoothing: the denoiser works on"):
        Denoised(Latent(), half_space, 0.2)(torch.zeros(1, 2, 4, 4))
