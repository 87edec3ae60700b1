"""Rows of many images in one micro-batch: who is in it, where its images lie, what its predictions are apart.

Shape suffixes: N rows, P candidates in play, R draws of a round, D values of x0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.contest import Contest
from lightning_diffclf.classifier.device import download
from lightning_diffclf.classifier.known import KnownErrors, KnownRound


@dataclass(frozen=True)
class Landed:
    """Errors of an image that have come back from a micro-batch, and known ones between them.

    Attributes:
        image_id: Id of the image.
        candidates_P: Indices of the candidates that are in play in these draws (P,), int64.
        first: Draws before these.
        errors_RP: Errors of the draws that are now complete (R, P), float32, without weights; R may be 0.
        nfe: Network calls spent on the image so far.
    """

    image_id: int | str
    candidates_P: np.ndarray
    first: int
    errors_RP: np.ndarray
    nfe: int


@dataclass(eq=False)
class Flight:
    """An image between its arrival and its decision.

    Rows of a round are numbered draw-major: row r is draw ``contest.done + r // P`` of candidate ``playing[r % P]``.

    Attributes:
        number: Where the image stands among those of its run.
        image: The image (C, H, W), until it is encoded.
        image_id: Its id.
        candidates_K: Indices of its candidates (K,), int64.
        key: Key of its noise.
        contest: The decision about it.
        dropped: Draws of its search that did not count.
        known: Errors of an earlier run.
        measures: Whether distances between predictions are needed.
        slot: Where its x0 lies.
        todo_N: Rows of this round that need network calls, ascending: all that are not known. A range, which takes no
            memory, where nothing is known.
        taken: How many of these were given to micro-batches.
        landed: How many of these have come back.
        reused: Errors of all rounds so far that were known.
        errors_N: Errors of this round's rows.
        distances: Roots of distances of this round's draws, on their way to the CPU.
        unfinished: Predictions of a draw that continues in the next micro-batch.
        last_noise: The noise of such a draw, with its number.
        errors_KS: All errors, if they are kept.
        distances_SKK: All distances, if they are kept.
    """

    number: int
    image: Tensor | None
    image_id: int | str
    candidates_K: np.ndarray
    key: np.ndarray
    contest: Contest
    dropped: int = 0
    known: KnownErrors | None = None
    measures: bool = False
    slot: int = -1
    todo_N: np.ndarray | range = range(0)
    taken: int = 0
    landed: int = 0
    reused: int = 0
    errors_N: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.float32))
    _known_round: KnownRound | None = None
    distances: list[Tensor] = field(default_factory=list)
    unfinished: Tensor | None = None
    last_noise: tuple[int, np.ndarray] | None = None
    errors_KS: np.ndarray | None = None
    distances_SKK: np.ndarray | None = None

    @property
    def left(self) -> int:
        """Rows of this round that no micro-batch has yet."""
        return len(self.todo_N) - self.taken

    @property
    def complete(self) -> bool:
        """Whether all errors of this round are there."""
        return self.landed == len(self.todo_N)

    def begin_round(self) -> None:
        """Make room for the errors of the contest's next round, and take those that are known."""
        contest = self.contest
        self.taken = self.landed = 0
        self.errors_N = np.empty(contest.rows, dtype=np.float32)
        self.todo_N = range(contest.rows)
        if self.known is not None:
            playing_P = self.candidates_K[contest.playing]
            self._known_round = found = self.known.of_round(playing_P, contest.done, contest.stop, self.measures)
            self.errors_N[:] = found.errors_RP.ravel()
            self.todo_N = np.flatnonzero(~found.known_RP)
            self.reused += contest.rows - len(self.todo_N)

    def land(self, piece: Piece, errors_N: np.ndarray) -> None:
        """Take the errors of one of its pieces (N,)."""
        self.errors_N[piece.row] = errors_N
        self.landed += piece.size

    def completed_by(self, piece: Piece) -> Landed:
        """What came back with the piece that landed last, before the round ends."""
        contest, in_play = self.contest, len(self.contest.playing)
        first = 0 if piece.first == 0 else self._row(piece.first) // in_play
        last = self._row(piece.last) // in_play
        return Landed(
            self.image_id,
            self.candidates_K[contest.playing],
            contest.done + first,
            self.errors_N[first * in_play : last * in_play].reshape(-1, in_play).copy(),
            contest.nfe + contest.rows - len(self.todo_N) + self.landed - self.reused,
        )

    def _row(self, place: int) -> int:
        """The row at a place of those to do; the end of the round after the last of them."""
        return int(self.todo_N[place]) if place < len(self.todo_N) else self.contest.rows

    def end_round(self) -> np.ndarray:
        """Hand the round to the contest; returns the positions of broken candidates."""
        contest, playing = self.contest, self.contest.playing
        errors_RP, distances_RPP = self.errors_N.reshape(-1, len(playing)), None
        if self.errors_KS is not None:
            self.errors_KS[playing, contest.done : contest.stop] = errors_RP.T
        if self.measures:
            distances_RPP, self.distances = self._distances(), []
            if self.distances_SKK is not None:
                self.distances_SKK[np.ix_(np.arange(contest.done, contest.stop), playing, playing)] = distances_RPP
        return contest.land(errors_RP, distances_RPP)

    def _distances(self) -> np.ndarray:
        """Distances of all draws of this round (R, P, P), float32."""
        in_play = len(self.contest.playing)
        roots = [np.empty((0, in_play, in_play), dtype=np.float16), *(part.numpy() for part in self.distances)]
        measured_RPP = np.square(np.concatenate(roots).astype(np.float32))
        if self._known_round is None or self._known_round.distances_RPP is None:
            return measured_RPP
        distances_RPP = self._known_round.distances_RPP
        distances_RPP[~self._known_round.known_RP.all(1)] = measured_RPP
        return distances_RPP

    def whole_draws(self, epsilon_ND: Tensor) -> Tensor:
        """What the candidates predict in the next rows of this round, from one whole draw to another.

        The rows of an unfinished draw wait for the rest.
        """
        in_play = len(self.contest.playing)
        if self.unfinished is not None:
            epsilon_ND, self.unfinished = torch.cat([self.unfinished, epsilon_ND]), None
        whole = len(epsilon_ND) // in_play * in_play
        if whole < len(epsilon_ND):
            self.unfinished = epsilon_ND[whole:].clone()
        return epsilon_ND[:whole]


@dataclass
class Piece:
    """Rows ``first`` … ``last`` - 1 of those that a flight's round has to do: its part of a micro-batch."""

    flight: Flight
    first: int
    last: int

    def __post_init__(self) -> None:
        playing = self.flight.contest.playing
        self.row = np.asarray(self.flight.todo_N[self.first : self.last])
        self.candidate = self.flight.candidates_K[playing[self.row % len(playing)]]
        self.draw = self.flight.contest.done + self.row // len(playing)

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.last - self.first

    @property
    def num_draws(self) -> int:
        """Number of draws from that of its first row to that of its last."""
        return int(self.draw[-1] - self.draw[0]) + 1

    @property
    def unfinished(self) -> bool:
        """Whether its last draw continues in the next micro-batch."""
        todo_N, in_play = self.flight.todo_N, len(self.flight.contest.playing)
        return self.last < len(todo_N) and bool(todo_N[self.last] // in_play == self.row[-1] // in_play)


def cut(flights: list[Flight], size: int) -> list[Piece]:
    """The next micro-batch: what is left of the flights' rounds, oldest first, ``size`` rows at most."""
    pieces = []
    for flight in flights:
        last = min(len(flight.todo_N), flight.taken + size)
        if last > flight.taken:
            pieces.append(Piece(flight, flight.taken, last))
            size -= last - flight.taken
            flight.taken = last
        if size == 0:
            break
    return pieces


class Slots:
    """One tensor that holds the x0 of all images in flight, so that a micro-batch gathers them in one operation."""

    def __init__(self, size: int) -> None:
        self._size, self._used, self._free = size, 0, list[int]()
        self.x0 = torch.empty(0)
        self.dims = 0  # values of one x0

    @property
    def available(self) -> bool:
        """Whether there is room for one more."""
        return bool(self._free) or self._used < self._size

    def take(self) -> int:
        """A free slot."""
        if not self._free:
            self._free.append(self._used)
            self._used += 1
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """The image is decided."""
        self._free.append(slot)

    def put(self, x0: Tensor, slots: list[int]) -> None:
        """Keep x0 (B, C, h, w); the tensor grows with the images really in flight."""
        self.dims = x0[0].numel()
        if len(self.x0) < self._used:
            grown = x0.new_empty(self._used, *x0.shape[1:])
            grown[: len(self.x0)] = self.x0.to(x0.device).view(-1, *x0.shape[1:])
            self.x0 = grown
        self.x0[slots] = x0


def measure_distances(pieces: list[Piece], epsilon_ND: Tensor) -> None:
    """Give each flight the distances between what its candidates predict, (R, P, P) for R draws.

    They are roots of mean squared differences in half precision, as errors.parquet keeps them: what is replayed is what
    was seen. Roots, because half precision reaches from 6e-8 to 6e4 and the squares reach further.

    Args:
        pieces: A micro-batch.
        epsilon_ND: Predicted noise of its rows, float32.
    """
    alike: dict[int, list[tuple[Flight, Tensor]]] = {}  # flights with equally many candidates are measured together
    for piece, rows in zip(pieces, epsilon_ND.split([piece.size for piece in pieces]), strict=True):
        draws = piece.flight.whole_draws(rows)
        if len(draws):
            alike.setdefault(len(piece.flight.contest.playing), []).append((piece.flight, draws))
    for in_play, members in alike.items():
        p_RPD = torch.cat([draws for _, draws in members]).unflatten(0, (-1, in_play))
        counts = [len(draws) // in_play for _, draws in members]
        parts = download(squared_distances(p_RPD).div_(p_RPD.shape[2]).sqrt_().half()).split(counts)
        for (flight, _), part in zip(members, parts, strict=True):
            flight.distances.append(part)


def squared_distances(p_RPD: Tensor) -> Tensor:
    """‖p_i - p_j‖² for each pair of P points, R times over: (R, P, P)."""
    if p_RPD.shape[1] <= 32:
        return torch.cdist(p_RPD, p_RPD, compute_mode="donot_use_mm_for_euclid_dist").square_()
    # By inner products, thirty times faster for a thousand points. Centred, because candidates agree about most of the
    # noise and rounding is relative to what is multiplied.
    p_RPD = p_RPD.nan_to_num(0, 0, 0)  # one broken candidate, which will be dropped, must not spoil the mean
    centred = p_RPD - p_RPD.mean(1, keepdim=True)
    products = centred @ centred.mT
    squares = products.diagonal(dim1=1, dim2=2)
    distances = (squares[:, :, None] + squares[:, None] - 2 * products).clamp_min_(0)
    distances.diagonal(dim1=1, dim2=2).zero_()
    return distances
