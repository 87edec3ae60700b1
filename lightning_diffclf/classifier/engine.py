"""The engine: packs (image, candidate, draw) rows of many images into full micro-batches.

An image is in flight from its encoding until its decision. It advances in rounds: the draws up to the next stop of the
elimination rule, times the candidates still in play. Micro-batches are cut from the rounds of all images in flight,
oldest first, so that they stay full although images advance at different speeds.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.classifier.checks import check_images, check_output, resolve_candidates
from lightning_diffclf.classifier.classification import Classification
from lightning_diffclf.classifier.draws import Draws, KeyedNoise
from lightning_diffclf.classifier.elimination import Elimination, Exhaustive, Round
from lightning_diffclf.classifier.score import Loss, Rows
from lightning_diffclf.denoiser import ConditionalDenoiser


class _Flight:
    """An image between its encoding and its decision."""

    def __init__(self, position: int, image_id: int | str, slot: int, candidates_K: np.ndarray, state: Any) -> None:
        self.position = position  # among the images of this call
        self.image_id = image_id
        self.slot = slot  # where its x0 lies
        self.candidates_K = candidates_K
        self.state = state  # of the elimination rule
        self.key = np.empty(0)  # of its noise
        self.last_noise: tuple[int, np.ndarray] | None = None  # a draw with many candidates spans micro-batches
        self.active_A = np.arange(len(candidates_K))
        self.sums_K = np.zeros(len(candidates_K))
        self.draws_K = np.zeros(len(candidates_K), dtype=np.int64)
        self.nfe = 0
        self.done = 0  # draws before this round
        self.stop = 0  # draws after this round
        self.cut = 0  # rows of this round handed to micro-batches; row r is draw r // A, candidate r % A
        self.errors_KS: np.ndarray | None = None
        self.errors_RA: np.ndarray | None = None
        self.predictions_RAD: Tensor | None = None
        self.noise_RD: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows in this round."""
        return (self.stop - self.done) * len(self.active_A)


@dataclass
class _Piece:
    """Rows ``first`` … ``last``-1 of a flight's round: its part of a micro-batch."""

    flight: _Flight
    first: int
    last: int

    def __post_init__(self) -> None:
        in_play = len(self.flight.active_A)
        row = np.arange(self.first, self.last)
        self.column = row % in_play  # position among the candidates in play
        self.draw = row // in_play  # draw within the round


class DiffusionClassifier:
    """Classifies images by the error of a conditional denoiser (Li et al. 2023, Algorithm 1).

    For each image, noise is added at several timesteps, the network predicts it under each candidate, and the candidate
    with the lowest mean error wins. Results depend on (seed, image id, draw index) only.

    The caller chooses the device, by where denoiser and images are, and the precision, by autocast around the call.
    Errors are always computed in float32 and summed in float64.

    Args:
        denoiser: The network; see :class:`~lightning_diffclf.denoiser.ConditionalDenoiser`.
        draws: (t, noise) pairs for each image; by default 250, or what the elimination rule spends.
        loss: Error terms, such as ``l2``, ``l1``, ``huber``, ``l2+kl``; see :class:`~.score.Loss`.
        elimination: Rule that drops candidates early; :class:`~.elimination.Exhaustive` by default.
        microbatch: Rows (image, candidate, draw) in one network call. Bounds the memory together with ``in_flight``.
        in_flight: Images between encoding and decision at most; ``microbatch`` by default.
        keep_errors: Keep every single error in the result (K × S numbers an image).

    Raises:
        ValueError: if a setting is out of range, there are more draws than timesteps, fewer draws than the rule spends,
            or the loss does not fit the schedule.
        TypeError: if ``denoiser`` lacks one of the four members.

    Example:
        >>> classifier = DiffusionClassifier(denoiser, draws=Draws(100), microbatch=64)  # doctest: +SKIP
        >>> [result.label for result in classifier(images, ids=range(len(images)))]  # doctest: +SKIP
        [3, 8, 8, 1]
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        draws: Draws | None = None,
        loss: str = "l2",
        elimination: Elimination | None = None,
        microbatch: int = 256,
        in_flight: int | None = None,
        keep_errors: bool = False,
    ) -> None:
        missing = [m for m in ("schedule", "candidates", "encode", "predict") if not hasattr(denoiser, m)]
        if missing:
            raise TypeError(f"denoiser: {type(denoiser).__name__} lacks {missing}; see ConditionalDenoiser")
        for name, value in (("microbatch", microbatch), ("in_flight", in_flight)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: {value}, expected at least 1")
        self.denoiser = denoiser
        self.rule = elimination or Exhaustive()
        self.loss = Loss(loss)
        self.loss.check(denoiser.schedule)
        order = self.rule.order(draws.count if draws else Draws.count)
        self.draws = draws or Draws(len(order) if order is not None else Draws.count)
        self.timesteps_S = self.draws.visit(denoiser.schedule, order)
        self.microbatch = microbatch
        self.in_flight = in_flight or microbatch
        self.keep_errors = keep_errors
        self._noise = KeyedNoise(self.draws.seed)

    def __call__(
        self,
        images: Tensor,
        ids: Iterable[int | str] | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Classification]:
        """Classify images, yielding each result as soon as it and those before it are decided.

        Args:
            images: (B, C, H, W) floating point, what ``denoiser.encode`` takes, on the network's device.
            ids: A stable id of each image (an integer or a string); it keys the noise. By default the positions
                0 … B-1, which makes the noise depend on the order of the images.
            candidates: Indices of the candidates in play: one list for all images, or one list for each image.

        Yields:
            One :class:`Classification` for each image, in the order given.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if images, ids or candidates have the wrong shape or values (NaN, out of range), before the
                first network call; or if the network's output has the wrong shape, at the first.
            FloatingPointError: if the network returns NaN or infinity for all candidates of an image.
        """
        id_list: list[int | str] = list(range(len(images)) if ids is None else ids)
        if isinstance(ids, Tensor):
            id_list = ids.tolist()
        check_images(images, id_list)
        return self._run(images, id_list, resolve_candidates(candidates, len(images), len(self.denoiser.candidates)))

    def _run(self, images: Tensor, ids: list[int | str], candidates: list[np.ndarray]) -> Iterator[Classification]:
        waiting = deque(range(len(images)))
        flights: list[_Flight] = []
        slots = _Slots(self.in_flight)
        decided: dict[int, Classification] = {}
        next_out = 0
        with evaluating(self.denoiser):
            while waiting or flights:
                rows = sum(f.rows - f.cut for f in flights)
                arrivals: list[_Flight] = []
                while waiting and rows < self.microbatch and len(flights) + len(arrivals) < self.in_flight:
                    arrivals.append(self._depart(waiting.popleft(), slots, ids, candidates))
                    rows += arrivals[-1].rows
                if arrivals:
                    slots.put(self._encode(images[[f.position for f in arrivals]]), [f.slot for f in arrivals])
                    flights += arrivals
                pieces = self._cut(flights)
                self._land(pieces, *self._evaluate(pieces, slots.x0))
                for flight in [f for f in flights if f.cut == f.rows]:
                    if self._advance(flight):
                        decided[flight.position] = self._decide(flight, slots.x0[0].numel())
                        slots.free.append(flight.slot)
                        flights.remove(flight)
                while next_out in decided:
                    yield decided.pop(next_out)
                    next_out += 1

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        x0 = self.denoiser.encode(images).float()
        if len(x0) != len(images) or x0.ndim < 2:
            raise ValueError(f"denoiser.encode: {tuple(images.shape)} became {tuple(x0.shape)}, expected (B, C, h, w)")
        if self.draws.noise is not None and self.draws.noise.shape[1:] != x0.shape[1:]:
            raise ValueError(
                f"draws: noise of shape {tuple(self.draws.noise.shape[1:])} for x0 of shape {tuple(x0.shape[1:])}"
            )
        return x0

    def _depart(self, position: int, slots: _Slots, ids: list[int | str], candidates: list[np.ndarray]) -> _Flight:
        candidates_K = candidates[position]
        flight = _Flight(position, ids[position], slots.free.pop(), candidates_K, self.rule.start(len(candidates_K)))
        flight.key = self._noise.key(flight.image_id)
        if self.keep_errors:
            flight.errors_KS = np.full((len(candidates_K), len(self.timesteps_S)), np.nan, dtype=np.float32)
        self._begin_round(flight)
        return flight

    def _begin_round(self, flight: _Flight) -> None:
        flight.stop = self.rule.next_stop(flight.done, len(self.timesteps_S))
        flight.cut = 0
        flight.errors_RA = None
        flight.predictions_RAD = flight.noise_RD = None
        if self.rule.needs != "scores":
            flight.errors_RA = np.empty((flight.stop - flight.done, len(flight.active_A)), dtype=np.float32)

    def _cut(self, flights: list[_Flight]) -> list[_Piece]:
        """The next micro-batch: what is left of the flights' rounds, oldest first."""
        pieces, room = [], self.microbatch
        for flight in flights:
            last = min(flight.rows, flight.cut + room)
            if last > flight.cut:
                pieces.append(_Piece(flight, flight.cut, last))
                room -= last - flight.cut
                flight.cut = last
            if room == 0:
                break
        return pieces

    def _noise_of(self, piece: _Piece, out_MD: np.ndarray) -> None:
        """Noise of the piece's draws, in order, into the rows of ``out_MD``."""
        flight = piece.flight
        for out_D, draw in zip(out_MD, range(piece.draw[0], piece.draw[-1] + 1), strict=True):
            number = flight.done + draw
            if self.draws.noise is not None:
                out_D[:] = self.draws.noise[number].reshape(-1).cpu()
            elif flight.last_noise is not None and flight.last_noise[0] == number:
                out_D[:] = flight.last_noise[1]
            else:
                self._noise.fill(out_D, flight.key, number)
        unfinished = piece.last % len(flight.active_A) != 0  # the last draw goes on in the next micro-batch
        flight.last_noise = (number, out_D.copy()) if unfinished else None

    @torch.no_grad()
    def _evaluate(self, pieces: list[_Piece], x0_slots: Tensor) -> tuple[np.ndarray, Rows]:
        """Errors (N,) of a micro-batch, and what they were computed from. The only place that calls the network."""
        schedule, device = self.denoiser.schedule, x0_slots.device
        # The M distinct (image, draw) pairs of the micro-batch: one x_t each, shared by all candidates.
        draws_per_piece = [piece.draw[-1] - piece.draw[0] + 1 for piece in pieces]
        ends = np.cumsum(draws_per_piece)
        noise_MD = np.empty((ends[-1], x0_slots[0].numel()), dtype=np.float32)
        for piece, end, num_draws in zip(pieces, ends, draws_per_piece, strict=True):
            self._noise_of(piece, noise_MD[end - num_draws : end])
        slot_M = np.repeat([p.flight.slot for p in pieces], draws_per_piece)
        number_M = np.concatenate([p.flight.done + np.arange(p.draw[0], p.draw[-1] + 1) for p in pieces])
        pair_N = np.concatenate(
            [p.draw - p.draw[0] + end - n for p, end, n in zip(pieces, ends, draws_per_piece, strict=True)]
        )
        candidate_N = np.concatenate([p.flight.candidates_K[p.flight.active_A][p.column] for p in pieces])

        pair = torch.from_numpy(pair_N).to(device)
        t_M = self.timesteps_S[torch.from_numpy(number_M)].to(device)
        x0_M = x0_slots[torch.from_numpy(slot_M).to(device)]
        noise_M = torch.from_numpy(noise_MD).to(device).view_as(x0_M)
        x_t, t, noise = schedule.add_noise(x0_M, noise_M, t_M)[pair], t_M[pair], noise_M[pair]
        time = schedule.network_time(t)
        output = self.denoiser.predict(
            schedule.network_input(x_t, t),
            time.float() if time.is_floating_point() else time,
            torch.from_numpy(candidate_N).to(device),
        )
        check_output(output, x_t)
        with torch.autocast(device.type, enabled=False):
            rows = Rows(schedule, output, x0_M[pair], x_t, t, noise)
            return self.loss(rows).cpu().numpy(), rows

    def _land(self, pieces: list[_Piece], errors_N: np.ndarray, rows_N: Rows) -> None:
        """Give the results of a micro-batch back to their images."""
        start = 0
        for piece in pieces:
            flight, rows = piece.flight, slice(start, start + piece.last - piece.first)
            start, errors = rows.stop, errors_N[rows]
            in_play = len(flight.active_A)
            flight.nfe += len(errors)
            flight.sums_K[flight.active_A] += np.bincount(piece.column, weights=errors, minlength=in_play)
            if flight.errors_KS is not None:
                flight.errors_KS[flight.active_A[piece.column], flight.done + piece.draw] = errors
            if flight.errors_RA is not None:
                flight.errors_RA.reshape(-1)[piece.first : piece.last] = errors
            if self.rule.needs == "predictions":
                self._keep_predictions(piece, rows_N.epsilon[rows].flatten(1), rows_N.noise[rows].flatten(1))

    def _keep_predictions(self, piece: _Piece, epsilon_ND: Tensor, noise_ND: Tensor) -> None:
        flight, num_draws = piece.flight, piece.flight.stop - piece.flight.done
        if flight.predictions_RAD is None or flight.noise_RD is None:
            dims = epsilon_ND.shape[1]
            flight.predictions_RAD = epsilon_ND.new_empty(num_draws, len(flight.active_A), dims)
            flight.noise_RD = noise_ND.new_empty(num_draws, dims)
        flight.predictions_RAD.flatten(0, 1)[piece.first : piece.last] = epsilon_ND
        flight.noise_RD[torch.from_numpy(piece.draw).to(noise_ND.device)] = noise_ND

    def _advance(self, flight: _Flight) -> bool:
        """End the flight's round: ask the rule, begin the next round. True if the image is decided."""
        flight.draws_K[flight.active_A] = flight.done = flight.stop
        scores_A = flight.sums_K[flight.active_A] / flight.done
        if not np.isfinite(scores_A).all():
            scores_A = self._exclude_broken(flight, scores_A)
        survives = self.rule.survivors(
            flight.state,
            Round(flight.done, flight.active_A, scores_A, flight.errors_RA, flight.predictions_RAD, flight.noise_RD),
        )
        flight.active_A = flight.active_A[survives]
        if flight.done == len(self.timesteps_S) or len(flight.active_A) == 1 < len(flight.candidates_K):
            return True
        self._begin_round(flight)
        return False

    def _exclude_broken(self, flight: _Flight, scores_A: np.ndarray) -> np.ndarray:
        broken = flight.active_A[~np.isfinite(scores_A)]
        names = [self.denoiser.candidates.names[i] for i in flight.candidates_K[broken][:3]]
        if len(broken) == len(scores_A):
            raise FloatingPointError(
                f"image {flight.image_id!r}: the network returned NaN or infinity for all candidates"
            )
        warnings.warn(
            f"image {flight.image_id!r}: the network returned NaN or infinity for {len(broken)} candidates "
            f"({', '.join(names)}, …); they cannot win",
            RuntimeWarning,
            stacklevel=2,
        )
        flight.sums_K[broken] = np.inf
        return np.where(np.isfinite(scores_A), scores_A, np.inf)

    def _decide(self, flight: _Flight, dims: int) -> Classification:
        with np.errstate(invalid="ignore"):
            scores_K = flight.sums_K / flight.draws_K
        best = flight.active_A[np.argmin(scores_K[flight.active_A])]
        candidate = int(flight.candidates_K[best])
        return Classification(
            image_id=flight.image_id,
            label=self.denoiser.candidates.classes[candidate],
            candidate=candidate,
            candidates_K=torch.from_numpy(flight.candidates_K.copy()),
            scores_K=torch.from_numpy(scores_K),
            draws_K=torch.from_numpy(flight.draws_K),
            nfe=flight.nfe,
            dims=dims,
            timesteps_S=self.timesteps_S,
            errors_KS=None if flight.errors_KS is None else torch.from_numpy(flight.errors_KS),
        )


class _Slots:
    """One tensor that holds the x0 of all images in flight, so that a micro-batch gathers them in one operation."""

    def __init__(self, size: int) -> None:
        self.free = list(range(size))[::-1]
        self.x0 = torch.empty(0)

    def put(self, x0: Tensor, slots: list[int]) -> None:
        needed = max(slots) + 1
        if len(self.x0) < needed:  # grows with the images really in flight
            grown = x0.new_empty(needed, *x0.shape[1:])
            grown[: len(self.x0)] = self.x0.to(x0.device).view(-1, *x0.shape[1:])
            self.x0 = grown
        self.x0[slots] = x0


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
