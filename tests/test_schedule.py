"""Schedules against diffusers, and every conversion against its inverse."""

import copy
import pickle
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diffclf.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from tests.conftest import GOLDEN

read = NoiseSchedule.from_diffusers

X0, NOISE = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0))

VP = ("epsilon", "sample", "v_prediction")
FLOW = ("velocity", "epsilon", "sample")
ALL = {
    **{f"{name} {p}": (getattr(NoiseSchedule, name), p) for name in ("linear", "scaled_linear", "cosine") for p in VP},
    **{f"flow {n} {p}": (partial(NoiseSchedule.rectified_flow, n), p) for n in (0, 1) for p in FLOW},
    **{f"edm {p}": (NoiseSchedule.edm, p) for p in ("edm", "sample")},
}


@pytest.mark.parametrize(
    ("ours", "beta_schedule", "betas"),
    [
        (NoiseSchedule.linear, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (NoiseSchedule.linear, "linear", {"beta_start": 1e-3, "beta_end": 0.1}),
        (NoiseSchedule.scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (NoiseSchedule.cosine, "squaredcos_cap_v2", {}),
    ],
)
@pytest.mark.parametrize("num_timesteps", [100, 1000])
def test_discrete_schedules_are_those_of_diffusers(ours, beta_schedule, betas, num_timesteps):
    theirs = diffusers.DDPMScheduler(num_timesteps, beta_schedule=beta_schedule, **betas)
    schedule = ours(num_timesteps, **betas)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
    t = torch.linspace(0, num_timesteps - 1, len(X0)).long()
    torch.testing.assert_close(schedule.add_noise(X0, NOISE, t), theirs.add_noise(X0, NOISE, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_from_diffusers(name, prediction):
    if (name, prediction) == ("PNDM", "sample"):
        pytest.skip("diffusers has no such scheduler")
    theirs = getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear", prediction_type=prediction)
    schedule = NoiseSchedule.from_diffusers(theirs)
    assert (schedule.prediction, schedule.num_timesteps) == (prediction, 1000)
    t = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t) ** 2, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(1000))


def test_from_diffusers_folder_and_zero_terminal_snr():
    golden = diffusers.EulerDiscreteScheduler.from_pretrained(GOLDEN / "sd" / "scheduler")
    t = torch.arange(1000)
    torch.testing.assert_close(NoiseSchedule.from_diffusers(golden).alpha(t), NoiseSchedule.scaled_linear().alpha(t))
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert NoiseSchedule.from_diffusers(zero).alpha(torch.tensor([999])) == 0


def test_flow_is_that_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule = NoiseSchedule.from_diffusers(theirs)
    theirs.set_timesteps(7)
    t = theirs.sigmas[:6]
    torch.testing.assert_close(schedule.network_time(t), theirs.timesteps[:6])  # 1000 t
    torch.testing.assert_close(schedule.add_noise(X0, NOISE, t), theirs.scale_noise(X0, theirs.timesteps[:6], NOISE))
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # a matter of sampling, not of what a time means
    torch.testing.assert_close(NoiseSchedule.from_diffusers(shifted).sigma(t), schedule.sigma(t))


@pytest.mark.parametrize("noise_at", [0, 1])
def test_velocity_is_the_time_derivative(noise_at):
    schedule, h = NoiseSchedule.rectified_flow(noise_at), 1e-3
    t = torch.linspace(0.1, 0.9, len(X0))
    slope = (schedule.add_noise(X0, NOISE, t + h) - schedule.add_noise(X0, NOISE, t - h)) / (2 * h)
    torch.testing.assert_close(schedule.target(X0, NOISE, t), slope, rtol=0, atol=2e-3)
    mirrored = NoiseSchedule.rectified_flow(1 - noise_at)
    torch.testing.assert_close(mirrored.add_noise(X0, NOISE, 1 - t), schedule.add_noise(X0, NOISE, t))


def test_edm_preconditioning_is_that_of_diffusers():
    theirs = diffusers.EDMEulerScheduler()
    schedule = NoiseSchedule.from_diffusers(theirs)
    assert isinstance(schedule, EDMSchedule)
    sigma = torch.tensor([0.002, 0.05, 0.5, 1.0, 7.0, 80.0])
    x_t = schedule.add_noise(X0, NOISE, sigma)
    epsilon = schedule.to_epsilon(NOISE.flip(0), x_t, sigma)
    for i, s in enumerate(sigma):
        torch.testing.assert_close(schedule.network_input(x_t, sigma)[i], theirs.precondition_inputs(x_t[i], s))
        torch.testing.assert_close(schedule.network_time(sigma)[i], theirs.precondition_noise(s))
        denoised = theirs.precondition_outputs(x_t[i], NOISE.flip(0)[i], s)
        torch.testing.assert_close(s * epsilon[i], x_t[i] - denoised, rtol=1e-4, atol=1e-4)
    karras = theirs._compute_karras_sigmas(torch.linspace(0, 1, 101))  # its odd points are the middles of ours
    torch.testing.assert_close(schedule.timesteps(50).flip(0).float(), karras[1::2].float(), rtol=1e-4, atol=0)


def test_v_prediction_is_that_of_diffusers():
    theirs = diffusers.DDPMScheduler(prediction_type="v_prediction")
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    ours = NoiseSchedule.linear(prediction="v_prediction").target(X0, NOISE, t)
    torch.testing.assert_close(ours, theirs.get_velocity(X0, NOISE, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_implied_x0_is_that_of_diffusers(prediction):
    theirs = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    theirs.set_timesteps(1000)
    schedule, output = NoiseSchedule.linear(prediction=prediction), NOISE.flip(0)
    for step in (1, 400, 950):
        t = torch.full((len(X0),), step)
        epsilon = schedule.to_epsilon(output, X0, t)
        x0 = (X0 - schedule.sigma(t)[0] * epsilon) / schedule.alpha(t)[0]
        torch.testing.assert_close(x0, theirs.step(output, step, X0).pred_original_sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ALL)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_conversion_is_the_inverse_of_the_target(case, seed):
    make, prediction = ALL[case]
    schedule = make(prediction=prediction)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 5, 2, 3, 3, generator=generator)
    t = schedule.random_timesteps(5, generator)
    x_t, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    for output in (target, torch.cat([target, torch.full_like(target, torch.nan)], 1)):  # the variance is left out
        epsilon = schedule.to_epsilon(output, x_t, t)
        assert epsilon.dtype == torch.float32
        # x_t is rounded to 1 part in 10^7 and then divided by sigma
        allowed = 1e-5 + 1e-5 / schedule.sigma(t).clamp_min(1e-6).view(-1, 1, 1, 1)
        assert ((epsilon - noise).abs() <= allowed).all()


@pytest.mark.parametrize("case", ALL)
def test_timesteps_cover_the_axis(case):
    make, prediction = ALL[case]
    schedule = make(prediction=prediction)
    for count in (1, 2, 7, 100, 333):
        t = schedule.timesteps(count)
        assert t.shape == (count,)
        assert bool((schedule.log_snr(t).diff() < 0).all())
        assert bool((schedule.sigma(t) > 0).all())
    torch.testing.assert_close(
        schedule.log_snr(t), 2 * (schedule.alpha(t) / schedule.sigma(t)).log(), rtol=1e-3, atol=1e-5
    )
    with pytest.raises(ValueError, match="0 draws"):
        schedule.timesteps(0)


def test_discrete_timesteps_are_the_papers():
    schedule = NoiseSchedule.linear()
    assert schedule.timesteps(250).tolist() == list(range(2, 1000, 4))
    assert schedule.timesteps(500).tolist() == list(range(1, 1000, 2))
    assert schedule.timesteps(1000).tolist() == list(range(1000))
    gaps = schedule.timesteps(300).diff()
    assert set(gaps.tolist()) == {3, 4}
    with pytest.raises(ValueError, match="1001 draws: the schedule allows 1 … 1000"):
        schedule.timesteps(1001)


@pytest.mark.parametrize("case", ALL)
def test_copies_and_generators(case):
    make, prediction = ALL[case]
    schedule = make(prediction=prediction)
    t = schedule.random_timesteps(20, torch.Generator().manual_seed(3))
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert torch.equal(copied.random_timesteps(20, torch.Generator().manual_seed(3)), t)
        assert torch.equal(copied.alpha(t), schedule.alpha(t))
        assert copied.prediction == prediction


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.linear(prediction="velocity"), r"prediction is 'velocity', expected one of \['epsilon'"),
        (lambda: NoiseSchedule.rectified_flow(prediction="v_prediction"), "prediction is 'v_prediction'"),
        (lambda: NoiseSchedule.edm(prediction="epsilon"), "prediction is 'epsilon'"),
        (lambda: FlowSchedule(noise_at=2), "noise_at: 2"),
        (lambda: FlowSchedule(time_scale=0), "time_scale: 0"),
        (lambda: NoiseSchedule.edm(sigma_min=3, sigma_max=2), "sigma_min 3, sigma_max 2"),
        (lambda: NoiseSchedule.edm(rho=0), "rho 0"),
        (lambda: DiscreteSchedule(torch.tensor([0.5, 0.7])), "never rise"),
        (lambda: DiscreteSchedule(torch.ones(2, 2)), r"shape \(2, 2\)"),
        (lambda: read(diffusers.EDMEulerScheduler(prediction_type="v_prediction")), "v_prediction"),
        (lambda: read(diffusers.CMStochasticIterativeScheduler()), "no alphas_cumprod"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_are_named():
    with pytest.raises(TypeError, match="expected a diffusers scheduler, found ndarray"):
        NoiseSchedule.from_diffusers(np.zeros(3))
    with pytest.raises(TypeError, match=r"t: dtype torch.float32, expected integers in 0 … 999"):
        NoiseSchedule.linear().alpha(torch.tensor([0.5]))
