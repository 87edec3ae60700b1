"""The decision about one image: what is asked next, what came back, who is out, who has won.

Pure numpy: a classifier asks a network for the errors, a replay a file. Both give the same decisions, because there is
no other place that makes them.

Shape suffixes: K candidates of an image, P of them in play, A contestants in play, S draws, R draws of a round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_diffclf.classifier.elimination import Elimination, Round
from lightning_diffclf.errors import UserError


@dataclass(frozen=True)
class Terms:
    """What the contests of a run have in common.

    Attributes:
        rule: Drops contestants.
        loss: Name of the error.
        log_snr_S: Log signal-to-noise ratio of each draw, in the order spent (S,), float64.
        weights_S: What each draw weighs in the score (S,), float64, mean 1.
        budget: Network calls for one image at most; None for no limit.
        logits: Whether errors are negative logits, which one network call gives of all candidates: then calls are
            counted by draw, and differences are nats as they are.
    """

    rule: Elimination
    loss: str
    log_snr_S: np.ndarray
    weights_S: np.ndarray
    budget: int | None = None
    logits: bool = False

    def check_budget(self, image_id: int | str, num_candidates: int, spent: int) -> None:
        """Raise ValueError unless the budget pays for one call of each candidate after ``spent`` calls."""
        if self.budget is not None and self.budget < spent + num_candidates:
            raise UserError(
                f"budget: {self.budget} network calls for the {num_candidates} candidates of image {image_id!r}, "
                f"expected at least {spent + num_candidates}: one for each{', and those of the proposal' * (spent > 0)}"
            )


class Contest:
    """One image's candidates against each other.

    It advances in rounds: the draws ``done`` … ``stop`` - 1 under the candidates ``playing``. :meth:`land` takes their
    errors, :func:`judge` asks the rule and begins the next round, until it is ``decided``.

    Contestants are the candidates; or, where ``class_K`` is given, their classes, whose errors are means over their
    candidates, so that these stay or go together and no rule knows of them. A candidate with a NaN or infinite error is
    out; a class is when all of its candidates are.

    Args:
        terms: What it has in common with others.
        num_candidates: Number of candidates K.
        class_K: Class of each candidate (K,), if classes are the contestants.
        spent: Network calls spent on the image already.

    Attributes:
        decided: Whether nothing is asked any more.
        playing: Positions of the candidates in play (P,), int64, ascending.
        scores_K: Mean weighted error of each candidate over its draws (K,), float64; infinite if it is out by NaN.
        draws_K: Draws that each candidate saw (K,), int64.
        nfe: Network calls spent on the image.
        spent: Those of them before the first round: of a search, or another proposal.
    """

    def __init__(self, terms: Terms, num_candidates: int, class_K: np.ndarray | None = None, spent: int = 0) -> None:
        self.terms, self.nfe, self.spent = terms, spent, spent
        self._contestant_K = np.arange(num_candidates)
        if class_K is not None and len(np.unique(class_K)) < num_candidates:
            self._contestant_K = np.unique(class_K, return_inverse=True)[1]
        self._num_contestants = int(self._contestant_K.max()) + 1
        self._state: Any = terms.rule.start(self._num_contestants)
        self.playing = np.arange(num_candidates)
        self._active_A = np.arange(self._num_contestants)
        self._sums_K, self.draws_K = np.zeros(num_candidates), np.zeros(num_candidates, dtype=np.int64)
        self._sums, self._draws = np.zeros(self._num_contestants), np.zeros(self._num_contestants, dtype=np.int64)
        self._history: list[tuple[int, np.ndarray, np.ndarray]] = []  # stop, contestants in play, their sums by then
        self._evidence = np.inf  # the least for the best contestant against one that was dropped, in nats per value
        self._errors_RA: np.ndarray | None = None  # of the round that has landed
        self._distances_RAA: np.ndarray | None = None
        self.done = self.stop = 0
        self.decided = False
        self._advance()

    @property
    def rows(self) -> int:
        """Network calls of this round."""
        return (self.stop - self.done) * len(self.playing)

    @property
    def scores_K(self) -> np.ndarray:
        return self._sums_K / self.draws_K

    def land(self, errors_RP: np.ndarray, distances_RPP: np.ndarray | None = None) -> np.ndarray:
        """Take the errors of this round (R, P), float32, and the distances between predictions if the rule needs them.

        Returns:
            Positions of the candidates that are out because an error is NaN or infinite.
        """
        weights_R1 = self.terms.weights_S[self.done : self.stop, None]
        self.nfe += len(errors_RP) if self.terms.logits else errors_RP.size
        self.draws_K[self.playing] = self.stop
        finite_P = np.isfinite(errors_RP).all(0)
        broken = self.playing[~finite_P]
        if len(broken):
            self._sums_K[broken] = np.inf
            self.playing, errors_RP = self.playing[finite_P], errors_RP[:, finite_P]
            if distances_RPP is not None:
                distances_RPP = distances_RPP[:, finite_P][:, :, finite_P]
        errors_RP = np.ascontiguousarray(errors_RP)  # sums depend on the order of memory, by a bit
        if distances_RPP is not None:
            distances_RPP = np.ascontiguousarray(distances_RPP)
        self._sums_K[self.playing] += (weights_R1 * errors_RP).sum(0)
        errors_RA, distances_RAA = errors_RP, distances_RPP
        self._active_A = self._contestant_K[self.playing]
        if self._num_contestants < len(self._contestant_K):
            self._active_A, errors_RA, distances_RAA = _averaged(self._active_A, errors_RP, distances_RPP)
        self._draws[self._active_A] = self.stop
        self._sums[self._active_A] += (weights_R1 * errors_RA).sum(0)
        self._history.append((self.stop, self._active_A, self._sums[self._active_A]))
        self._errors_RA, self._distances_RAA = errors_RA, distances_RAA
        return broken

    def round(self, dims: int) -> Round:
        """What the rule is shown of the round that has landed."""
        terms, spent = self.terms, slice(self.done, self.stop)
        return Round(
            terms.loss,
            self.stop,
            len(terms.weights_S),
            dims,
            self._active_A,
            self._sums[self._active_A] / self.stop,
            terms.log_snr_S[spent],
            terms.weights_S[spent],
            None if terms.rule.needs == "scores" else self._errors_RA,
            self._distances_RAA if terms.rule.needs == "distances" else None,
        )

    def keep(self, survives_A: np.ndarray) -> None:
        """Drop the others, and remember the weakest evidence that dropped one."""
        if not survives_A.all():
            self._weigh(~survives_A)
            self._active_A = self._active_A[survives_A]
            pools = self._num_contestants < len(self._contestant_K)
            stays_P = np.isin(self._contestant_K[self.playing], self._active_A) if pools else survives_A
            self.playing = self.playing[stays_P]

    def _weigh(self, rivals_A: np.ndarray) -> None:
        sums_A = self._sums[self._active_A]
        best = sums_A.argmin()
        rivals_A = rivals_A & (np.arange(len(sums_A)) != best)
        if rivals_A.any():
            gap = float(sums_A[rivals_A].min() - sums_A[best])
            scale = 1.0 if self.terms.logits else 2 * float(sums_A[best]) / self.stop + 1e-300
            self._evidence = min(self._evidence, gap / scale)

    def _advance(self) -> None:
        """Begin the next round, unless all is decided."""
        terms, total, in_play = self.terms, len(self.terms.weights_S), len(self._active_A)
        self.done, self._errors_RA, self._distances_RAA = self.stop, None, None
        if in_play == 0 or self.stop == total or in_play == 1 < self._num_contestants:
            self.decided = True
            return
        self.stop = terms.rule.next_stop(self.done, total)
        if terms.budget is not None:
            self.stop = min(self.stop, self.done + (terms.budget - self.nfe) // len(self.playing))
        self.decided = self.stop == self.done  # out of budget

    def decide(self, dims: int) -> Decision:
        """The winner, and how far the others are behind; ``dims`` is the number of values of x0."""
        behind = np.full(self._num_contestants, np.inf)
        if len(self._active_A) == 0:
            return Decision(None, np.inf, behind[self._contestant_K])
        best = int(self._active_A[self._sums[self._active_A].argmin()])
        self._weigh(np.ones(len(self._active_A), dtype=bool))
        behind[best] = 0
        whole = np.zeros(self._num_contestants, dtype=bool)  # not out by NaN
        whole[self._contestant_K[np.isfinite(self._sums_K)]] = True
        followed = 0
        for stop, active_A, sums_A in reversed(self._history):
            if len(active_A) == followed:  # nobody was dropped
                continue
            followed = len(active_A)
            stays_A = (self._draws[active_A] > stop) | (active_A == best)
            victor = np.where(stays_A & whole[active_A], sums_A, np.inf).argmin()
            drops_A = ~stays_A & whole[active_A]
            behind[active_A[drops_A]] = (sums_A[drops_A] - sums_A[victor]) / stop + behind[active_A[victor]]
        differences_K = np.where(np.isfinite(self._sums_K), behind[self._contestant_K], np.inf)
        own = np.flatnonzero((self._contestant_K == best) & np.isfinite(self._sums_K))
        return Decision(int(own[self._sums_K[own].argmin()]), self._evidence * dims, differences_K)


@dataclass(frozen=True)
class Decision:
    """Who has won.

    Attributes:
        winner: Position of the winning candidate; None if all are out.
        margin: Evidence for the winner's contestant against its closest rival, in nats.
        differences_K: How much larger the mean error of each candidate's contestant is than the winner's (K,), float64.
    """

    winner: int | None
    margin: float
    differences_K: np.ndarray


def judge(contests: Sequence[Contest], dims: int) -> None:
    """Ask the rule, which all contests share, about the rounds that have landed, and begin the next ones."""
    asked = [one for one in contests if len(one._active_A)]
    if asked:
        rounds = [one.round(dims) for one in asked]
        survivors = asked[0].terms.rule.survivors_of([one._state for one in asked], rounds)
        for one, survives_A in zip(asked, survivors, strict=True):
            one.keep(survives_A)
    for one in contests:
        one._advance()


def _averaged(
    contestant_P: np.ndarray, errors_RP: np.ndarray, distances_RPP: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Contestants in play (A,), their mean errors (R, A) and the distances of their mean predictions (R, A, A).

    With mean predictions p̄ and q̄ of two classes, ‖p̄ - q̄‖² is the mean of ‖p - q‖² over all pairs, less half of the mean
    over the pairs within each: what the noise in a difference of mean errors is made of, as with single predictions.
    """
    active_A, own_P = np.unique(contestant_P, return_inverse=True)
    mean_AP = (own_P == np.arange(len(active_A))[:, None]).astype(np.float64)
    mean_AP /= mean_AP.sum(1, keepdims=True)
    errors_RA = errors_RP @ mean_AP.T
    if distances_RPP is None:
        return active_A, errors_RA, None
    between_RAA = mean_AP @ distances_RPP @ mean_AP.T
    within_RA = np.diagonal(between_RAA, axis1=1, axis2=2)
    distances_RAA = between_RAA - (within_RA[:, :, None] + within_RA[:, None]) / 2
    return active_A, errors_RA, distances_RAA.clip(min=0)
