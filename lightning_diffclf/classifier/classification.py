"""The decision on one image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Classification:
    """The decision on one image.

    Attributes:
        image_id: Id under which the image was given.
        label: Class index of the winning candidate; None if the network returned NaN or infinity for all of them.
        candidate: Index of the winning candidate, or None.
        margin: Evidence for the winner against its closest rival in nats, at least 0:
            n · D · (rival's score - winner's) / (2 · winner's), after n draws. For ``l2`` this is the log likelihood
            ratio of two Gaussian residuals, optimistic where neighbouring values are correlated; for other errors it
            is a scale only. Of rivals that were dropped, it counts what there was when they were dropped. Infinite
            if there was no rival.
        abstained: Whether the margin was smaller than asked for (``abstain``), or there was no winner.
        candidates_K: Indices of the K candidates that were in play for this image (K,), int64.
        scores_K: Mean error of each over the draws that it saw (K,), float64. Lower is better, but only candidates
            that saw equally many draws can be compared; infinite where the network returned NaN or infinity.
        differences_K: How much larger the mean error of each is than the winner's (K,), float64; 0 for the winner. Of a
            candidate that was dropped: its difference to the best one that stayed, over the draws that both had seen
            then, and from that one on likewise. So these are comparable, unlike scores over different draws. Infinite
            where the score is, and for all candidates if there is no winner.
        draws_K: Number of draws that each saw (K,), int64.
        nfe: Network calls spent on the image.
        dims: Number of values of x0, D; what a posterior needs besides the scores.
        timesteps_S: Timestep of each draw, in the order spent (S,).
        errors_KS: Every single error (K, S), float32, NaN where not evaluated; None unless ``keep_errors``.
        distances_SKK: Mean squared differences between the noise that two candidates predict (S, K, K), float32, NaN
            where not evaluated; None unless ``keep_distances``.
    """

    image_id: int | str
    label: int | None
    candidate: int | None
    margin: float
    abstained: bool
    candidates_K: Tensor
    scores_K: Tensor
    differences_K: Tensor
    draws_K: Tensor
    nfe: int
    dims: int
    timesteps_S: Tensor
    errors_KS: Tensor | None = None
    distances_SKK: Tensor | None = None

    @property
    def ranking(self) -> list[int]:
        """Positions 0 … K-1: the winner, those that stayed longer, and among them those with the lower score."""
        return np.lexsort(
            (self.scores_K.numpy(), -self.draws_K.numpy(), self.candidates_K.numpy() != self.candidate)
        ).tolist()
