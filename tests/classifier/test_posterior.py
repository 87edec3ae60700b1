import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from lightning_diffclf import Posterior
from lightning_diffclf.classifier.posterior import sum_by_class


def test_reductions_and_temperature():
    scores = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) * 0.01
    for reduction, factor in (("mean", 1), ("sum", 300)):
        p = Posterior(reduction, 0.7)(scores, dims=300)
        np.testing.assert_allclose(p, softmax(-scores.double().numpy() * factor / 0.7, axis=1), rtol=1e-10)
    assert Posterior("mean")(scores, 300).max() < 0.2  # nearly flat: users wondered
    assert Posterior("sum")(scores, 300).max() > 0.35


def test_broken_candidates_have_probability_zero():
    p = Posterior()(torch.tensor([[0.1, torch.inf, 0.2, torch.nan]]), dims=10)
    assert p[0, [1, 3]].tolist() == [0, 0]
    assert p.sum() == pytest.approx(1)


@pytest.mark.parametrize("true_temperature", [0.05, 1.0, 40.0])
def test_fit_finds_the_temperature(true_temperature):
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(3000, 5, generator=generator).double() * 3 * true_temperature
    targets = torch.multinomial((-scores / true_temperature).softmax(1), 1, generator=generator)[:, 0]

    def nll(log_temperature):
        return -log_softmax(-scores.numpy() / np.exp(log_temperature), axis=1)[range(3000), targets].mean()

    best = minimize_scalar(nll, bounds=(-6, 6), method="bounded")
    fitted = Posterior("mean").fit(scores, targets, dims=64)
    assert nll(np.log(fitted.temperature)) == pytest.approx(best.fun, abs=1e-6)
    assert fitted.temperature == pytest.approx(true_temperature, rel=0.15)
    same = Posterior("sum").fit(scores, targets, dims=64)
    torch.testing.assert_close(same(scores, 64), fitted(scores, 64), rtol=1e-4, atol=1e-6)


def test_fit_of_a_flawless_classifier_stays_finite():
    scores = torch.eye(4).neg() * 0.01
    fitted = Posterior().fit(scores, torch.arange(4), dims=10)
    assert 0 < fitted.temperature < 1
    assert Posterior().fit(torch.tensor([[0.1, torch.inf], [0.3, 0.2]]), torch.tensor([0, 1]), 5).temperature > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Posterior("max"), "reduction 'max'"),
        (lambda: Posterior(temperature=-1), "temperature -1"),
        (lambda: Posterior().fit(torch.zeros(0, 3), torch.zeros(0).long(), 1), "0 rows of scores"),
        (lambda: Posterior().fit(torch.zeros(2, 3), torch.tensor([0, 3]), 1), "targets 0 … 3, expected 0 … 2"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sum_by_class():
    p = torch.tensor([[0.1, 0.2, 0.7]])
    assert sum_by_class(p, [2, 0, 2], 4)[0].tolist() == pytest.approx([0.2, 0, 0.8, 0])
