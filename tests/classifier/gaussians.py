"""A denoiser whose noise prediction and Bayes classifier are known in closed form: classes are N(mean, SPREAD²)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diffclf import NoiseSchedule
from tests.classifier.toys import SHAPE, Toy

SPREAD = 0.5

SCHEDULES = {
    f"{name}, {prediction}": make(prediction=prediction)
    for name, make, predictions in (
        ("linear", NoiseSchedule.linear, ("epsilon", "sample", "v_prediction")),
        ("scaled linear", NoiseSchedule.scaled_linear, ("epsilon", "sample", "v_prediction")),
        ("cosine", NoiseSchedule.cosine, ("epsilon", "sample", "v_prediction")),
        ("flow", NoiseSchedule.rectified_flow, ("velocity", "epsilon", "sample")),
        ("flow of SiT", lambda prediction: NoiseSchedule.rectified_flow(0, 1.0, prediction), ("velocity", "epsilon")),
        ("flow of SD3", lambda prediction: NoiseSchedule.rectified_flow(1, 1000.0, prediction), ("velocity",)),
        # sigma_data is not SPREAD, or the perfect F would not depend on its input
        ("edm", lambda prediction: NoiseSchedule.edm(sigma_data=0.8, prediction=prediction), ("edm", "sample")),
    )
    for prediction in predictions
}


class ExactGaussians(Toy):
    """The mixture of Gaussians with one component for each class. Undoes what the network is given."""

    def __init__(self, schedule: NoiseSchedule, means: Tensor) -> None:
        super().__init__(len(means), schedule)
        self.means = means

    def predict(self, x_in: Tensor, time: Tensor, candidate: Tensor) -> Tensor:
        assert (x_in.dtype, candidate.dtype) == (torch.float32, torch.int64)
        assert time.dtype == (torch.int64 if self.schedule.num_timesteps else torch.float32)
        t, x_t = time / getattr(self.schedule, "time_scale", 1), x_in
        if self.schedule.prediction == "edm":  # Karras et al. 2022, table 1: c_noise = ln(sigma) / 4, c_in
            t = (4 * time).exp()
            x_t = x_in * (t**2 + 0.8**2).sqrt().view(-1, 1, 1, 1)
        if self.schedule.num_timesteps:
            t = t.long()
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        mean = self.means[candidate]
        x0 = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x_t - alpha * mean)
        return self.schedule.target(x0, (x_t - alpha * x0) / sigma, t)


def mixture(num_classes: int, count: int, distance: float, seed: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Means (K, C, h, w), images (B, C, h, w) and their classes (B,)."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(num_classes, *SHAPE, generator=generator) * distance
    labels = torch.randint(num_classes, (count,), generator=generator)
    return means, means[labels] + SPREAD * torch.randn(count, *SHAPE, generator=generator), labels
