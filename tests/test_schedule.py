"""Schedules against diffusers, and every conversion against its inverse."""

import copy
import pickle
from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diffclf.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from tests.conftest import GOLDEN

read = NoiseSchedule.from_diffusers
X0, NOISE = torch.randn(2, 6, 2, 4, 4, generator=torch.Generator().manual_seed(0))

DISCRETE = ("linear", "scaled_linear", "cosine")
VP = ("epsilon", "sample", "v_prediction")
CONTINUOUS = {"timestep_type": "continuous", "prediction_type": "v_prediction"}  # the network is given ln(sigma) / 4
FLOW = ("velocity", "epsilon", "sample")
ALL = {
    **{f"{n} {p}": partial(getattr(NoiseSchedule, n), prediction=p) for n in DISCRETE for p in VP},
    **{f"flow {n} {p}": partial(NoiseSchedule.rectified_flow, n, prediction=p) for n in (0, 1) for p in FLOW},
    **{f"edm {p}": partial(NoiseSchedule.edm, prediction=p) for p in ("edm", "sample")},
}


@pytest.mark.parametrize(
    ("ours", "beta_schedule", "betas"),
    [
        (NoiseSchedule.linear, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
        (NoiseSchedule.linear, "linear", {"beta_start": 1e-3, "beta_end": 0.1}),
        (NoiseSchedule.scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
        (NoiseSchedule.scaled_linear, "scaled_linear", {"beta_start": 1e-4, "beta_end": 0.05}),
        (NoiseSchedule.cosine, "squaredcos_cap_v2", {}),
    ],
)
@pytest.mark.parametrize("num_timesteps", [10, 100, 1000])
def test_discrete_schedules_are_those_of_diffusers(ours, beta_schedule, betas, num_timesteps):
    theirs = diffusers.DDPMScheduler(num_timesteps, beta_schedule=beta_schedule, **betas)
    schedule = ours(num_timesteps, **betas)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=5e-5, atol=1e-8)
    t = torch.linspace(0, num_timesteps - 1, len(X0)).long()
    torch.testing.assert_close(schedule.add_noise(X0, NOISE, t), theirs.add_noise(X0, NOISE, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", VP)
@pytest.mark.parametrize("name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep"])
def test_from_diffusers(name, prediction):
    theirs = getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear", prediction_type=prediction)
    schedule = read(theirs)
    assert (schedule.prediction, schedule.num_timesteps) == (prediction, 1000)
    t = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha(t) ** 2, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones(1000))


def test_from_diffusers_folder_and_zero_terminal_snr():
    golden = diffusers.EulerDiscreteScheduler.from_pretrained(GOLDEN / "sd" / "scheduler")
    t = torch.arange(1000)
    torch.testing.assert_close(read(golden).alpha(t), NoiseSchedule.scaled_linear().alpha(t))
    zero = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    torch.testing.assert_close(read(zero).alpha(t) ** 2, zero.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert read(zero).alpha(t[-1:]) == 0


def test_flow_is_that_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    schedule = read(theirs)
    theirs.set_timesteps(7)
    t = theirs.sigmas[:6]
    torch.testing.assert_close(schedule.network_time(t), theirs.timesteps[:6])  # 1000 t
    torch.testing.assert_close(schedule.add_noise(X0, NOISE, t), theirs.scale_noise(X0, theirs.timesteps[:6], NOISE))
    for other, steps in (
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 1000),  # a matter of sampling, not of what a time means
        (diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=500), 500),
        (diffusers.DPMSolverMultistepScheduler(500, prediction_type="flow_prediction", use_flow_sigmas=True), 500),
    ):
        assert vars(read(other)) == vars(FlowSchedule(1, steps, "velocity"))


@pytest.mark.parametrize("noise_at", [0, 1])
def test_velocity_is_the_time_derivative(noise_at):
    schedule, h = NoiseSchedule.rectified_flow(noise_at), 1e-3
    t = torch.linspace(0.1, 0.9, len(X0))
    slope = (schedule.add_noise(X0, NOISE, t + h) - schedule.add_noise(X0, NOISE, t - h)) / (2 * h)
    torch.testing.assert_close(schedule.target(X0, NOISE, t), slope, rtol=0, atol=2e-3)
    mirrored = NoiseSchedule.rectified_flow(1 - noise_at)
    torch.testing.assert_close(mirrored.add_noise(X0, NOISE, 1 - t), schedule.add_noise(X0, NOISE, t))


@pytest.mark.parametrize("numbers", [{}, {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 5.0, "sigma_data": 1.5}])
def test_edm_preconditioning_is_that_of_diffusers(numbers):
    theirs = diffusers.EDMEulerScheduler(**numbers)
    schedule = read(theirs)
    assert vars(schedule) == vars(NoiseSchedule.edm(**numbers))
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
    itself = NoiseSchedule.edm(prediction="sample")  # a network that preconditions itself sees x_t and sigma
    assert torch.equal(itself.network_input(x_t, sigma), x_t)
    assert torch.equal(itself.network_time(sigma), sigma)


def test_v_prediction_is_that_of_diffusers():
    t = torch.tensor([0, 1, 100, 500, 900, 999])
    ours = NoiseSchedule.linear(prediction="v_prediction").target(X0, NOISE, t)
    torch.testing.assert_close(ours, diffusers.DDPMScheduler().get_velocity(X0, NOISE, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", VP)
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
    schedule = ALL[case]()
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 5, 2, 3, 3, generator=generator)
    t = schedule.random_timesteps(5, generator)
    t[:2] = schedule.timesteps(schedule.num_timesteps or 1000)[[0, -1]]  # the ends are the hard ones
    x_t, target = schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t)
    for output in (target, torch.cat([target, torch.full_like(target, torch.nan)], 1)):  # the variance is left out
        epsilon = schedule.to_epsilon(output, x_t, t)
        assert epsilon.dtype == torch.float32
        # float32 rounds x_t and the products by up to 5e-7; where x0 is subtracted, that is then divided by sigma
        divided = 1 / schedule.sigma(t).view(-1, 1, 1, 1) if schedule.prediction in ("sample", "edm") else 0
        assert ((epsilon - noise).abs() <= 4e-6 * (1 + divided)).all()


@pytest.mark.parametrize("case", ALL)
def test_timesteps_cover_the_axis(case):
    schedule = ALL[case]()
    for count in (1, 2, 7, 100, 333):
        t = schedule.timesteps(count)
        assert (t.shape, t.dtype) == ((count,), torch.int64 if schedule.num_timesteps else torch.float32)
        assert bool((schedule.log_snr(t).diff() < 0).all())
    ratio = schedule.alpha(t) / schedule.sigma(t)
    torch.testing.assert_close(schedule.log_snr(t).exp(), ratio**2, rtol=1e-4, atol=1e-8)
    with pytest.raises(ValueError, match="0 draws"):
        schedule.timesteps(0)


def test_flow_timesteps_are_midpoints_of_the_time_axis():
    assert NoiseSchedule.rectified_flow().timesteps(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert NoiseSchedule.rectified_flow(noise_at=0).timesteps(4).tolist() == [0.875, 0.625, 0.375, 0.125]
    scaled = NoiseSchedule.rectified_flow(noise_at=0, time_scale=10)
    assert scaled.network_time(scaled.timesteps(2)).tolist() == [7.5, 2.5]
    assert torch.equal(NoiseSchedule.linear().network_time(torch.arange(3)), torch.arange(3))


def test_random_timesteps_are_those_of_training():
    def draw(schedule):
        return schedule.random_timesteps(20_000, torch.Generator().manual_seed(0)).double()

    assert draw(NoiseSchedule.linear(19)).unique().tolist() == list(range(19))
    for noise_at in (0, 1):
        quantiles = draw(NoiseSchedule.rectified_flow(noise_at)).quantile(torch.linspace(0, 1, 5).double())
        assert quantiles.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.02)
    ln_sigma = draw(NoiseSchedule.edm()).log()
    assert [ln_sigma.mean().item(), ln_sigma.std().item()] == pytest.approx([-1.2, 1.2], abs=0.03)


def test_levels_are_float32_and_precise():
    t = torch.tensor([0.25, 1e-9], dtype=torch.float64)
    for schedule in (NoiseSchedule.rectified_flow(), NoiseSchedule.rectified_flow(0), NoiseSchedule.edm()):
        assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == torch.float32
    nearly_one = DiscreteSchedule(torch.tensor([1 - 1e-9], dtype=torch.float64))  # 1 - float32(alphas_cumprod) is 0
    assert nearly_one.sigma(torch.tensor([0])).item() == pytest.approx(1e-9**0.5, rel=1e-5)
    assert DiscreteSchedule(torch.tensor([0.5])).alphas_cumprod.dtype == torch.float64


def test_discrete_timesteps_are_the_papers():
    schedule = NoiseSchedule.linear()
    for count, expected in ((250, range(2, 1000, 4)), (500, range(1, 1000, 2)), (1000, range(1000))):
        assert schedule.timesteps(count).tolist() == list(expected)
    assert set(schedule.timesteps(300).diff().tolist()) == {3, 4}
    with pytest.raises(ValueError, match="1001 draws: the schedule allows 1 … 1000"):
        schedule.timesteps(1001)


@pytest.mark.parametrize("case", ALL)
def test_copies_and_generators(case):
    schedule = ALL[case]()
    t = schedule.random_timesteps(20, torch.Generator().manual_seed(3))
    for copied in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert torch.equal(copied.random_timesteps(20, torch.Generator().manual_seed(3)), t)
        assert (copied.alpha(t).tolist(), copied.prediction) == (schedule.alpha(t).tolist(), schedule.prediction)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.linear(prediction="velocity"), r"prediction is 'velocity', expected one of \['epsilon'"),
        (lambda: NoiseSchedule.rectified_flow(prediction="v_prediction"), "prediction is 'v_prediction'"),
        (lambda: NoiseSchedule.edm(prediction="epsilon"), "prediction is 'epsilon'"),
        (lambda: FlowSchedule(noise_at=2), "noise_at: 2"),
        (lambda: FlowSchedule(time_scale=0), "time_scale: 0"),
        (lambda: NoiseSchedule.edm(sigma_min=2, sigma_max=2), "sigma_min 2, sigma_max 2"),
        (lambda: NoiseSchedule.edm(sigma_min=0), "sigma_min 0, sigma_max 80"),
        (lambda: NoiseSchedule.edm(rho=0), "rho 0"),
        (lambda: NoiseSchedule.edm(sigma_data=0), "sigma_data 0"),
        (lambda: DiscreteSchedule(torch.tensor([0.5, 0.7])), "never rise"),
        (lambda: DiscreteSchedule(torch.tensor([1.1, 0.5])), r"values in \[0, 1\]"),
        (lambda: DiscreteSchedule(torch.tensor([0.5, -0.1])), r"values in \[0, 1\]"),
        (lambda: DiscreteSchedule(torch.ones(2, 2)), r"shape \(2, 2\)"),
        (lambda: DiscreteSchedule(torch.ones(0)), r"shape \(0,\)"),
        (
            lambda: read(diffusers.EDMEulerScheduler(prediction_type="v_prediction")),
            "'v_prediction', expected 'epsilon'",
        ),
        (lambda: read(diffusers.DDPMScheduler(prediction_type="original_sample")), "prediction is 'original_sample'"),
        (lambda: read(diffusers.EulerDiscreteScheduler(**CONTINUOUS)), "timestep_type 'continuous'"),
        (lambda: read(diffusers.ScoreSdeVeScheduler()), "no alphas_cumprod"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types_are_named():
    for thing in (np.zeros(3), SimpleNamespace(config=3)):
        with pytest.raises(TypeError, match=f"expected a diffusers scheduler, found {type(thing).__name__}"):
            read(thing)
    for t in (torch.tensor([0.5]), torch.tensor([True])):
        with pytest.raises(TypeError, match=rf"t: dtype {t.dtype}, expected integers in 0 … 999"):
            NoiseSchedule.linear().alpha(t)
