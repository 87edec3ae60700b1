"""The other interface: networks that say of an image at once how well each candidate fits, as baselines do."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_diffclf.candidates import Candidates


@runtime_checkable
class Discriminative(Protocol):
    """A network that gives the logits of all candidates in one call: CLIP, a classifier of timm, or your own.

    A LightningModule with these two members is evaluated as a denoiser is: by the same callback, data, store and
    report.
    """

    candidates: Candidates
    """What it can be asked about."""

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), float32 in [-1, 1], to logits (B, K), floating: higher is better, in nats.

        Raises ValueError for what it cannot take.
        """
        ...
