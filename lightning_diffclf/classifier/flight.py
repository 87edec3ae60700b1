"""What the engine keeps of each image between its encoding and its decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.device import download
from lightning_diffclf.classifier.elimination import Needs


class Flight:
    """An image on its way.

    It advances in rounds: the draws ``done`` … ``stop``-1 times the candidates in play. Rows of a round are numbered
    draw-major: row r is draw ``done + r // A`` of candidate ``active_A[r % A]``.

    Args:
        position: Where the image stands among those of its run.
        image: The image (C, H, W), until it is encoded.
        image_id: Its id.
        candidates_K: Indices of its candidates (K,), int64.
        state: What the elimination rule remembers about it.
        key: Key of its noise.
        nfe: Network calls spent on it already.
    """

    def __init__(
        self,
        position: int,
        image: Tensor,
        image_id: int | str,
        candidates_K: np.ndarray,
        state: Any,
        key: np.ndarray,
        nfe: int = 0,
    ) -> None:
        self.position = position
        self.image: Tensor | None = image
        self.image_id = image_id
        self.candidates_K = candidates_K
        self.state = state
        self.key = key
        self.slot = -1  # where its x0 lies
        self.last_noise: tuple[int, np.ndarray] | None = None  # a draw with many candidates spans micro-batches
        self.active_A = np.arange(len(candidates_K))
        self.sums_K = np.zeros(len(candidates_K))
        self.draws_K = np.zeros(len(candidates_K), dtype=np.int64)
        self.nfe = nfe
        self.done = self.stop = 0  # draws before and after this round
        self.rows = 0  # rows of this round
        self.cut = 0  # those that were given to micro-batches
        self.landed = 0  # those whose errors are back
        self.errors_KS: np.ndarray | None = None
        self.distances_SKK: np.ndarray | None = None
        self.history: list[tuple[int, np.ndarray, np.ndarray]] = []  # stop, candidates in play, their sums by then
        self.margin = np.inf  # least evidence for the best candidate against one that was dropped, in nats
        self.errors_RA: np.ndarray | None = None
        self.distances_RAA: np.ndarray | None = None
        self.distances: list[Tensor] = []  # of draws of this round, on their way to the CPU
        self._unfinished: Tensor | None = None  # predictions of a draw that goes on in the next micro-batch

    def begin_round(self, stop: int, needs: Needs) -> None:
        """Go on to draw ``stop``."""
        self.done, self.stop, self.cut, self.landed = self.stop, stop, 0, 0
        shape = (self.stop - self.done, len(self.active_A))
        self.rows = shape[0] * shape[1]
        self.errors_RA = None if needs == "scores" else np.empty(shape, dtype=np.float32)
        self.distances_RAA = None

    def end_round(self) -> None:
        """All rows of this round have landed."""
        self.draws_K[self.active_A] = self.stop
        self.history.append((self.stop, self.active_A, self.sums_K[self.active_A]))
        if self.distances:
            parts = [part.numpy() for part in self.distances]
            self.distances_RAA, self.distances = parts[0] if len(parts) == 1 else np.concatenate(parts), []
            if self.distances_SKK is not None:
                here = np.ix_(np.arange(self.done, self.stop), self.active_A, self.active_A)
                self.distances_SKK[here] = self.distances_RAA

    def land(self, piece: Piece, errors: np.ndarray, weights_S: np.ndarray) -> None:
        """Take the errors of a piece of this round; ``weights_S`` are those of all draws."""
        in_play = len(self.active_A)
        self.nfe += len(errors)
        self.landed += len(errors)
        self.sums_K[self.active_A] += np.bincount(
            piece.column, weights=errors * weights_S[self.done + piece.draw], minlength=in_play
        )
        if self.errors_KS is not None:
            self.errors_KS[self.active_A[piece.column], self.done + piece.draw] = errors
        if self.errors_RA is not None:
            self.errors_RA.reshape(-1)[piece.first : piece.last] = errors

    def whole_draws(self, epsilon_ND: Tensor) -> Tensor:
        """What the candidates predict in the next rows of this round, from one whole draw to another.

        The rows of an unfinished draw wait for the rest.
        """
        in_play = len(self.active_A)
        if self._unfinished is not None:
            epsilon_ND, self._unfinished = torch.cat([self._unfinished, epsilon_ND]), None
        whole = len(epsilon_ND) // in_play * in_play
        if whole < len(epsilon_ND):
            self._unfinished = epsilon_ND[whole:].clone()
        return epsilon_ND[:whole]

    def keep(self, survives_A: np.ndarray, scores_A: np.ndarray, dims: int) -> None:
        """Drop the others, and remember the weakest evidence that dropped one."""
        dropped_A = ~survives_A
        if dropped_A.any():
            best = scores_A.argmin()
            rivals_A = scores_A[dropped_A]
            if dropped_A[best]:  # at the end, when all are let go
                rivals_A = np.delete(scores_A, best)
            if len(rivals_A):
                gap = float(rivals_A.min() - scores_A[best])
                self.margin = min(self.margin, self.stop * dims * gap / (2 * float(scores_A[best]) + 1e-300))
            self.forget(dropped_A)

    def pooled(self, values_XA: np.ndarray, class_A: np.ndarray | None) -> np.ndarray:
        """``values_XA``, or for each candidate the mean over those in play of its class, if ``class_A`` is given."""
        if class_A is None:
            return values_XA
        same_AA = class_A[:, None] == class_A
        return values_XA @ (same_AA / same_AA.sum(0))

    def decide(self, dims: int, class_K: np.ndarray | None = None) -> tuple[int | None, np.ndarray, np.ndarray]:
        """All are let go. Returns the position of the winner, if there is one, ``scores_K`` and ``differences_K``.

        Where ``class_K`` is given, classes are compared by the mean over their candidates.
        """
        scores_K = self.sums_K / self.draws_K
        differences_K = np.full(len(scores_K), np.inf)
        if len(self.active_A) == 0:
            return None, scores_K, differences_K
        pooled_A = self.pooled(scores_K[self.active_A], None if class_K is None else class_K[self.active_A])
        best = int(self.active_A[np.lexsort((scores_K[self.active_A], pooled_A))[0]])
        if class_K is None:
            self.keep(np.zeros(len(self.active_A), dtype=bool), pooled_A, dims)
        else:
            self.keep(class_K[self.active_A] == class_K[best], pooled_A, dims)
        differences_K[best] = 0
        for stop, active_A, sums_A in reversed(self.history):
            sums_A = self.pooled(sums_A, None if class_K is None else class_K[active_A])
            stays_A = (self.draws_K[active_A] > stop) | (active_A == best)
            conqueror = np.where(stays_A, sums_A, np.inf).argmin()
            drops_A = ~stays_A & np.isfinite(scores_K[active_A])
            gap_A = (sums_A[drops_A] - sums_A[conqueror]) / stop
            differences_K[active_A[drops_A]] = gap_A + differences_K[active_A[conqueror]]
        return best, scores_K, differences_K

    def forget(self, dropped_A: np.ndarray) -> None:
        """Take candidates out of play."""
        self.active_A = self.active_A[~dropped_A]
        if self.errors_RA is not None:
            self.errors_RA = self.errors_RA[:, ~dropped_A]
        if self.distances_RAA is not None:
            self.distances_RAA = self.distances_RAA[:, ~dropped_A][:, :, ~dropped_A]


@dataclass
class Piece:
    """Rows ``first`` … ``last``-1 of a flight's round: its part of a micro-batch."""

    flight: Flight
    first: int
    last: int

    def __post_init__(self) -> None:
        in_play = len(self.flight.active_A)
        row = np.arange(self.first, self.last)
        self.column = row % in_play  # position among the candidates in play
        self.draw = row // in_play  # draw within the round

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.last - self.first


def cut(flights: list[Flight], size: int) -> list[Piece]:
    """The next micro-batch: what is left of the flights' rounds, oldest first, ``size`` rows at most."""
    pieces = []
    for flight in flights:
        last = min(flight.rows, flight.cut + size)
        if last > flight.cut:
            pieces.append(Piece(flight, flight.cut, last))
            size -= last - flight.cut
            flight.cut = last
        if size == 0:
            break
    return pieces


class Slots:
    """One tensor that holds the x0 of all images in flight, so that a micro-batch gathers them in one operation."""

    def __init__(self, size: int) -> None:
        self.free = list(range(size))[::-1]
        self.x0 = torch.empty(0)
        self.dims = 0  # values of one x0

    def put(self, x0: Tensor, slots: list[int]) -> None:
        self.dims = x0[0].numel()
        needed = max(slots) + 1
        if len(self.x0) < needed:  # grows with the images really in flight
            grown = x0.new_empty(needed, *x0.shape[1:])
            grown[: len(self.x0)] = self.x0.to(x0.device).view(-1, *x0.shape[1:])
            self.x0 = grown
        self.x0[slots] = x0


def measure_distances(pieces: list[Piece], epsilon_ND: Tensor) -> None:
    """Give each flight the mean squared differences between what its candidates predict, (R, A, A) for R draws.

    Args:
        pieces: A micro-batch.
        epsilon_ND: Predicted noise of its rows, float32.
    """
    alike: dict[int, list[tuple[Flight, Tensor]]] = {}  # flights with equally many candidates are measured together
    for piece, rows in zip(pieces, epsilon_ND.split([piece.size for piece in pieces]), strict=True):
        draws = piece.flight.whole_draws(rows)
        if len(draws):
            alike.setdefault(len(piece.flight.active_A), []).append((piece.flight, draws))
    for in_play, members in alike.items():
        p_RAD = torch.cat([draws for _, draws in members]).unflatten(0, (-1, in_play))
        counts = [len(draws) // in_play for _, draws in members]
        parts = download(squared_distances(p_RAD).div_(p_RAD.shape[2])).split(counts)
        for (flight, _), part in zip(members, parts, strict=True):
            flight.distances.append(part)


def squared_distances(p_RAD: Tensor) -> Tensor:
    """‖p_i - p_j‖² for each pair of A points, R times over: (R, A, A)."""
    if p_RAD.shape[1] <= 32:
        return torch.cdist(p_RAD, p_RAD, compute_mode="donot_use_mm_for_euclid_dist").square_()
    # By inner products, thirty times faster for a thousand points. Centred, because candidates agree about most of the
    # noise and rounding is relative to what is multiplied.
    p_RAD = p_RAD.nan_to_num(0, 0, 0)  # one broken candidate, which will be dropped, must not spoil the mean
    centred = p_RAD - p_RAD.mean(1, keepdim=True)
    products = centred @ centred.mT
    squares = products.diagonal(dim1=1, dim2=2)
    distances = (squares[:, :, None] + squares[:, None] - 2 * products).clamp_min_(0)
    distances.diagonal(dim1=1, dim2=2).zero_()
    return distances
