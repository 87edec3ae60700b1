"""LinearProbe: a proposal by one network call, fitted to labelled images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import digest_of_tensor


class LinearProbe:
    """Ranks classes by a linear map of features inside the denoiser: one network call for each image.

    The features are the output of one layer for the clean image x0, scaled as at a chosen timestep but without noise,
    so that proposals depend on the image alone. The map is fitted to labelled images by ridge regression onto their
    classes, in closed form. Recall is what counts: :meth:`recall` measures it, and evaluation reports it.

    Args:
        denoiser: A :class:`~lightning_diffclf.denoiser.ConditionalDenoiser` that is an ``nn.Module``.
        layer: Name of a part of it, as ``named_modules()`` has it, whose output has one row for each input row.
        timestep: Timestep of the schedule at which features are taken.
        top: Classes to propose, all their candidates each.
        ridge: Strength of the regularisation of the map, in units of the mean variance of the features; its constant
            is free.

    Attributes:
        nfe: Network calls for each image.

    Raises:
        ValueError: if there is no such layer, or ``top`` is below 1.
    """

    nfe = 1

    def __init__(
        self, denoiser: ConditionalDenoiser, layer: str, timestep: float, top: int = 10, ridge: float = 1e-2
    ) -> None:
        parts = dict(denoiser.named_modules()) if isinstance(denoiser, nn.Module) else {}
        if layer not in parts:
            raise UserError(f"probe: no layer {layer!r} in {type(denoiser).__name__}, which has {[*parts][1:8]} …")
        if top < 1:
            raise UserError(f"probe: top {top}, expected at least 1")
        self.denoiser, self.layer_name, self.layer = denoiser, layer, parts[layer]
        self.timestep, self.top, self.ridge = timestep, top, ridge
        self._weight: Tensor | None = None  # (features + 1, classes), the constant last
        self._candidates_of = [
            [k for k, its in enumerate(denoiser.candidates.classes) if its == c]
            for c in range(denoiser.candidates.num_classes)
        ]

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Features (B, F), float32, for images as ``denoiser.encode`` takes them."""
        schedule = self.denoiser.schedule
        x0 = self.denoiser.encode(images).float()
        t = torch.full((len(x0),), self.timestep, device=x0.device)
        t = t.to(schedule.timesteps(1).dtype)
        x_t = schedule.add_noise(x0, torch.zeros_like(x0), t)
        found: list[Tensor] = []
        hook = self.layer.register_forward_hook(lambda layer, inputs, output: found.append(output))
        try:
            first = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)  # one condition for all
            self.denoiser.predict(*schedule.network_rows(x_t, t), first)
        finally:
            hook.remove()
        return found[0].flatten(1).float()

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> LinearProbe:
        """Fit the map to batches of images (B, C, H, W) and classes (B,); returns itself.

        Raises:
            ValueError: if there are no batches.
        """
        count = 0
        sums: list[Any] = [0, 0, 0, 0]  # of features, targets, products of features, products of features and targets
        for images, labels in batches:
            found = self.features(images)
            x = found.cpu().double()  # not every device has float64
            y = nn.functional.one_hot(labels.cpu(), self.denoiser.candidates.num_classes).double()
            sums = [total + new for total, new in zip(sums, (x.sum(0), y.sum(0), x.T @ x, x.T @ y), strict=True)]
            count += len(x)
        if count == 0:
            raise UserError("probe: no batches to fit, expected at least one")
        x_mean, y_mean, xx, xy = (total / count for total in sums)
        covariance = xx - x_mean[:, None] * x_mean
        penalty = self.ridge * covariance.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = torch.linalg.solve(covariance + penalty, xy - x_mean[:, None] * y_mean)
        # The last row is the constant, which is not penalised.
        self._weight = torch.cat([weight, (y_mean - x_mean @ weight)[None]]).float().to(found.device)
        return self

    def __call__(self, images: Tensor) -> list[list[int]]:
        """Candidates of the ``top`` classes of each image.

        Raises:
            RuntimeError: before :meth:`fit`.
        """
        if self._weight is None:
            raise RuntimeError("probe: not fitted; call fit or load_state_dict first")
        top = min(self.top, len(self._candidates_of))
        found_BC = self.features(images) @ self._weight[:-1] + self._weight[-1]
        classes_BM = found_BC.topk(top, dim=1).indices.tolist()
        return [sorted(k for c in classes for k in self._candidates_of[c]) for classes in classes_BM]

    def recall(self, images: Tensor, labels: Sequence[int]) -> float:
        """Share of images whose class is among the proposals."""
        classes = self.denoiser.candidates.classes
        hits = [label in {classes[k] for k in one} for one, label in zip(self(images), labels, strict=True)]
        return sum(hits) / len(hits)

    def identity(self) -> dict[str, Any]:
        """What proposals depend on beside the denoiser."""
        weight = None if self._weight is None else digest_of_tensor(self._weight)
        return {"layer": self.layer_name, "timestep": self.timestep, "top": self.top, "weight": weight}

    def state_dict(self) -> dict[str, Tensor]:
        """The fitted map, for saving."""
        return {} if self._weight is None else {"weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over a fitted map."""
        self._weight = state_dict["weight"]
