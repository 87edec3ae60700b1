import itertools

import numpy as np
import pytest
import torch
from torch import nn

from lightning_diffclf import ClassConditionalDiT, NoiseSchedule
from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.sampling import denoise, initial_noise

TINY = {"input_size": 8, "in_channels": 1, "num_classes": 4, "hidden_size": 16, "depth": 1, "num_heads": 2}


def test_noise_depends_on_id_and_seed_only():
    three = initial_noise((1, 2, 2), ["a", 7, "b"], seed=3)
    assert (three.shape, three.dtype) == ((3, 1, 2, 2), torch.float32)
    assert torch.equal(initial_noise((1, 2, 2), ["b"], seed=3)[0], three[2])
    assert not torch.equal(initial_noise((1, 2, 2), ["b"], seed=4)[0], three[2])
    keyed, expected = KeyedNoise(3), np.empty((1, 2, 2), dtype=np.float32)
    keyed.fill(expected, keyed.key(7), 0)
    np.testing.assert_array_equal(three[1], expected)


@pytest.mark.parametrize("noise_at", [0, 1])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
def test_flows_take_eulers_steps_on_an_even_grid(noise_at, steps):
    """Against the loop written out, for a velocity that is no straight line."""
    schedule = NoiseSchedule.rectified_flow(noise_at, time_scale=1000.0 if noise_at else 1.0)
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    times = []

    def velocity(x, time):
        times.append(float(time))
        return torch.sin(2 * x) + torch.cos(3 * time / schedule.time_scale)

    found = denoise(velocity, schedule, noise, steps)
    assert len(times) == steps
    x = noise.double()
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for (sigma, lower), seen in zip(itertools.pairwise(grid), times, strict=True):
        t = sigma if noise_at else 1 - sigma
        assert seen == pytest.approx(float(t) * schedule.time_scale, rel=1e-5, abs=1e-6)
        slope = torch.sin(2 * x) + torch.cos(3 * t)
        x = x + (lower - sigma) * slope * (1 if noise_at else -1)
    torch.testing.assert_close(found, x.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.scaled_linear, NoiseSchedule.cosine])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_ddim_follows_its_equation(make, prediction):
    """Song et al. 2021, equation 12 without noise, for a network that is right about Gaussian data."""
    schedule, spread = make(prediction=prediction), 0.5
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def exact_x0(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * x

    def predict(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0 = exact_x0(x, t)
        return schedule.target(x0, (x - alpha * x0) / sigma, t[None])

    found, x = denoise(predict, schedule, noise, steps=10), noise
    for t in torch.arange(999, 0, -100):
        x0 = exact_x0(x, t)
        eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
        later = t - 100  # in the end, no noise at all
        x = schedule.alpha(later) * x0 + schedule.sigma(later) * eps if later >= 0 else x0
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_sampled_from_is_refused():
    noise = torch.zeros(1, 1, 2, 2)
    for schedule, steps, message in (
        (NoiseSchedule.linear(), 0, "steps: 0, expected 1 … 1000"),
        (NoiseSchedule.linear(), 1001, "steps: 1001"),
        (NoiseSchedule.rectified_flow(prediction="epsilon"), 2, "a FlowSchedule that predicts 'epsilon'"),
        (NoiseSchedule.edm(prediction="sample"), 2, "a EDMSchedule that predicts 'sample'"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(lambda x, t: x, schedule, noise, steps)


def test_sampling_restores_the_mode_of_every_part_also_after_an_error():
    module = ClassConditionalDiT(**TINY, latents=False).train()
    module.frozen = nn.Dropout().eval()
    before = [part.training for part in module.modules()]
    module.sample(torch.tensor([1]), steps=1)
    assert [part.training for part in module.modules()] == before
    with pytest.raises(ValueError, match="labels 99"):
        module.sample(torch.tensor([99]), steps=1)
    assert [part.training for part in module.modules()] == before
