import pytest
import torch

from lightning_diffclf.results.priors import correct_prior, estimate_prior


def test_prior_correction_is_bayes_rule():
    generator = torch.Generator().manual_seed(0)
    likelihood_BC = torch.rand(20, 4, dtype=torch.float64, generator=generator)
    prior_C = torch.tensor([5.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    uniform = likelihood_BC / likelihood_BC.sum(1, keepdim=True)
    expected = likelihood_BC * prior_C / 8
    torch.testing.assert_close(correct_prior(uniform, prior_C), expected / expected.sum(1, keepdim=True))
    torch.testing.assert_close(correct_prior(uniform, torch.ones(4)), uniform)
    impossible = correct_prior(torch.tensor([[0.0, 0.0, 1.0, 0.0]], dtype=torch.float64), prior_C)
    torch.testing.assert_close(impossible, prior_C[None] / 8)
    for bad in (torch.ones(3), torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.full((4,), torch.nan)):
        with pytest.raises(ValueError, match="prior: "):
            correct_prior(uniform, bad)


def test_the_prior_of_unlabelled_images_is_found():
    """Two Gaussians, one four times as common: exact posteriors under a uniform prior."""
    generator = torch.Generator().manual_seed(0)
    label_B = (torch.rand(20_000, generator=generator) < 0.2).long()
    x_B = torch.randn(20_000, dtype=torch.float64, generator=generator) + 2.0 * label_B
    p_B = torch.sigmoid(2 * x_B - 2)
    prior_C = estimate_prior(torch.stack([1 - p_B, p_B], 1))
    torch.testing.assert_close(prior_C, torch.tensor([0.8, 0.2], dtype=torch.float64), atol=0.01, rtol=0)
