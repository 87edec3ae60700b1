"""The interface between networks and the method: anything with four members can classify.

Two more, which make conditions vectors, let candidates be searched by gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.schedule import NoiseSchedule


class Candidates:
    """The K conditions that a denoiser can be asked about.

    Args:
        names: Human-readable name of each candidate, such as a class name or a prompt.
        classes: Class index of each candidate; candidate k is class k if omitted. Several candidates may share a class
            (several prompts for one class).

    Raises:
        ValueError: if there are no candidates, the lengths differ or a class index is negative.

    Example:
        >>> candidates = Candidates(["a photo of a cat", "a drawing of a cat", "a photo of a dog"], [0, 0, 1])
        >>> len(candidates), candidates.num_classes, candidates.classes
        (3, 2, (0, 0, 1))
    """

    def __init__(self, names: Sequence[str], classes: Sequence[int] | None = None) -> None:
        self.names = tuple(str(name) for name in names)
        self.classes = tuple(range(len(self.names))) if classes is None else tuple(int(c) for c in classes)
        if not self.names:
            raise UserError("candidates: none given, expected at least one")
        if len(self.classes) != len(self.names):
            raise UserError(f"candidates: {len(self.names)} names but {len(self.classes)} class indices")
        if min(self.classes) < 0:
            raise UserError(f"candidates: class index {min(self.classes)}, expected 0 or more")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_classes(self) -> int:
        """One more than the largest class index."""
        return max(self.classes) + 1


@runtime_checkable
class ConditionalDenoiser(Protocol):
    """A network that predicts what is noise in an image, given a condition.

    It knows nothing of draws, scores, elimination, ranks or files. See the README for a complete example.
    """

    schedule: NoiseSchedule
    """Noise level of each timestep and the meaning of the output of :meth:`predict`."""

    candidates: Candidates
    """The conditions it knows."""

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32 in [-1, 1], to x0 (B, C, h, w), the space in which noise is added.

        The identity where images are already what the network sees. Raises ValueError for what it cannot take.
        """
        ...

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Network output for each row.

        Args:
            x_t: Noisy inputs (N, C, h, w), as ``schedule.network_input`` gives them.
            t: Time values (N,), as ``schedule.network_time`` gives them.
            candidate: Index of the candidate of each row (N,), int64.

        Returns:
            (N, C, h, w), or (N, 2C, h, w) from a network that also predicts a variance.
        """
        ...


ConditionVectors = Tensor | tuple[Tensor, ...]
"""Conditions of N rows: one floating point tensor (N, ...), or several."""


@runtime_checkable
class SearchableDenoiser(ConditionalDenoiser, Protocol):
    """A denoiser whose conditions are vectors, so that they can be mixed and differentiated by.

    ``predict(x_t, t, k)`` is ``predict_from(x_t, t, conditions(k))``. Only :class:`~.classifier.search.GradientSearch`
    needs this.
    """

    def conditions(self, candidate: Tensor) -> ConditionVectors:
        """Class embeddings, text embeddings and the like of candidates (N,), int64; after the first :meth:`encode`.

        Returns:
            (N, ...), floating, or a tuple of such tensors. Of every candidate, they have the same shape.
        """
        ...

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: ConditionVectors) -> Tensor:
        """As :meth:`predict`, differentiable by the conditions of each row, which may be mixtures of candidates'."""
        ...
