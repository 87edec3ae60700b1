"""Sequential tests: rules with a stated probability of deciding otherwise than all draws would.

Shape suffixes: F images, A contestants in play, R draws of a round, N draws so far, X sums over draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lightning_diffclf.classifier.elimination import Elimination, Needs, Round
from lightning_diffclf.errors import UserError


class _Paired:
    """What a sequential test remembers about one image: something of each candidate, or of each pair."""

    def __init__(self) -> None:
        self.spent = 0.0  # of alpha
        self._active_A = np.empty(0, dtype=np.int64)
        self.log_snr_N = np.empty(0)  # PairedTest: of the draws so far
        self.errors_NA = np.empty((0, 0))  # and their weighted errors
        self.sums_XAA = np.zeros((0, 0, 0))  # LikelihoodRatio: sums over draws for each pair

    def narrow(self, active_A: np.ndarray) -> None:
        """Forget what went out of play since the stop before."""
        if len(self._active_A) == 0:
            self.errors_NA = np.empty((0, len(active_A)))
        elif len(active_A) < len(self._active_A):
            stays = np.searchsorted(self._active_A, active_A)
            self.errors_NA = self.errors_NA[:, stays]
            if self.sums_XAA.size:
                self.sums_XAA = self.sums_XAA[:, stays[:, None], stays]
        self._active_A = active_A


@dataclass(frozen=True)
class SequentialTest(Elimination):
    """What :class:`PairedTest` and :class:`LikelihoodRatio` share: how the accepted error is spent.

    At each stop, every rival of the best candidate has a probability that the draws to come would turn their order
    round. The rivals least likely to come back are dropped: all of them, if they have together at most what is left of
    ``alpha``, or else as many as have at most half of it. So the probabilities of all that are ever dropped add up to
    no more than ``alpha``, however many candidates and stops there are.

    Args:
        alpha: Accepted probability that the decision differs from that of all draws, in (0, 0.5).
        growth: The rule is asked again when the draws have grown by this factor, or by one; 1 is after each draw.
            Larger rounds fill micro-batches better when few images are left, and spend a few draws more.

    Raises:
        ValueError: if ``alpha`` or ``growth`` is out of range.
    """

    alpha: float = 0.01
    growth: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 0.5:
            raise UserError(f"{type(self).__name__}: alpha {self.alpha}, expected a probability in (0, 0.5)")
        if not 1 <= self.growth < np.inf:
            raise UserError(f"{type(self).__name__}: growth {self.growth}, expected a number from 1 on")

    def start(self, num_candidates: int) -> Any:
        return _Paired()

    def next_stop(self, done: int, total: int) -> int:
        return min(total, max(done + 1, int(done * self.growth)))

    def reversal(self, states: Sequence[Any], rounds: Sequence[Round], best_F: np.ndarray) -> np.ndarray:
        """Probability that a candidate ends with a lower score than the best one (F, A), of F images with R × A errors.

        What it says of the best ones themselves, at ``best_F``, is not read.
        """
        raise NotImplementedError

    def remember(self, states: Sequence[Any], rounds: Sequence[Round], survivors: Sequence[np.ndarray]) -> None:
        """Take note of what later stops need of these rounds, now that it is known who survives."""

    def survivors(self, state: Any, current: Round) -> np.ndarray:
        return self.survivors_of([state], [current])[0]

    def survivors_of(self, states: Sequence[Any], rounds: Sequence[Round]) -> list[np.ndarray]:
        result = [np.ones(len(current.active_A), dtype=bool) for current in rounds]
        alike: dict[tuple[int, int], list[int]] = {}
        for i, current in enumerate(rounds):
            if len(current.active_A) > 1:
                alike.setdefault((len(current.weights_R), len(current.active_A)), []).append(i)
        for members in alike.values():
            images = np.arange(len(members))
            some = [states[i] for i in members]
            best_F = np.stack([rounds[i].scores_A for i in members]).argmin(1)
            reversal_FA = self.reversal(some, [rounds[i] for i in members], best_F)
            reversal_FA[images, best_F] = np.inf
            order_FA = reversal_FA.argsort(1, kind="stable")
            sorted_FA = np.take_along_axis(reversal_FA, order_FA, 1)
            spent_FA = sorted_FA.cumsum(1)
            left_F = self.alpha - np.array([state.spent for state in some])
            # The last duel may spend all: where that drops every rival, there is nothing to keep any of it for.
            allowed_F = np.where(spent_FA[:, -2] <= left_F, left_F, left_F / 2)
            drops_FA = spent_FA <= allowed_F[:, None]
            added_F = np.where(drops_FA, sorted_FA, 0).sum(1)
            survives_FA = np.empty_like(drops_FA)
            np.put_along_axis(survives_FA, order_FA, ~drops_FA, 1)
            for i, state, added, survives_A in zip(members, some, added_F.tolist(), survives_FA, strict=True):
                state.spent += added
                result[i] = survives_A
        self.remember(states, rounds, result)
        return result


@dataclass(frozen=True)
class PairedTest(SequentialTest):
    """Sequential t-tests on paired differences (after Clark & Jaini 2023).

    All candidates see the same draws, so the difference of two errors varies far less than the errors themselves. Each
    rival k of the best candidate b has a mean difference m = mean(e_k - e_b) over n of the S draws. If these are a
    sample of all, the mean over all S draws has the other sign with the probability that a variable with Student's
    t distribution is below

        -m · sqrt(n) / s · sqrt(S / (S - n)).

    s² is the variance of the differences, pooled over the A - 1 rivals so that two draws already serve. Differences
    change with the timestep, but draws cover the timesteps evenly, so that this does not make their mean uncertain: s²
    is half the mean squared change from one draw to the next on the time axis (the successive difference estimator for
    systematic samples, Wolter 2007, chapter 8). It has 2 (n-1)² / (3n-4) degrees of freedom for one rival (von Neumann
    et al. 1941) and 4 (A-1) / (A+2) times as many for all, because their differences share the best one's noise and so
    have a correlation of 1/2. The last factor says that the final mean contains these n draws (finite population
    correction).

    Args:
        alpha: Accepted probability that the decision differs from that of all draws, in (0, 0.5).
        growth: The rule is asked again when the draws have grown by this factor, or by one; 1 is after each draw.

    Raises:
        ValueError: if ``alpha`` or ``growth`` is out of range.
    """

    needs: ClassVar[Needs] = "errors"

    def reversal(self, states: Sequence[_Paired], rounds: Sequence[Round], best_F: np.ndarray) -> np.ndarray:
        return np.stack([self._reversal(*one) for one in zip(states, rounds, best_F, strict=True)])

    def _reversal(self, state: _Paired, current: Round, best: int) -> np.ndarray:
        from scipy.special import stdtr  # slow to import: only those who decide wait for it

        assert current.errors_RA is not None
        state.narrow(current.active_A)
        state.log_snr_N = np.concatenate([state.log_snr_N, current.log_snr_R])
        state.errors_NA = np.concatenate([state.errors_NA, current.weights_R[:, None] * current.errors_RA])
        n, num_rivals = len(state.errors_NA), len(current.active_A) - 1
        if n < 2:
            return np.ones(len(current.active_A))
        differences_NA = state.errors_NA - state.errors_NA[:, [best]]
        changes_NA = np.diff(differences_NA[np.argsort(state.log_snr_N)], axis=0)
        pooled = np.square(changes_NA).sum() / (2 * (n - 1) * num_rivals)
        freedom = 2 * (n - 1) ** 2 / (3 * n - 4) * 4 * num_rivals / (num_rivals + 3)
        unseen = 1 - n / current.total
        return stdtr(freedom, -differences_NA.mean(0) / np.sqrt(pooled / n * unseen + TINY))


TINY = 1e-300  # instead of a division by zero where two candidates predict the same
PRIOR_DRAWS = 10  # so many draws with residuals as assumed are believed beforehand: one image says little


@dataclass(frozen=True)
class LikelihoodRatio(SequentialTest):
    """Sequential tests that know the noise of a difference from a single draw; docs/elimination.md derives them.

    With r = noise - (what the best candidate b predicts) and Δ = (b's prediction) - (k's), the squared errors of one
    draw differ by ‖r + Δ‖² - ‖r‖² = ‖Δ‖² + 2 Δ·r. The noise in it is 2 Δ·r, whose variance is 4 s² ‖Δ‖² if r is
    noise of variance s² = mean(r²), unrelated to Δ. Both are known from the network's outputs, so no repetition is
    needed: candidates that predict something else fall after one draw, and only real rivals go on. After n of S
    draws, the order of b and k is turned round by the rest with probability

        Φ(-D / sqrt(c · Σ 4 s² ‖Δ‖² · (S - n) / S)),      D = Σ ‖noise - k's‖² - ‖noise - b's‖².

    ``c`` is 1 for residuals as assumed. It is measured on every image, from how much the differences vary about
    their fit by ‖Δ‖², and taken if it is larger than ``inflation``. For l1 and huber, 4 s² is replaced by the mean
    square of the loss's derivative. How ``alpha`` is spent: :class:`SequentialTest`.

    Args:
        alpha: Accepted probability that the decision differs from that of all draws, in (0, 0.5).
        growth: The rule is asked again when the draws have grown by this factor, or by one; 1 is after each draw.
            Larger rounds fill micro-batches better when few images are left, and spend a few draws more.
        inflation: Least c, at least 0. If omitted, what the search of the recipe measured when it was fitted (see
            :class:`~.covariance_search.CovarianceSearch`), or else 1. For other runs,
            :func:`~lightning_diffclf.results.replay.measure_inflation` measures it.

    Raises:
        ValueError: if ``alpha``, ``growth`` or ``inflation`` is out of range.
    """

    inflation: float | None = None
    needs: ClassVar[Needs] = "distances"
    losses: ClassVar[tuple[str, ...]] = ("l2", "l1", "huber")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inflation is not None and not 0 <= self.inflation < np.inf:
            raise UserError(f"{type(self).__name__}: inflation {self.inflation}, expected a number from 0 on")

    def check(self, loss: str) -> None:
        if loss not in self.losses:
            raise UserError(
                f"{type(self).__name__}: loss {loss!r} is no distance between noises, expected one of {self.losses}; "
                "PairedTest takes any"
            )

    def informed(self, inflation: float | None) -> LikelihoodRatio:
        return self if self.inflation is not None or inflation is None else replace(self, inflation=inflation)

    def reversal(self, states: Sequence[_Paired], rounds: Sequence[Round], best_F: np.ndarray) -> np.ndarray:
        from scipy.special import ndtr  # slow to import: only those who decide wait for it

        images = np.arange(len(states))
        e_FRA = np.array([current.errors_RA for current in rounds], dtype=np.float64)
        g_FRA = np.array(
            [current.distances_RAA[:, best] for current, best in zip(rounds, best_F, strict=True)]  # type: ignore[index]
        )
        weights_FR = np.array([current.weights_R for current in rounds])
        e_FR1 = e_FRA[images, :, best_F][:, :, None]
        sums_FXA = _pair_sums(rounds[0], weights_FR, e_FR1, e_FRA - e_FR1, g_FRA)
        for state, current, best, sums_XA in zip(states, rounds, best_F, sums_FXA, strict=True):
            state.narrow(current.active_A)
            if state.sums_XAA.size:  # of earlier draws
                sums_XA += state.sums_XAA[:, best]
        variance_FA, *products = np.moveaxis(sums_FXA, 1, 0)
        misfit_FA = _misfit(*products)
        n_F = np.array([current.done for current in rounds])
        scores_FA = np.stack([current.scores_A for current in rounds])
        num_rivals = scores_FA.shape[1] - 1
        least = 1.0 if self.inflation is None else self.inflation
        measured_F = (PRIOR_DRAWS * least + misfit_FA.sum(1) / num_rivals) / (PRIOR_DRAWS + n_F - 1)
        unseen_F = 1 - n_F / rounds[0].total
        scale_F = np.maximum(least, measured_F) * unseen_F
        difference_FA = n_F[:, None] * (scores_FA - scores_FA[images, best_F][:, None])
        return ndtr(-difference_FA / np.sqrt(scale_F[:, None] * variance_FA + TINY))

    def remember(self, states: Sequence[_Paired], rounds: Sequence[Round], survivors: Sequence[np.ndarray]) -> None:
        # Any survivor may be the best one at a later stop: all pairs of them, and no others.
        alike: dict[tuple[int, ...], list[tuple[_Paired, Round, np.ndarray, np.ndarray]]] = {}
        for state, current, survives_A in zip(states, rounds, survivors, strict=True):
            stays = survives_A.nonzero()[0]
            if len(stays) > 1 and current.done < current.total:
                assert current.errors_RA is not None
                assert current.distances_RAA is not None
                state.narrow(current.active_A[stays])
                errors_RA, distances_RAA = current.errors_RA, current.distances_RAA
                if len(stays) < len(survives_A):
                    errors_RA, distances_RAA = errors_RA[:, stays], distances_RAA[:, stays[:, None], stays]
                alike.setdefault(errors_RA.shape, []).append((state, current, errors_RA, distances_RAA))
        for members in alike.values():
            e_FRA = np.array([errors_RA for _, _, errors_RA, _ in members], dtype=np.float64)
            g_FRAA = np.array([distances_RAA for _, _, _, distances_RAA in members])
            weights_FR = np.array([current.weights_R for _, current, _, _ in members])
            d_FRAA = e_FRA[:, :, None, :] - e_FRA[:, :, :, None]
            added_FXAA = _pair_sums(members[0][1], weights_FR, e_FRA[..., None], d_FRAA, g_FRAA)
            for (state, *_), added_XAA in zip(members, added_FXAA, strict=True):
                state.sums_XAA = state.sums_XAA + added_XAA if state.sums_XAA.size else added_XAA


def _misfit(dd: np.ndarray, dg: np.ndarray, gg: np.ndarray) -> np.ndarray:
    """What a fit of d by a multiple of g leaves of Σ d²/v: n - 1 on average over n draws, if the variance is v."""
    return dd - dg**2 / (gg + TINY)


def inflation_of(loss: str, dims: int, errors_SK: np.ndarray, distances_SKK: np.ndarray) -> float:
    """The ``c`` of :class:`LikelihoodRatio` for one image, from all of its draws: winner against runner-up.

    Args:
        loss: Name of the error.
        dims: Number of values of x0.
        errors_SK: Error of each draw and candidate, at least two of each.
        distances_SKK: Mean squared differences between predictions, in the same order.
    """
    best, rival = np.argsort(errors_SK.mean(0), kind="stable")[:2]
    e_S = errors_SK[:, best].astype(np.float64)
    one = Round(loss, 0, 0, dims, *[np.empty(0)] * 4)  # of which only the loss and the dimensions are read
    d_S, g_S = errors_SK[:, rival] - e_S, distances_SKK[:, best, rival]
    sums_1X = _pair_sums(one, np.ones((1, len(e_S))), e_S[None], d_S[None], g_S[None])
    return float(_misfit(*sums_1X[0, 1:])) / (len(e_S) - 1)


def _pair_sums(of: Round, weights_FR: np.ndarray, e_b: np.ndarray, d: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Sums over the draws of a round for pairs of candidates (b, k), whatever their arrangement: (F, 4, …).

    The first is the variance of the weighted difference of errors if b is right. The others are the sums of d²/v,
    dg/v and g²/v, where v is the variance of d.

    Args:
        of: Any of the rounds: says the loss and the number of values of x0.
        weights_FR: Weight of each draw.
        e_b: Error of b (F, R, …).
        d: Error of k less that of b (F, R, …).
        g: Squared distance of their predictions (F, R, …).
    """
    # Mean square of the loss's derivative at b's residual; huber's is at most twice the loss, and at most one.
    slope = 4 * e_b if of.loss == "l2" else np.ones_like(e_b) if of.loss == "l1" else np.minimum(2 * e_b, 1)
    unit = np.maximum(slope, 1e-12) / of.dims  # v / g
    v, relative = unit * g, d / unit
    sums = np.empty((len(d), 4, *d.shape[2:]))
    np.einsum("fr,fr...->f...", weights_FR**2, v, out=sums[:, 0])
    np.einsum("fr...,fr...->f...", d, d / (v + TINY), out=sums[:, 1])
    np.sum(relative, 1, out=sums[:, 2])
    np.sum(g / unit, 1, out=sums[:, 3])
    return sums
