"""LinearProbe: a proposal by one network call, fitted to labelled images.

Suffixes of shapes: B images, F features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.classifier.search import FittedSearch, Found
from lightning_diffclf.denoiser import ConditionalDenoiser, evaluating
from lightning_diffclf.errors import UserError
from lightning_diffclf.features import layer_named, layer_output, timestep_at
from lightning_diffclf.identity import digest_of_tensor

if TYPE_CHECKING:
    from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier

MOST_FEATURES = 8192  # of an image: the products of all pairs are kept, in float64

EARLY = 0.2  # of the time axis: features say most at little noise, but not at none


class LinearProbe(FittedSearch):
    """Ranks classes by a linear map of features inside the denoiser: one network call for each image.

    The features are the output of one layer for the clean image x0, scaled as at a chosen timestep but without noise,
    so that proposals depend on the image alone. An output of more than 8,192 values is averaged over positions. The map
    is fitted to labelled images by ridge regression onto their classes, in closed form: by :meth:`fit`, or, where that
    was not called, by an evaluation under a Trainer, to the training set of its data module. Recall is what counts:
    :meth:`recall` measures it, and evaluation reports it.

    Args:
        layer: Name of a part of the denoiser, as ``named_modules()`` has it, whose output has one row for each input
            row; the middle one of its longest list of blocks if omitted.
        timestep: Timestep of the schedule at which features are taken; a fifth of the time axis if omitted.
        top: Classes to propose, all their candidates each. An image with no more than these is not looked at.
        ridge: Strength of the regularisation of the map, in units of the mean variance of the features; its constant
            is free.
        images: Training images that an evaluation fits it to, at most.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        layer: str | None = None,
        timestep: float | None = None,
        top: int = 10,
        ridge: float = 1e-2,
        images: int = 20_000,
    ) -> None:
        for name, value in (("top", top), ("images", images)):
            if value < 1:
                raise UserError(f"probe: {name} {value}, expected at least 1")
        if not 0 < ridge < math.inf:
            raise UserError(f"probe: ridge {ridge}, expected a number above 0")
        if timestep is not None and not math.isfinite(timestep):
            raise UserError(f"probe: timestep {timestep}, expected a timestep of the schedule")
        self.layer, self.timestep, self.top, self.ridge, self.images = layer, timestep, top, ridge, images
        self._weight: Tensor | None = None  # (features + 1, classes), float32, the constant last

    def __repr__(self) -> str:
        given = ("layer", "timestep", "top", "ridge", "images")
        return f"LinearProbe({', '.join(f'{name}={getattr(self, name)!r}' for name in given)})"

    def calls(self, num_candidates: int) -> int:
        return 1

    def check(self, denoiser: Any) -> None:
        """Raise ValueError if ``denoiser`` has no such layer."""
        self._layer_of(denoiser)

    def _layer_of(self, denoiser: Any) -> tuple[str, nn.Module]:
        try:
            return layer_named(denoiser, self.layer)
        except UserError as error:
            raise UserError(f"probe: {error}") from error

    @torch.no_grad()
    def features(self, denoiser: ConditionalDenoiser, images: Tensor) -> Tensor:
        """Features (B, F), float32, for images as ``denoiser.encode`` takes them.

        Raises:
            ValueError: if what the layer gives is no tensor with a row for each image, or has too many values.
        """
        layer = self._layer_of(denoiser)
        timestep = timestep_at(denoiser.schedule, EARLY) if self.timestep is None else self.timestep
        x0 = denoiser.encode(images).float()
        try:
            return _averaged(layer_output(denoiser, layer, x0, timestep).float())
        except UserError as error:
            raise UserError(f"probe: {error}") from error

    def fit(self, denoiser: ConditionalDenoiser, batches: Iterable[tuple[Tensor, Any]]) -> LinearProbe:
        """Fit the map to batches of images (B, C, H, W) and classes (B,), int64; returns itself.

        Raises:
            ValueError: if there are no batches or no classes, a class is none of the candidates', or features are not
                finite.
        """
        count, known = 0, denoiser.candidates.num_classes
        sums: list[Any] = [0, 0, 0, 0]  # of features, targets, products of features, products of features and targets
        with evaluating(denoiser):
            for images, labels in batches:
                if labels is None:
                    raise UserError("probe: training images without labels, expected a label for each")
                labels = labels.cpu()
                if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < known:
                    raise UserError(
                        f"probe: labels {int(labels.min())} … {int(labels.max())} to fit to, expected classes in 0 … "
                        f"{known - 1}"
                    )
                x = self.features(denoiser, images).cpu().double()  # not every device has float64
                y = nn.functional.one_hot(labels, known).double()
                new = x.sum(0), y.sum(0), x.T @ x, x.T @ y
                sums = [total + one for total, one in zip(sums, new, strict=True)]
                count += len(x)
        if count == 0:
            raise UserError("probe: no batches to fit, expected at least one")
        if not bool(sums[0].isfinite().all()):
            raise UserError("probe: features of the images to fit to are NaN or infinite, expected finite ones")
        x_mean, y_mean, xx, xy = (total / count for total in sums)
        covariance = xx - x_mean[:, None] * x_mean
        penalty = self.ridge * covariance.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = torch.linalg.solve(covariance + penalty, xy - x_mean[:, None] * y_mean)
        # The last row is the constant, which is not penalised.
        self._weight = torch.cat([weight, (y_mean - x_mean @ weight)[None]]).float()
        return self

    def propose(
        self,
        classifier: DiffusionClassifier,
        images: Tensor,
        ids: Sequence[int | str],
        candidates: Sequence[np.ndarray],
    ) -> Found:
        """As :meth:`Search.propose`: the candidates of the ``top`` classes.

        Raises:
            ValueError: before :meth:`fit`, or if the map was fitted to another network.
        """
        denoiser = classifier.denoiser
        class_K = np.array(denoiser.candidates.classes)
        found, nfe = list(candidates), [0] * len(candidates)
        asked = [b for b, one in enumerate(candidates) if len(np.unique(class_K[one])) > self.top]
        if asked:
            scores_BC = self._scores(denoiser, images[asked]).cpu().numpy()
            for b, scores_C in zip(asked, scores_BC, strict=True):
                in_play = np.unique(class_K[candidates[b]])
                best = in_play[np.argsort(-scores_C[in_play], kind="stable")[: self.top]]
                found[b], nfe[b] = np.sort(candidates[b][np.isin(class_K[candidates[b]], best)]), 1
        return Found(found, nfe, [0] * len(candidates))

    def _scores(self, denoiser: ConditionalDenoiser, images: Tensor) -> Tensor:
        """How much each class fits (B, C)."""
        if self._weight is None:
            raise UserError(
                "probe: not fitted; call fit or load_state_dict first, or let an evaluation by a Trainer fit it"
            )
        features = self.features(denoiser, images)
        self._weight = self._weight.to(features.device)
        if self._weight.shape != (features.shape[1] + 1, denoiser.candidates.num_classes):
            raise UserError(
                f"probe: fitted to {len(self._weight) - 1} features and {self._weight.shape[1]} classes, found "
                f"{features.shape[1]} and {denoiser.candidates.num_classes}"
            )
        with torch.autocast(features.device.type, enabled=False):
            return features @ self._weight[:-1] + self._weight[-1]

    def recall(self, denoiser: ConditionalDenoiser, images: Tensor, labels: Sequence[int]) -> float:
        """Share of images whose class is among the ``top`` ones."""
        top = min(self.top, denoiser.candidates.num_classes)
        with evaluating(denoiser):
            classes_BM = self._scores(denoiser, images).topk(top, dim=1).indices.tolist()
        return sum(label in classes for label, classes in zip(labels, classes_BM, strict=True)) / len(classes_BM)

    def identity(self) -> dict[str, Any]:
        """What proposals depend on beside the denoiser."""
        names = ("layer", "timestep", "top", "ridge", "images")
        weight = None if self._weight is None else digest_of_tensor(self._weight)
        return {name: getattr(self, name) for name in names} | {"weight": weight}

    def state_dict(self) -> dict[str, Tensor]:
        """The fitted map, for saving."""
        return {} if self._weight is None else {"weight": self._weight}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over a fitted map."""
        self._weight = state_dict["weight"]


def _averaged(output: Tensor) -> Tensor:
    """A layer's output (B, ...) as rows (B, F): as it is, or, where it is too large, its mean over positions."""
    if output[0].numel() > MOST_FEATURES and output.ndim > 2:  # (B, tokens, channels), or (B, channels, h, w)
        output = output.mean(dim=1) if output.ndim == 3 else output.flatten(2).mean(2)
    if output[0].numel() > MOST_FEATURES:
        raise UserError(f"layer: it has more than {MOST_FEATURES:,} features, expected fewer; name another one")
    return output.flatten(1)
