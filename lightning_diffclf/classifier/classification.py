"""The decision on one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.contest import Contest


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
        differences_K: How much larger the mean error of each is than the winner's (K,), float64; 0 for the winner.
            Where means over the candidates of a class decide, those of their classes. Of a candidate that was dropped:
            its difference to the best one that stayed, over the draws that both had seen then, and from that one on
            likewise. So these are comparable, unlike scores over different draws. Infinite where the score is, and for
            all candidates if there is no winner.
        draws_K: Number of draws that each saw (K,), int64.
        nfe: Network calls spent on the image, ``search_nfe`` of them to find its candidates.
        dims: Number of values of x0, D; what a posterior needs besides the scores.
        timesteps_S: Timestep of each draw, in the order spent (S,).
        search_nfe: Network calls of the proposal that named its candidates; 0 without.
        dropped_draws: Draws of its search that did not count, since there was no finite gradient.
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
    search_nfe: int = 0
    dropped_draws: int = 0
    errors_KS: Tensor | None = None
    distances_SKK: Tensor | None = None

    @classmethod
    def of(
        cls,
        contest: Contest,
        image_id: int | str,
        candidates_K: np.ndarray,
        classes: Sequence[int],
        abstain: float,
        dims: int,
        timesteps_S: Tensor,
        dropped_draws: int = 0,
        errors_KS: np.ndarray | None = None,
        distances_SKK: np.ndarray | None = None,
    ) -> Classification:
        """What a decided contest amounts to; ``classes`` are those of all candidates of the denoiser."""
        decision = contest.decide(dims)
        candidate = None if decision.winner is None else int(candidates_K[decision.winner])
        return cls(
            image_id=image_id,
            label=None if candidate is None else classes[candidate],
            candidate=candidate,
            margin=decision.margin,
            abstained=candidate is None or decision.margin < abstain,
            candidates_K=torch.from_numpy(candidates_K.copy()),
            scores_K=torch.from_numpy(contest.scores_K),
            differences_K=torch.from_numpy(decision.differences_K),
            draws_K=torch.from_numpy(contest.draws_K),
            nfe=contest.nfe,
            dims=dims,
            timesteps_S=timesteps_S,
            search_nfe=contest.spent,
            dropped_draws=dropped_draws,
            errors_KS=None if errors_KS is None else torch.from_numpy(errors_KS),
            distances_SKK=None if distances_SKK is None else torch.from_numpy(distances_SKK),
        )

    @property
    def ranking(self) -> list[int]:
        """Positions 0 … K-1: the winner, those that stayed longer, and among them those that are less behind it."""
        loses_K = self.candidates_K.numpy() != self.candidate
        return np.lexsort((self.scores_K.numpy(), self.differences_K.numpy(), -self.draws_K.numpy(), loses_K)).tolist()
