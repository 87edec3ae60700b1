"""The classifier on a mixture of Gaussians, where everything is known."""

from functools import cache

import pytest
import torch

from lightning_diffclf import DiffusionClassifier, Draws, Exhaustive, LikelihoodRatio, NoiseSchedule, PairedTest
from tests.classifier.gaussians import SCHEDULES, SPREAD, ExactGaussians, mixture
from tests.classifier.toys import SHAPE


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_agrees_with_the_bayes_classifier_of_gaussians(schedule):
    """With equal spreads, Bayes' rule is the nearest mean."""
    means, images, _ = mixture(4, 60, distance=0.5)
    distances = (images[:, None] - means).square().flatten(2).sum(2)
    two = distances.sort(1).values
    clear = (two[:, 1] - two[:, 0]) > 1.5  # a posterior of more than 0.95, with room for Monte Carlo error
    results = list(DiffusionClassifier(ExactGaussians(schedule, means), Draws(300), microbatch=4096)(images))
    agree = torch.tensor([r.prediction for r in results]) == distances.argmin(1)
    assert clear.sum() > 30
    assert bool(agree[clear].all())


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_the_error_of_the_right_class_is_the_known_one(schedule):
    """E ||noise - E[noise | x_t]||² / D = alpha² SPREAD² / (alpha² SPREAD² + sigma²) for images of the class."""
    means = torch.zeros(1, *SHAPE)
    images = SPREAD * torch.randn(100, *SHAPE, generator=torch.Generator().manual_seed(9))
    denoiser = ExactGaussians(schedule, means)
    classifier = DiffusionClassifier(denoiser, Draws(30), microbatch=4096, keep_errors=True)
    errors_S = torch.stack([r.errors_KS[0] for r in classifier(images)]).mean(0)
    signal, noise = (SPREAD * schedule.alpha(classifier.timesteps_S)) ** 2, schedule.sigma(classifier.timesteps_S) ** 2
    # 100 images x 32 values: a relative standard deviation of sqrt(2 / 3200); five of them for 30 draws
    torch.testing.assert_close(errors_S, signal / (signal + noise), rtol=0.125, atol=1e-5)


IMAGES, CLASSES, DRAWS = 2500, 10, 40


@cache
def decide(rule: Exhaustive | PairedTest | LikelihoodRatio, loss: str = "l2") -> tuple[torch.Tensor, float]:
    """Labels of images of which many are close calls, and NFE for each."""
    means, images, _ = mixture(CLASSES, IMAGES, distance=0.35)
    denoiser = ExactGaussians(NoiseSchedule.linear(), means)
    results = list(DiffusionClassifier(denoiser, Draws(DRAWS), loss=loss, elimination=rule, microbatch=4096)(images))
    return torch.tensor([r.prediction for r in results]), sum(r.nfe for r in results) / IMAGES


@pytest.mark.parametrize("alpha", [0.2, 0.05, 0.01])
@pytest.mark.parametrize("kind", [PairedTest, LikelihoodRatio])
def test_alpha_is_kept(kind, alpha):
    """The decision differs from that of all draws in at most a share alpha of images, up to sampling error."""
    everything, exhaustive_nfe = decide(Exhaustive())
    labels, nfe = decide(kind(alpha))
    _, _, truth = mixture(CLASSES, IMAGES, distance=0.35)
    assert 0.6 < (everything == truth).float().mean() < 0.98  # neither trivial nor hopeless
    disagreement = float((labels != everything).float().mean())
    assert disagreement <= alpha + 2 * (alpha * (1 - alpha) / IMAGES) ** 0.5
    assert nfe < exhaustive_nfe / 2


def test_a_smaller_alpha_costs_more():
    for kind in (PairedTest, LikelihoodRatio):
        costs = [decide(kind(alpha))[1] for alpha in (0.2, 0.05, 0.01)]
        assert costs == sorted(costs)


def test_the_likelihood_ratio_needs_one_draw_where_classes_are_far_apart():
    means, images, labels = mixture(CLASSES, 50, distance=3.0)
    denoiser = ExactGaussians(NoiseSchedule.linear(), means)
    results = list(DiffusionClassifier(denoiser, Draws(DRAWS), elimination=LikelihoodRatio())(images))
    assert [r.prediction for r in results] == labels.tolist()
    assert {r.nfe for r in results} == {CLASSES}


@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_alpha_is_kept_for_other_losses(loss):
    everything, _ = decide(Exhaustive(), loss)
    labels, nfe = decide(LikelihoodRatio(0.05), loss)
    assert float((labels != everything).float().mean()) <= 0.05 + 2 * (0.05 * 0.95 / IMAGES) ** 0.5
    assert nfe < CLASSES * DRAWS / 2
