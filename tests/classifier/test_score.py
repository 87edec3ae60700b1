import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from lightning_diffclf import NoiseSchedule
from lightning_diffclf.classifier.score import Loss, Predictions, timestep_weights


def rows() -> Predictions:
    generator = torch.Generator().manual_seed(0)
    x0, noise, output = torch.randn(3, 6, 2, 3, 3, generator=generator) * torch.tensor([0.4, 1, 2]).view(3, 1, 1, 1, 1)
    schedule = NoiseSchedule.linear(prediction="v_prediction")
    t = torch.tensor([0, 10, 100, 400, 800, 999])
    return Predictions(schedule, output.bfloat16(), x0, schedule.add_noise(x0, noise, t), t, noise)


@pytest.mark.parametrize(
    ("name", "reference"),
    [("l2", F.mse_loss), ("l1", F.l1_loss), ("huber", lambda a, b: F.huber_loss(a, b, delta=1.0))],
)
def test_distances_are_those_of_torch(name, reference):
    given = rows()
    epsilon = given.schedule.to_epsilon(given.output.float(), given.x_t, given.t)
    errors = Loss(name)(given)
    assert errors.dtype == torch.float32
    for i in range(6):
        torch.testing.assert_close(errors[i], reference(epsilon[i], given.noise[i]))


def test_sums_of_terms():
    given = rows()
    torch.testing.assert_close(Loss("l1 + l2")(given), Loss("l1")(given) + Loss("l2")(given))


def test_a_predicted_variance_does_not_count_for_distances():
    given = rows()
    with_variance = replace(given, output=torch.cat([given.output, given.output * 3], 1))
    for name in ("l2", "l1", "huber"):
        assert torch.equal(Loss(name)(with_variance), Loss(name)(given))


def test_kl_is_that_of_two_gaussians():
    schedule = NoiseSchedule.linear()
    generator = torch.Generator().manual_seed(0)
    x0, noise, epsilon, v = torch.randn(4, 5, 1, 2, 2, generator=generator)
    t = torch.tensor([1, 10, 100, 500, 999])
    x_t = schedule.add_noise(x0, noise, t)
    kl = Loss("kl")(Predictions(schedule, torch.cat([epsilon, v], 1), x0, x_t, t, noise))
    a_bar, before = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1]
    beta = 1 - a_bar / before
    for i in range(5):

        def posterior_mean(x0, i=i):
            return (
                before[i].sqrt() * beta[i] / (1 - a_bar[i]) * x0
                + (1 - beta[i]).sqrt() * (1 - before[i]) / (1 - a_bar[i]) * x_t[i].double()
            )

        beta_tilde = beta[i] * (1 - before[i]) / (1 - a_bar[i])
        guess = (x_t[i].double() - (1 - a_bar[i]).sqrt() * epsilon[i]) / a_bar[i].sqrt()
        share = (v[i].double() + 1) / 2
        variance = torch.exp(share * beta[i].log() + (1 - share) * beta_tilde.log())
        true = Normal(posterior_mean(x0[i].double()), beta_tilde.sqrt())
        expected = kl_divergence(true, Normal(posterior_mean(guess), variance.sqrt())).mean() / torch.tensor(2.0).log()
        torch.testing.assert_close(kl[i].double(), expected.double(), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "nll", "l2+kl"])
@pytest.mark.parametrize(
    ("schedule", "found"),
    [
        (NoiseSchedule.rectified_flow(), "FlowSchedule with velocity"),
        (NoiseSchedule.rectified_flow(prediction="epsilon"), "FlowSchedule with epsilon"),
        (NoiseSchedule.edm(), "EDMSchedule with edm"),
        (NoiseSchedule.linear(prediction="v_prediction"), "DiscreteSchedule with v_prediction"),
    ],
)
def test_bound_terms_need_their_schedule(name, schedule, found):
    with pytest.raises(ValueError, match=rf"loss: '{re.escape(name)}' needs a discrete schedule.*found {found}"):
        Loss(name).check(schedule)
    Loss("l2+l1+huber").check(schedule)
    Loss(name).check(NoiseSchedule.cosine())


@pytest.mark.parametrize("name", ["", "l3", "l2+", "l2+l2"])
def test_unknown_terms(name):
    with pytest.raises(ValueError, match=r"loss: .*expected one of \['l2', 'l1', 'huber', 'kl', 'nll'\]"):
        Loss(name)


def test_weights_turn_noise_errors_into_those_of_another_space():
    """For a variance preserving schedule with the prediction of v."""
    given = rows()
    schedule, t = given.schedule, given.t
    epsilon = schedule.to_epsilon(given.output.float(), given.x_t, t)
    alpha, sigma = (f(t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    x0 = (given.x_t - sigma * epsilon) / alpha
    v = alpha * given.noise - sigma * given.x0
    spaces = {"sample": (x0, given.x0), "velocity": (given.output.float(), v), "uniform": (epsilon, given.noise)}
    for name, (predicted, true) in spaces.items():
        expected = (predicted - true).double().square().flatten(1).mean(1)
        weighted = timestep_weights(name, schedule.log_snr(t)) * Loss("l2")(given)
        torch.testing.assert_close(weighted / weighted[3], expected / expected[3], rtol=1e-3, atol=1e-7)


def test_weights_of_clark_and_jaini():
    log_snr = torch.tensor([5.0, -5.0, 0.0, 1.0])  # times 1/8, 7/8, 5/8, 3/8
    expected = torch.tensor([-7 / 8 - 5, -49 / 8 + 5, -35 / 8, -21 / 8 - 1], dtype=torch.float64).exp()
    torch.testing.assert_close(timestep_weights("clark_jaini", log_snr), expected / expected.mean())


def test_numbers_are_weights_from_clean_to_noisy():
    assert timestep_weights([0, 1, 3, 4], torch.tensor([-9.0, 3.0, 0.0, 8.0])).tolist() == [2.0, 0.5, 1.5, 0.0]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("heavy", r"weights: 'heavy', expected one of \['uniform', 'sample', 'velocity', 'clark_jaini'\]"),
        ([1.0], "weights: 1 numbers for 2 draws"),
        ([1.0, -1.0], "weights: expected finite numbers from 0 on"),
        ([1.0, float("inf")], "weights: expected finite numbers from 0 on"),
        ([0.0, 0.0], "weights: expected finite numbers from 0 on, not all of them 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        timestep_weights(weights, torch.tensor([1.0, -1.0]))
