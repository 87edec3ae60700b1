"""The terms of the variational bound against the published numbers and against textbook formulas."""

import gc
import math
import weakref

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from lightning_diffclf import variational
from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule
from lightning_diffclf.variational import bound_terms, hybrid_loss


def batch(t: list[int]) -> tuple[DiscreteSchedule, Tensor, Tensor, Tensor, Tensor, Tensor]:
    schedule, times = NoiseSchedule.linear(), torch.tensor(t)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(t), 2, 3, 3, generator=generator)
    output = torch.randn(len(t), 4, 3, 3, generator=generator)
    return schedule, output, x0, schedule.add_noise(x0, noise, times), times, noise


# --- against the published numbers ---------------------------------------------------------------------------------


def test_training_losses_are_the_published_ones(golden_dit):
    dit, golden = golden_dit
    schedule, x0, t, noise = NoiseSchedule.linear(), golden["train_x"], golden["t"], golden["train_noise"]
    x_t = schedule.add_noise(x0, noise, t)
    losses = hybrid_loss(schedule, dit(x_t, t, golden["train_y"]), x0, x_t, t, noise)
    for name, values in zip(("loss", "mse", "vb"), losses, strict=True):
        torch.testing.assert_close(values, golden[f"train_{name}"], atol=1e-5, rtol=0)


def test_terms_are_the_published_ones(golden_dit):
    dit, golden = golden_dit
    schedule, errors = NoiseSchedule.linear(), golden["errors"]
    image, label, draw = torch.cartesian_prod(*(torch.arange(n) for n in errors.shape[:3])).unbind(1)
    x0, noise, t = golden["latents"][image], golden["noise"][draw], golden["timesteps"][draw]
    x_t = schedule.add_noise(x0, noise, t)
    output = dit(x_t, t, label)
    wrong = (output[:, :4] - noise).flatten(1)
    kl, nll = bound_terms(schedule, output, x0, x_t, t)
    terms = torch.stack([wrong.square().mean(1), wrong.abs().mean(1), kl, nll], dim=1)
    torch.testing.assert_close(terms, errors.flatten(0, 2), atol=0, rtol=1e-4)


# --- against textbook formulas -------------------------------------------------------------------------------------


def test_kl_is_that_of_the_two_normal_distributions():
    schedule, output, x0, x_t, t, _ = batch([1, 10, 500, 999])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    for row, step in enumerate(t):
        beta, bar, previous = betas[step], bars[step], bars[step - 1]
        epsilon, v = output[row].double().chunk(2)
        x0_row, xt_row = x0[row].double(), x_t[row].double()
        beta_tilde = (1 - previous) / (1 - bar) * beta
        # q by Bayes' rule: a product of the likelihood of x_t and the prior of x_{t-1}
        precision = (1 - beta) / beta + 1 / (1 - previous)
        q_mean = ((1 - beta).sqrt() / beta * xt_row + previous.sqrt() / (1 - previous) * x0_row) / precision
        q = Normal(q_mean, precision.rsqrt())
        p_mean = (xt_row - beta / (1 - bar).sqrt() * epsilon) / (1 - beta).sqrt()  # Ho et al. 2020, equation 11
        p = Normal(p_mean, (beta.log() * (v + 1) / 2 + beta_tilde.log() * (1 - v) / 2).mul(0.5).exp())
        expected = kl_divergence(q, p).mean() / math.log(2)
        kl, _ = bound_terms(schedule, output, x0, x_t, t)
        assert kl[row].item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("t", [1, 300, 999])
def test_perfect_prediction_costs_nothing(t):
    schedule, _, x0, x_t, times, noise = batch([t])
    kl, _ = bound_terms(schedule, torch.cat([noise, -torch.ones_like(noise)], dim=1), x0, x_t, times)
    assert kl.abs() < 1e-4


@pytest.mark.parametrize(("t", "v"), [(0, -1.0), (0, 1.0), (50, 0.0), (400, 0.0), (999, 1.0)])
def test_probabilities_of_the_256_levels_sum_to_one(t, v):
    schedule, times = NoiseSchedule.linear(), torch.full((256,), t)
    x0 = (torch.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1)
    x_t = torch.full((256, 1, 1, 1), 0.3)
    output = torch.cat([torch.full_like(x_t, 0.1), torch.full_like(x_t, v)], dim=1)
    _, nll = bound_terms(schedule, output, x0, x_t, times)
    assert (2**-nll).sum().item() == pytest.approx(1, abs=1e-5)


def test_likelihood_is_that_of_a_normal_distribution():
    schedule, output, x0, _, t, noise = batch([0, 0])
    x0, v = x0.clamp(-0.9, 0.9), output[:, 2:].double()
    x_t = schedule.add_noise(x0, noise, t)
    _, nll = bound_terms(schedule, torch.cat([0.9 * noise, output[:, 2:]], dim=1), x0, x_t, t)
    bar, after = schedule.alphas_cumprod[:2]
    beta, beta_tilde = 1 - bar, (1 - bar) / (1 - after) * (1 - after / bar)  # the latter of t = 1
    mean = (x_t - (1 - bar).sqrt() * 0.9 * noise) / bar.sqrt()
    p = Normal(mean.double(), (beta.log() * (1 + v) / 2 + beta_tilde.log() * (1 - v) / 2).mul(0.5).exp())
    expected = -(p.cdf(x0 + 1 / 255) - p.cdf(x0 - 1 / 255)).log2().mean((1, 2, 3))
    torch.testing.assert_close(nll.double(), expected, rtol=1e-3, atol=0)


def test_rows_of_any_rank_and_half_precision():
    schedule, output, x0, x_t, t, _ = batch([0, 10, 999])
    kl, nll = bound_terms(schedule, output, x0, x_t, t)
    assert kl.shape == nll.shape == (3,)
    flat = bound_terms(schedule, output.flatten(2), x0.flatten(2), x_t.flatten(2), t)
    assert torch.equal(flat[0], kl)
    assert torch.equal(flat[1], nll)
    half = bound_terms(schedule, output.bfloat16(), x0, x_t, t)
    assert half[0].dtype == half[1].dtype == torch.float32
    torch.testing.assert_close(half[0], kl, rtol=0.02, atol=0)


# --- training ------------------------------------------------------------------------------------------------------


def test_bound_trains_only_the_variance_and_the_error_only_epsilon():
    schedule, output, x0, x_t, t, noise = batch([0, 1, 500, 999])
    output.requires_grad_()
    _, mse, vb = hybrid_loss(schedule, output, x0, x_t, t, noise)
    (by_vb,) = torch.autograd.grad(vb.sum(), output, retain_graph=True)
    (by_mse,) = torch.autograd.grad(mse.sum(), output)
    assert not by_vb[:, :2].any()
    assert by_vb[:, 2:].flatten(1).any(1).all()
    assert by_mse[:, :2].flatten(1).any(1).all()
    assert not by_mse[:, 2:].any()


def test_bound_is_weighted_by_the_number_of_timesteps():
    _, output, x0, x_t, _, noise = batch([0, 1, 50, 99])
    t = torch.tensor([0, 1, 50, 99])
    loss, mse, vb = hybrid_loss(NoiseSchedule.linear(100), output, x0, x_t, t, noise)
    torch.testing.assert_close(loss, mse + 0.1 * vb)
    kl, nll = bound_terms(NoiseSchedule.linear(100), output, x0, x_t, t)
    assert torch.equal(vb, torch.cat([nll[:1], kl[1:]]))


def test_tables_made_in_inference_mode_can_train():
    schedule, output, x0, x_t, t, noise = batch([0, 500])
    with torch.inference_mode():
        bound_terms(schedule, output, x0, x_t, t)
    loss, _, _ = hybrid_loss(schedule, output.requires_grad_(), x0, x_t, t, noise)
    loss.sum().backward()
    assert output.grad.isfinite().all()


def test_tables_are_made_once_and_go_with_their_schedule(monkeypatch):
    calls = []
    table = variational._table
    monkeypatch.setattr(variational, "_table", lambda bars: calls.append(1) or table(bars))
    schedule, output, x0, x_t, t, _ = batch([0, 500])
    for _ in range(3):
        bound_terms(schedule, output, x0, x_t, t)
    assert len(calls) == 1
    reference = weakref.ref(schedule)
    del schedule
    gc.collect()
    assert reference() is None


# --- errors --------------------------------------------------------------------------------------------------------


def test_network_without_variance_raises():
    schedule, output, x0, x_t, t, noise = batch([0, 500])
    for call in (lambda o: bound_terms(schedule, o, x0, x_t, t), lambda o: hybrid_loss(schedule, o, x0, x_t, t, noise)):
        with pytest.raises(ValueError, match=r"output \(2, 2, 3, 3\), expected \(2, 4, 3, 3\)"):
            call(output[:, :2])


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (NoiseSchedule.rectified_flow(), "FlowSchedule with velocity"),
        (NoiseSchedule.linear(prediction="v_prediction"), "DiscreteSchedule with v_prediction"),
        (NoiseSchedule.linear(1), "2 or more timesteps"),
        (DiscreteSchedule(torch.tensor([0.9, 0.5, 0.5])), "falling at each"),
        (DiscreteSchedule(torch.tensor([0.9, 0.5, 0.0])), "never 0"),
    ],
)
def test_schedules_without_a_bound_raise(schedule, message):
    _, output, x0, x_t, t, _ = batch([0, 0])
    with pytest.raises(ValueError, match=message):
        bound_terms(schedule, output, x0, x_t, t)
