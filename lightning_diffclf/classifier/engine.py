"""The engine: packs (image, candidate, draw) rows of many images into full micro-batches.

An image is in flight from its encoding until its decision. It advances in rounds, which its contest sets. Micro-batches
are cut from the rounds of all images in flight, oldest first, so that they stay full although images advance at
different speeds.

Shape suffixes: N rows of a micro-batch, M distinct (image, draw) pairs in it, D values of x0, K candidates, S draws.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.checks import check_output, resolve_candidates, resolve_ids
from lightning_diffclf.classifier.classification import Classification
from lightning_diffclf.classifier.contest import Contest, judge
from lightning_diffclf.classifier.device import download, upload
from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.classifier.flight import Flight, Landed, Piece, Slots, cut, measure_distances
from lightning_diffclf.classifier.known import KnownErrors
from lightning_diffclf.classifier.score import Predictions
from lightning_diffclf.classifier.search import Found, Search
from lightning_diffclf.denoiser import evaluating
from lightning_diffclf.errors import UserError, WrongType
from lightning_diffclf.progress import tell

if TYPE_CHECKING:
    from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier


@dataclass
class _Launch:
    """A micro-batch on its way through the network."""

    pieces: list[Piece]
    errors_N: Tensor  # in the CPU's memory once ``arrived``
    arrived: torch.cuda.Event | None


class Packer:
    """Classifies images that arrive in parts; see :meth:`~.diffusion_classifier.DiffusionClassifier.run`.

    Results come in the order in which images were added, at any later time: :meth:`work` calls the network as long as
    full micro-batches can be made, :meth:`finish` until everything is decided.

    Example:
        >>> run = classifier.run()  # doctest: +SKIP
        >>> for images in loader:  # doctest: +SKIP
        ...     run.add(images)
        ...     results += run.work()
        >>> results += run.finish()  # doctest: +SKIP
    """

    def __init__(self, classifier: DiffusionClassifier, watch: Callable[[Landed], None] | None = None) -> None:
        self._classifier = c = classifier
        self._watch = watch
        self._noise = KeyedNoise(c.draws.seed)
        self._slots = Slots(c.in_flight)
        self._waiting: deque[Flight] = deque()
        self._flights: list[Flight] = []
        self._launched: deque[_Launch] = deque()
        self._decided: dict[int, Classification] = {}
        self._added = self._yielded = 0
        self._calls = 0  # rows that the network was given
        self._ahead = 0  # micro-batches that stay on their way while the CPU prepares the next

    def add(
        self,
        images: Tensor,
        ids: Iterable[int | str] | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
        known: Sequence[KnownErrors | None] | None = None,
    ) -> None:
        """Check images and let them wait; arguments and errors as in :meth:`DiffusionClassifier.__call__`.

        ``known`` has errors of each image that need no network call; decisions do not depend on them.
        """
        c = self._classifier
        id_list = resolve_ids(images, ids, self._added)
        measures = c.rule.needs == "distances" or c.keep_distances
        found = self._candidates_of(images, id_list, candidates)
        for image_id, one, spent in zip(id_list, found.candidates, found.nfe, strict=True):
            c.terms.check_budget(image_id, len(one), spent)
        classes, pools = np.array(c.denoiser.candidates.classes), c.recipe.ensemble == "mean"
        terms = replace(c.terms, rule=c.rule)  # which knows what a search has measured by now
        added = zip(images, id_list, *found, strict=True)
        for number, (image, image_id, one, spent, dropped) in enumerate(added, self._added):
            contest = Contest(terms, len(one), classes[one] if pools else None, spent)
            errors = None if known is None else known[number - self._added]
            key = self._noise.key(image_id)
            self._waiting.append(Flight(number, image, image_id, one, key, contest, dropped, errors, measures))
        self._added += len(images)

    def _candidates_of(self, images: Tensor, ids: list[int | str], candidates: Any) -> Found:
        """Candidates in play of each image, and what it took to find them."""
        c = self._classifier
        origin, spent, proposal = "candidates", 0, c.recipe.proposal
        candidates = c.recipe.candidates if candidates is None else candidates
        if isinstance(proposal, Search):
            lists = resolve_candidates(candidates, len(images), len(c.denoiser.candidates))
            if len(images) == 0:
                return Found(lists, [], [])
            with evaluating(c.denoiser):
                return proposal.propose(c, images, ids, lists)
        if candidates is None and proposal is not None and len(images):
            with evaluating(c.denoiser), torch.no_grad():
                candidates = proposal(images)
            origin, spent = "proposal", int(getattr(proposal, "nfe", 0))
        lists = resolve_candidates(candidates, len(images), len(c.denoiser.candidates), origin)
        return Found(lists, [spent] * len(images), [0] * len(images))

    def work(self) -> Iterator[Classification]:
        """Call the network while all added images can fill micro-batches; yields what is decided."""
        return self._work(to_the_end=False)

    def finish(self) -> Iterator[Classification]:
        """Call the network until all added images are decided; yields the rest."""
        return self._work(to_the_end=True)

    def _work(self, to_the_end: bool) -> Iterator[Classification]:
        c = self._classifier
        with evaluating(c.denoiser):
            while True:
                rows = self._board()
                # Images that wait for a place in flight say that micro-batches cannot get fuller.
                launches = rows > 0 and (rows >= c.microbatch or bool(self._waiting) or to_the_end)
                if launches:
                    self._launch()
                lands = bool(self._launched) and not (launches and len(self._launched) <= self._ahead)
                if lands:
                    self._land()
                while self._yielded in self._decided:
                    yield self._decided.pop(self._yielded)
                    self._yielded += 1
                if not (launches or lands):
                    break

    def _board(self) -> int:
        """Encode waiting images until a micro-batch is full. Returns the rows at hand."""
        while True:
            rows = sum(flight.left for flight in self._flights)
            arrivals = self._arrivals(rows)
            if not arrivals:
                return rows
            images = torch.stack([f.image for f in arrivals if f.image is not None])
            self._slots.put(self._encode(images), [f.slot for f in arrivals])
            for flight in arrivals:
                flight.image = None
            self._flights += arrivals
            self._end_rounds([flight for flight in arrivals if flight.complete])  # those that are known

    def _arrivals(self, rows: int) -> list[Flight]:
        """Waiting images that begin, until ``rows`` at hand have become a micro-batch or there is no room."""
        c, arrivals = self._classifier, list[Flight]()
        while self._waiting and rows < c.microbatch and self._slots.available:
            flight = self._waiting.popleft()
            flight.slot = self._slots.take()
            shape = len(flight.candidates_K), len(c.timesteps_S)
            if c.keep_errors:
                flight.errors_KS = np.full(shape, np.nan, dtype=np.float32)
            if c.keep_distances:
                flight.distances_SKK = np.full((shape[1], shape[0], shape[0]), np.nan, dtype=np.float32)
            flight.begin_round()
            arrivals.append(flight)
            rows += flight.left
        return arrivals

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        encoded = self._classifier.denoiser.encode(images)
        if not isinstance(encoded, Tensor):
            raise WrongType(f"denoiser.encode: {type(encoded).__name__}, expected a tensor (B, C, h, w)")
        x0 = encoded.float()
        if len(x0) != len(images) or x0.ndim < 2:
            raise UserError(f"denoiser.encode: {tuple(images.shape)} became {tuple(x0.shape)}, expected (B, C, h, w)")
        if x0.is_cuda:  # works by itself
            self._ahead = 1
        given = self._classifier.draws.noise
        if given is not None and given.shape[1:] != x0.shape[1:]:
            raise UserError(f"draws: noise of shape {tuple(given.shape[1:])} for x0 of shape {tuple(x0.shape[1:])}")
        return x0

    def _noise_of(self, piece: Piece, out_MD: np.ndarray) -> None:
        """Noise of the piece's draws, in order, into the rows of ``out_MD``."""
        flight, given = piece.flight, self._classifier.draws.noise
        for out_D, draw in zip(out_MD, range(piece.draw[0], piece.draw[-1] + 1), strict=True):
            if given is not None:
                out_D[:] = given[draw].reshape(-1).cpu()
            elif flight.last_noise is not None and flight.last_noise[0] == draw:
                out_D[:] = flight.last_noise[1]
            else:
                self._classifier.draws.fill(self._noise, out_D, flight.key, draw)
        flight.last_noise = (draw, out_D.copy()) if piece.unfinished else None

    @torch.no_grad()
    def _launch(self) -> None:
        """Hand the next micro-batch to the network. The only place that calls it."""
        c, x0_slots = self._classifier, self._slots.x0
        schedule, device = c.denoiser.schedule, x0_slots.device
        pieces = cut(self._flights, c.microbatch)
        # The M distinct (image, draw) pairs of the micro-batch: one x_t each, shared by all candidates.
        ends = np.cumsum([piece.num_draws for piece in pieces])
        noise_MD = np.empty((ends[-1], self._slots.dims), dtype=np.float32)
        for piece, end in zip(pieces, ends, strict=True):
            self._noise_of(piece, noise_MD[end - piece.num_draws : end])
        slot_M = np.repeat([p.flight.slot for p in pieces], [p.num_draws for p in pieces])
        draw_M = np.concatenate([np.arange(p.draw[0], p.draw[-1] + 1) for p in pieces])
        pair_N = np.concatenate([p.draw - p.draw[-1] + end - 1 for p, end in zip(pieces, ends, strict=True)])
        candidate_N = np.concatenate([p.candidate for p in pieces])

        pair = upload(pair_N, device)
        t_M = c.timesteps_S[torch.from_numpy(draw_M)].to(device, non_blocking=True)
        x0_M = x0_slots[upload(slot_M, device)]
        noise_M = upload(noise_MD, device).view_as(x0_M)
        x_t_M = schedule.add_noise(x0_M, noise_M, t_M)
        output = c.predict(*schedule.network_rows(x_t_M, t_M), upload(candidate_N, device), pair)
        x_t, t, noise = x_t_M[pair], t_M[pair], noise_M[pair]
        check_output(output, x_t)
        self._calls += len(x_t)
        tell("network calls", self._calls)
        with torch.autocast(device.type, enabled=False):
            predictions = Predictions(schedule, output, x0_M[pair], x_t, t, noise)
            errors_N = download(c.loss(predictions))
            if pieces[0].flight.measures:
                measure_distances(pieces, predictions.epsilon.flatten(1))
        arrived = None
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self._launched.append(_Launch(pieces, errors_N, arrived))

    def _land(self) -> None:
        """Wait for the oldest micro-batch and give its results back to the images."""
        launch, start, finished = self._launched.popleft(), 0, []
        if launch.arrived is not None:
            launch.arrived.synchronize()
        errors_N = launch.errors_N.numpy()
        for piece in launch.pieces:
            flight = piece.flight
            flight.land(piece, errors_N[start : start + piece.size])
            start += piece.size
            if self._watch is not None:
                self._watch(flight.completed_by(piece))
            if flight.complete:
                finished.append(flight)
        self._end_rounds(finished)

    def _end_rounds(self, finished: list[Flight]) -> None:
        """Judge images whose errors of a round are all there, also those of a next round that is known."""
        while finished:
            for flight in finished:
                in_play, broken = len(flight.contest.playing), flight.end_round()
                if len(broken):
                    self._warn(flight, broken, in_play)
            judge([flight.contest for flight in finished], self._slots.dims)
            for flight in finished:
                if flight.contest.decided:
                    self._decided[flight.number] = self._classification(flight)
                    self._slots.give_back(flight.slot)
                    self._flights.remove(flight)
                else:
                    flight.begin_round()
            finished = [flight for flight in finished if not flight.contest.decided and flight.complete]

    def _warn(self, flight: Flight, broken: np.ndarray, in_play: int) -> None:
        names = [self._classifier.denoiser.candidates.names[i] for i in flight.candidates_K[broken][:3]]
        warnings.warn(
            f"image {flight.image_id!r}: the network returned NaN or infinity for {len(broken)} of "
            f"{in_play} candidates ({', '.join(names)}{', …' if len(broken) > 3 else ''}); they cannot win",
            RuntimeWarning,
            stacklevel=2,
        )

    def _classification(self, flight: Flight) -> Classification:
        c = self._classifier
        return Classification.of(
            flight.contest,
            flight.image_id,
            flight.candidates_K,
            c.denoiser.candidates,
            c.recipe.abstain,
            self._slots.dims,
            c.timesteps_S,
            c.recipe.posterior,
            flight.dropped,
            flight.errors_KS,
            flight.distances_SKK,
            flight.reused,
        )
