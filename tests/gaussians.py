"""A LightningModule whose noise prediction is exact: each class is a Gaussian around a mean of its own."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf import Candidates, NoiseSchedule

CLASSES, SHAPE, SPREAD = 7, (1, 3, 3), 0.6


def class_means() -> Tensor:
    return torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(1)) * 0.5


class Gaussians(L.LightningModule):
    """E[noise | x_t, class] in closed form; ``autocast_seen`` tells whether the network was called under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = NoiseSchedule.linear()
        self.candidates = Candidates([f"class {k}" for k in range(CLASSES)])
        self.register_buffer("means", class_means())
        self.unused = nn.Parameter(torch.zeros(1))
        self.autocast_seen: set[bool] = set()

    def encode(self, images: Tensor) -> Tensor:
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        self.autocast_seen.add(torch.is_autocast_enabled(x_t.device.type))
        alpha, sigma = (v.view(-1, 1, 1, 1) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
        mean = self.means[candidate]
        x0 = mean + alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2) * (x_t - alpha * mean)
        return (x_t - alpha * x0) / sigma

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return self.unused.square().sum()

    def validation_step(self, batch: object, batch_idx: int) -> None: ...

    def test_step(self, batch: object, batch_idx: int) -> None: ...

    def predict_step(self, batch: object, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Samples(Dataset[dict[str, Tensor]]):
    """``count`` images of the Gaussians, with labels unless told otherwise."""

    def __init__(self, count: int, labelled: bool = True) -> None:
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.randint(CLASSES, (count,), generator=generator)
        noise = torch.randn(count, *SHAPE, generator=generator)
        self.images = class_means()[self.labels] + SPREAD * noise
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"image": self.images[index], "id": torch.tensor(100 + index)}
        return item | {"label": self.labels[index]} if self.labelled else item


def loader(count: int, batch_size: int = 4, labelled: bool = True) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Samples(count, labelled), batch_size=batch_size)  # by name: Lightning makes it anew for predict
