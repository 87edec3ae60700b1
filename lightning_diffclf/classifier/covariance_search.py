"""Below one call per candidate, without gradients: the errors of a few candidates tell those of all others.

Suffixes of shapes: B images, K candidates, A candidates that were evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier
from lightning_diffclf.classifier.draws import Draws
from lightning_diffclf.classifier.search import Found, Search, check_kept, groups_of, heaviest
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import digest_of_tensor


class CovarianceSearch(Search):
    """Proposes candidates by how their errors vary together over images: neither labels nor gradients.

    :meth:`fit` evaluates all candidates of some images without labels at one draw each. The log likelihoods
    -D/2 · log e (e: mean squared error of the noise, D: values of x0) of an image then are taken to be normal, with the
    mean and the covariance found there. To propose for another image, a few anchors are evaluated at one draw, and all
    others are predicted given them (as in kriging); then the best ones by prediction are evaluated, at the same draw,
    and all are predicted again, some times over. Those with most of the weight are proposed. See docs/elimination.md.

    Results depend on (seed, image id, image, candidates) and on what it was fitted to. The draw is its own.

    Args:
        anchors: Candidates to evaluate first: those that tell most about all others.
        rounds: Times that more are chosen.
        each: How many each time. Images with no more than ``anchors + rounds · each`` candidates are not searched.
        miss: Candidates are kept until the weight of all others is below this, in (0, 1).
        least: Candidates to keep at least.
        most: Candidates to keep at most.
        temper: Share of the predicted nats that makes weights, above 0: one draw is not all of them.
        nugget: Variance that is no candidate's in common with others, in units of the mean variance, above 0.

    Raises:
        ValueError: if a setting is out of range.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (
        "anchors",
        "rounds",
        "each",
        "miss",
        "least",
        "most",
        "temper",
        "nugget",
    )

    def __init__(
        self,
        anchors: int = 20,
        rounds: int = 4,
        each: int = 5,
        miss: float = 0.02,
        least: int = 2,
        most: int = 64,
        temper: float = 0.2,
        nugget: float = 0.02,
    ) -> None:
        for name, count, lowest in (("anchors", anchors, 1), ("rounds", rounds, 0), ("each", each, 1)):
            if count < lowest:
                raise UserError(f"covariance search: {name} {count}, expected at least {lowest}")
        check_kept("covariance search", miss, least, most)
        for name, value in (("temper", temper), ("nugget", nugget)):
            if not 0 < value < math.inf:
                raise UserError(f"covariance search: {name} {value}, expected a number above 0")
        self.anchors, self.rounds, self.each = anchors, rounds, each
        self.miss, self.least, self.most, self.temper, self.nugget = miss, least, most, temper, nugget
        self._mean_K: np.ndarray | None = None
        self._factor_FK = np.empty((0, 0))  # the covariance is its transpose times itself
        self._own = 0.0  # variance that candidates have not in common
        self._anchors_A = np.empty(0, dtype=np.int64)

    def __repr__(self) -> str:
        return f"CovarianceSearch({', '.join(f'{name}={getattr(self, name)!r}' for name in self.SETTINGS)})"

    def fit(
        self, denoiser: ConditionalDenoiser, images: Tensor, seed: int = 0, microbatch: int = 256
    ) -> CovarianceSearch:
        """Learn from images without labels, one call for each candidate of each; returns itself.

        Args:
            denoiser: The network.
            images: (B, C, H, W), as ``denoiser.encode`` takes them, at least two: about 100.
            seed: Key of the noise.
            microbatch: Rows in one network call.

        Raises:
            ValueError: if there is one image or none, or an error is NaN or infinite.
        """
        if len(images) < 2:
            raise UserError(f"covariance search: {len(images)} images to fit to, expected at least 2")
        every, ids = list(range(len(denoiser.candidates))), [f"fit: {b}" for b in range(len(images))]
        nats_BK = np.stack(self._nats(denoiser, images, ids, [every] * len(images), seed, microbatch))
        if not np.isfinite(nats_BK).all():
            raise UserError(
                "covariance search: errors of the images to fit to are NaN or infinite, expected finite ones"
            )
        self._take(nats_BK.mean(0), (nats_BK - nats_BK.mean(0)) / math.sqrt(len(images) - 1))
        return self

    def _take(self, mean_K: np.ndarray, factor_FK: np.ndarray) -> None:
        # Rounded to what is saved, so that proposals are the same after saving.
        self._mean_K, self._factor_FK = (one.astype(np.float32).astype(np.float64) for one in (mean_K, factor_FK))
        self._own = self.nugget * float(np.square(self._factor_FK).sum(0).mean()) + 1e-300
        # Each anchor is the candidate that varies most given those before it (pivoted Cholesky decomposition).
        left_FK, chosen = self._factor_FK, []
        for _ in range(min(self.anchors, *left_FK.shape)):
            pivot = int(np.square(left_FK).sum(0).argmax())
            direction = left_FK[:, pivot] / max(float(np.linalg.norm(left_FK[:, pivot])), 1e-300)
            left_FK = left_FK - direction[:, None] * (direction @ left_FK)
            chosen.append(pivot)
        self._anchors_A = np.unique(np.array(chosen, dtype=np.int64))

    @staticmethod
    def _nats(
        denoiser: ConditionalDenoiser,
        images: Tensor,
        ids: Sequence[str],
        candidates: Sequence[Sequence[int]],
        seed: int,
        microbatch: int,
    ) -> list[np.ndarray]:
        """Log likelihoods of each image's candidates at its one draw, float64."""
        one = DiffusionClassifier(denoiser, Draws(1, seed), keep_errors=True, microbatch=microbatch)
        found = []
        for result in one(images, ids, candidates):
            assert result.errors_KS is not None
            with np.errstate(divide="ignore"):
                found.append(-result.dims / 2 * np.log(result.errors_KS[:, 0].double().numpy()))
        return found

    def predicted(self, evaluated_A: np.ndarray, nats_A: np.ndarray) -> np.ndarray:
        """Expected log likelihoods of all candidates (K,), given those of some, which stay as they are.

        Raises:
            ValueError: before :meth:`fit`.
        """
        if self._mean_K is None:
            raise UserError("covariance search: not fitted; call fit or load_state_dict first")
        mean_K, factor_FK = self._mean_K, self._factor_FK
        known_FA = factor_FK[:, evaluated_A]
        covariance_AA = known_FA.T @ known_FA + self._own * np.eye(len(evaluated_A))
        found_K = mean_K + (known_FA @ np.linalg.solve(covariance_AA, nats_A - mean_K[evaluated_A])) @ factor_FK
        found_K[evaluated_A] = nats_A
        return np.asarray(found_K)

    def propose(
        self,
        classifier: DiffusionClassifier,
        images: Tensor,
        ids: Sequence[int | str],
        candidates: Sequence[np.ndarray],
    ) -> Found:
        """As :meth:`Search.propose`. Where an error is NaN or infinite, the draw is dropped and all candidates stay.

        Raises:
            ValueError: before :meth:`fit`, or if it was fitted to another number of candidates.
        """
        count, fitted = len(classifier.denoiser.candidates), len(self.predicted(np.empty(0, np.int64), np.empty(0)))
        if fitted != count:
            raise UserError(f"covariance search: fitted to {fitted} candidates, found {count}")
        found, nfe, dropped = list(candidates), [0] * len(ids), [0] * len(ids)
        fewest = max(2, self.least, self.anchors + self.rounds * self.each)
        searched = [b for b, one in enumerate(candidates) if len(one) > fewest]
        seen = {b: (np.empty(0, np.int64), np.empty(0)) for b in searched}
        for number in range(self.rounds + 1):
            asked = [self._next(number, candidates[b], *seen[b]) for b in searched]
            some = [(b, one) for b, one in zip(searched, asked, strict=True) if len(one)]
            if some:
                rows, named = [b for b, _ in some], [f"covariance: {ids[b]}" for b, _ in some]
                lists = [one.tolist() for _, one in some]
                seed, microbatch = classifier.draws.seed, classifier.microbatch
                new = self._nats(classifier.denoiser, images[rows], named, lists, seed, microbatch)
                for (b, one), nats_A in zip(some, new, strict=True):
                    seen[b] = np.concatenate([seen[b][0], one]), np.concatenate([seen[b][1], nats_A])
        group_of = groups_of(classifier)
        for b in searched:
            evaluated_A, nats_A = seen[b]
            nfe[b] = len(evaluated_A)
            if not np.isfinite(nats_A).all():
                dropped[b] = 1
                continue
            nats_K = self.temper * self.predicted(evaluated_A, nats_A)[candidates[b]]
            weights_K = np.exp(nats_K - nats_K.max())
            weights_K /= weights_K.sum()
            found[b] = heaviest(weights_K, candidates[b], group_of, self.miss, self.least, self.most)
        return Found(found, nfe, dropped)

    def _next(self, number: int, in_play: np.ndarray, evaluated_A: np.ndarray, nats_A: np.ndarray) -> np.ndarray:
        """Candidates to evaluate in a round, ascending; none after an error that is NaN or infinite."""
        if number == 0:
            return np.intersect1d(self._anchors_A, in_play)
        left = np.setdiff1d(in_play, evaluated_A)
        if not np.isfinite(nats_A).all():
            return left[:0]
        predicted = self.predicted(evaluated_A, nats_A)[left]
        return np.sort(left[np.argsort(-predicted, kind="stable")[: self.each]])

    def identity(self) -> dict[str, Any]:
        """What proposals depend on beside the denoiser."""
        learnt = {name: digest_of_tensor(value) for name, value in self.state_dict().items()}
        return {name: getattr(self, name) for name in self.SETTINGS} | learnt

    def state_dict(self) -> dict[str, Tensor]:
        """What it has learnt, for saving."""
        if self._mean_K is None:
            return {}
        learnt = {"mean": self._mean_K, "factor": self._factor_FK}
        return {name: torch.from_numpy(value.astype(np.float32)) for name, value in learnt.items()}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what another one has learnt."""
        self._take(state_dict["mean"].numpy(), state_dict["factor"].numpy())
