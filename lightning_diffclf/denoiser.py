"""The interface between networks and the method: anything with four members can classify.

Two more, which make conditions vectors, let candidates be searched by gradients. Another one lets candidates share what
does not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.schedule import NoiseSchedule

__all__ = [
    "Candidates",
    "ConditionVectors",
    "ConditionalDenoiser",
    "SearchableDenoiser",
    "SharingDenoiser",
    "evaluating",
    "predict_rows",
]


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


@runtime_checkable
class SharingDenoiser(ConditionalDenoiser, Protocol):
    """A denoiser that computes what depends on x_t and t only once for all candidates of an (image, draw) pair.

    Nothing needs this; it is faster. Compiled networks are called by :meth:`predict`, whose rows are always as many.
    """

    def predict_shared(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        """``predict(x_t[pair], t[pair], candidate)``, up to rounding.

        Args:
            x_t: Noisy inputs of M pairs (M, C, h, w).
            t: Their time values (M,).
            pair: The pair of each row (N,), int64, in 0 … M-1; every pair has a row.
            candidate: The candidate of each row (N,), int64.
        """
        ...


def predict_rows(denoiser: ConditionalDenoiser, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
    """Network output for N rows of M pairs: by ``predict_shared`` where it belongs to ``predict``, else by that one."""
    if _shares(denoiser):
        shared: Tensor = denoiser.predict_shared(x_t, t, pair, candidate)  # type: ignore[attr-defined]
        return shared
    return denoiser.predict(x_t[pair], t[pair], candidate)


def _shares(denoiser: ConditionalDenoiser) -> bool:
    """Whether the class, or object, that says what ``predict`` does also says what it does for pairs.

    Otherwise a subclass that has a ``predict`` of its own would be classified by the one of its base.
    """
    places = (getattr(denoiser, "__dict__", {}), *map(vars, type(denoiser).__mro__))
    return next(("predict_shared" in one for one in places if "predict" in one or "predict_shared" in one), False)


@contextmanager
def evaluating(denoiser: Any) -> Iterator[None]:
    """Evaluation mode (no dropout, no label dropout) inside, the mode before outside."""
    modules = list(denoiser.modules()) if isinstance(denoiser, nn.Module) else []
    training = [module.training for module in modules]  # each its own: a frozen encoder stays as it was
    if any(training):
        denoiser.eval()
    try:
        yield
    finally:
        if training and training[0]:
            denoiser.train()  # which the class may have given more to do
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
