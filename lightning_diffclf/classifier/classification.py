"""The decision on one image."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.classifier.conformal import Conformal, nonconformity
from lightning_diffclf.classifier.contest import Contest
from lightning_diffclf.classifier.posterior import Posterior, class_differences
from lightning_diffclf.errors import check_at_least


@dataclass(frozen=True)
class Classification:
    """The decision on one image.

    Read probabilities here (:attr:`probabilities_K`, :meth:`top`): they are made of ``differences_K``. A softmax of
    ``scores_K`` is something else after elimination, because those are means over different draws.

    Attributes:
        image_id: Id under which the image was given.
        prediction: Class index of the winning candidate; None if the network returned NaN or infinity for all of them.
        candidate: Index of the winning candidate, or None.
        margin: Evidence for the winner against its closest rival in nats, at least 0:
            n · D · (rival's score - winner's) / (2 · winner's), after n draws. For ``l2`` this is the log likelihood
            ratio of two Gaussian residuals, optimistic where neighbouring values are correlated; for other errors it
            is a scale only. Of rivals that were dropped, it counts what there was when they were dropped. Infinite
            if there was no rival.
        abstained: Whether the margin was smaller than asked for (``abstain``), or there was no winner.
        candidates: All candidates of the denoiser, by name and class.
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
        reused: Errors that were known and took no call; a run without them would have made ``nfe + reused`` calls.
        dims: Number of values of x0, D; what a posterior needs besides the scores.
        timesteps_S: Timestep of each draw, in the order spent (S,).
        posterior: Turns differences into probabilities; ``dataclasses.replace(result, posterior=fitted)`` reads them by
            another.
        search_nfe: Network calls of the proposal that named its candidates; 0 without.
        dropped_draws: Draws of its search that did not count, since there was no finite gradient.
        errors_KS: Every single error (K, S), float32, NaN where not evaluated; None unless ``keep_errors``.
        distances_SKK: Mean squared differences between the noise that two candidates predict (S, K, K), float32, NaN
            where not evaluated; None unless ``keep_distances``.
    """

    image_id: int | str
    prediction: int | None
    candidate: int | None
    margin: float
    abstained: bool
    candidates: Candidates
    candidates_K: Tensor
    scores_K: Tensor
    differences_K: Tensor
    draws_K: Tensor
    nfe: int
    dims: int
    timesteps_S: Tensor
    posterior: Posterior = field(default_factory=Posterior)
    search_nfe: int = 0
    dropped_draws: int = 0
    errors_KS: Tensor | None = None
    distances_SKK: Tensor | None = None
    reused: int = 0

    @classmethod
    def of(
        cls,
        contest: Contest,
        image_id: int | str,
        candidates_K: np.ndarray,
        candidates: Candidates,
        abstain: float,
        dims: int,
        timesteps_S: Tensor,
        posterior: Posterior,
        dropped_draws: int = 0,
        errors_KS: np.ndarray | None = None,
        distances_SKK: np.ndarray | None = None,
        reused: int = 0,
    ) -> Classification:
        """What a decided contest amounts to; ``candidates`` are all those of the denoiser."""
        decision = contest.decide(dims)
        candidate = None if decision.winner is None else int(candidates_K[decision.winner])
        return cls(
            image_id=image_id,
            prediction=None if candidate is None else candidates.classes[candidate],
            candidate=candidate,
            margin=decision.margin,
            abstained=candidate is None or decision.margin < abstain,
            candidates=candidates,
            candidates_K=torch.from_numpy(candidates_K.copy()),
            scores_K=torch.from_numpy(contest.scores_K),
            differences_K=torch.from_numpy(decision.differences_K),
            draws_K=torch.from_numpy(contest.draws_K),
            nfe=contest.nfe - reused,
            dims=dims,
            timesteps_S=timesteps_S,
            posterior=posterior,
            search_nfe=contest.spent,
            dropped_draws=dropped_draws,
            errors_KS=None if errors_KS is None else torch.from_numpy(errors_KS),
            distances_SKK=None if distances_SKK is None else torch.from_numpy(distances_SKK),
            reused=reused,
        )

    @property
    def ranking(self) -> list[int]:
        """Positions 0 … K-1: the winner, those that stayed longer, and among them those that are less behind it."""
        loses_K = self.candidates_K.numpy() != self.candidate
        return np.lexsort((self.scores_K.numpy(), self.differences_K.numpy(), -self.draws_K.numpy(), loses_K)).tolist()

    @property
    def names(self) -> list[str]:
        """Name of each candidate that was in play, K of them."""
        return [self.candidates.names[k] for k in self.candidates_K.tolist()]

    @property
    def probabilities_K(self) -> Tensor:
        """Probability of the class of each candidate that was in play (K,), float64.

        They sum to one over classes: over candidates, unless several belong to one class, which then all have its
        probability. No class is likelier than the one decided for. What the numbers mean, and how they are calibrated,
        says :class:`~.posterior.Posterior`.
        """
        classes_K = self._classes_K
        return self._probabilities_C[torch.searchsorted(classes_K.unique(), classes_K)]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """Names and probabilities of the ``k`` likeliest classes, or of all if there are fewer; the winner first.

        Raises:
            ValueError: if ``k`` is below 1.
        """
        check_at_least(1, top=k)
        names, known = self.candidates.class_names, self._classes_K.unique().tolist()
        place = {c: rank for rank, c in reversed(list(enumerate(self._classes_K[self.ranking].tolist())))}
        likely = sorted(
            zip(known, self._probabilities_C.tolist(), strict=True), key=lambda one: (-one[1], place[one[0]])
        )
        return [(names[c], probability) for c, probability in likely[:k]]

    def conforming(self, conformal: Conformal) -> list[str]:
        """Names of the classes in the conformal set of this image, the likeliest first; there may be none.

        Args:
            conformal: Calibrated on decisions of the same network and recipe on other images.
        """
        classes_C, class_K = self._classes_K.unique(return_inverse=True)
        differences_1C = class_differences(self.differences_K[None], class_K[None], len(classes_C)).numpy()
        member_C = conformal(nonconformity(differences_1C), classes_C[None].numpy())[0]
        names = {self.candidates.class_names[c] for c in classes_C.numpy()[member_C].tolist()}
        return [name for name, _ in self.top(len(classes_C)) if name in names]

    @property
    def _classes_K(self) -> Tensor:
        return torch.tensor(self.candidates.classes)[self.candidates_K]

    @property
    def _probabilities_C(self) -> Tensor:
        """Probability of each class in play, in the order of their indices (C,)."""
        classes_C, class_K = self._classes_K.unique(return_inverse=True)
        # A rule may drop a candidate that was ahead; it is then no likelier than the winner.
        behind_K = self.differences_K.clamp(min=0)
        return self.posterior(class_differences(behind_K[None], class_K[None], len(classes_C)), self.dims)[0]

    @property
    def label(self) -> int | None:
        """Former name of :attr:`prediction`."""
        warnings.warn("Classification.label is now called prediction", FutureWarning, stacklevel=2)
        return self.prediction
