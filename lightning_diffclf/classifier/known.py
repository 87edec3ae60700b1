"""Errors that an earlier run has computed, taken in place of network calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class KnownRound(NamedTuple):
    """What is known of a round of R draws under P candidates.

    Attributes:
        known_RP: Whether an error is known (R, P), bool.
        errors_RP: The errors (R, P), float32; NaN where they are not known.
        distances_RPP: Distances between predictions (R, P, P), float32, of the draws that are known; None if not asked
            for.
    """

    known_RP: np.ndarray
    errors_RP: np.ndarray
    distances_RPP: np.ndarray | None


@dataclass(frozen=True)
class KnownErrors:
    """Errors of one image, by draws that begin as those of the run that takes them.

    They stand for what the network would say, to the bit: whoever gives them has made sure that they are of the same
    network, image, noise and timesteps. A NaN among them is what the network said.

    Attributes:
        candidates_K: Indices of its candidates (K,), int64.
        draws_K: How many draws are known of each (K,), int64.
        errors_SK: Errors (S, K), float32, draws in the order spent.
        distances_SP: Mean squared differences between what two candidates predict (S, K (K-1) / 2), float32, in the
            order of ``np.triu_indices(K, 1)``; None if not known.
    """

    candidates_K: np.ndarray
    draws_K: np.ndarray
    errors_SK: np.ndarray
    distances_SP: np.ndarray | None = None

    def of_round(self, candidates_P: np.ndarray, first: int, stop: int, distances: bool) -> KnownRound:
        """What is known of draws ``first`` … ``stop`` - 1 under some candidates, given by their indices (P,).

        Args:
            candidates_P: The candidates in play.
            first: The first draw.
            stop: The draw after the last one.
            distances: Whether distances are needed as well. Then a draw is known only if all that play in it are.
        """
        column_of = {candidate: column for column, candidate in enumerate(self.candidates_K.tolist())}
        column_P = np.array([column_of.get(candidate, -1) for candidate in candidates_P.tolist()])
        draw_R1 = np.arange(first, stop)[:, None]
        known_RP = (column_P >= 0) & (draw_R1 < np.minimum(self.draws_K, len(self.errors_SK))[column_P])
        if distances:
            known_RP &= known_RP.all(1, keepdims=True) & (self.distances_SP is not None)
        errors_RP = np.full(known_RP.shape, np.nan, dtype=np.float32)
        row, place = np.nonzero(known_RP)
        errors_RP[known_RP] = self.errors_SK[first + row, column_P[place]]
        distances_RPP = None
        if distances:
            distances_RPP = np.full((*known_RP.shape, len(column_P)), np.nan, dtype=np.float32)
            whole_R = known_RP.all(1)
            if self.distances_SP is not None and whole_R.any():
                stored_RP = self.distances_SP[first + np.flatnonzero(whole_R)]
                distances_RPP[whole_R] = distances_between(stored_RP, pair_of(len(self.candidates_K)), column_P)
        return KnownRound(known_RP, errors_RP, distances_RPP)


def pair_of(num_candidates: int) -> np.ndarray:
    """Where the pair (i, j) is stored (K, K), int64; 0 on the diagonal, which is not."""
    pair_KK = np.zeros((num_candidates, num_candidates), dtype=np.int64)
    upper = np.triu_indices(num_candidates, 1)
    pair_KK[upper] = np.arange(len(upper[0]))
    return pair_KK + pair_KK.T


def distances_between(stored_RP: np.ndarray, pair_KK: np.ndarray, playing: np.ndarray) -> np.ndarray:
    """Distances between the candidates in play (R, P, P), float32."""
    if stored_RP.shape[1] == 0:
        return np.zeros((len(stored_RP), 1, 1), dtype=np.float32)
    distances_RPP = stored_RP[:, pair_KK[np.ix_(playing, playing)]]
    diagonal = np.arange(len(playing))
    distances_RPP[:, diagonal, diagonal] = 0
    return distances_RPP
