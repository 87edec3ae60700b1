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
from lightning_diffclf.classifier.device import CompiledPredict, download, upload
from lightning_diffclf.classifier.draws import Draws, KeyedNoise
from lightning_diffclf.classifier.elimination import Exhaustive, Round
from lightning_diffclf.classifier.flight import Flight, Piece, Slots, cut, measure_distances
from lightning_diffclf.classifier.recipe import Recipe
from lightning_diffclf.classifier.score import Loss, Rows, timestep_weights
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.errors import UserError, WrongType


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
        keep_distances: Keep the distances between the candidates' predictions as well (S × K × K numbers an image).
        weights: What the draws weigh in the score; see :func:`~.score.timestep_weights`.
        budget: Network calls for one image at most. An image that has spent them is decided by the draws so far,
            which all of its remaining candidates have seen.
        abstain: Results whose :attr:`Classification.margin` is below this many nats are marked as abstained.
        ensemble: Where classes have several candidates (prompts): ``best`` takes the class of the best candidate,
            ``mean`` the class with the lowest mean score over its candidates, which then stay or go together.
        proposal: Names the candidates of each image, where a call does not: any callable; see :mod:`~.proposal`.
        compile: Compile the network (``torch.compile``, with CUDA graphs on a GPU). Every call then has exactly
            ``microbatch`` rows, the last ones padded, so that it is compiled once. Pays after many calls.

    Raises:
        ValueError: if a setting is out of range, there are more draws than timesteps, fewer draws than the rule spends,
            or the loss does not fit the schedule or the rule.
        TypeError: if ``denoiser`` lacks one of the four members.

    Example:
        >>> classifier = DiffusionClassifier(denoiser, draws=Draws(100), microbatch=64)  # doctest: +SKIP
        >>> [result.label for result in classifier(images, ids=range(len(images)))]  # doctest: +SKIP
        [3, 8, 8, 1]
    """

    def __init__(
        self,
        denoiser: ConditionalDenoiser,
        recipe: Recipe | Draws | None = None,
        *,
        microbatch: int = 256,
        in_flight: int | None = None,
        keep_errors: bool = False,
        keep_distances: bool = False,
        compile: bool = False,
        **settings: Any,
    ) -> None:
        missing = [m for m in ("schedule", "candidates", "encode", "predict") if not hasattr(denoiser, m)]
        if missing:
            raise WrongType(f"denoiser: {type(denoiser).__name__} lacks {missing}; see ConditionalDenoiser")
        for name, value in (("microbatch", microbatch), ("in_flight", in_flight)):
            if value is not None and value < 1:
                raise UserError(f"{name}: {value}, expected at least 1")
        if isinstance(recipe, Recipe):
            if settings:
                raise WrongType(f"{sorted(settings)}: given beside a recipe, expected them in it")
        else:
            recipe = Recipe(**settings) if recipe is None else Recipe(draws=recipe, **settings)
        self.recipe = recipe
        self.denoiser = denoiser
        self.rule = recipe.elimination or Exhaustive()
        self.loss = Loss(recipe.loss)
        self.loss.check(denoiser.schedule)
        self.rule.check(self.loss.name)
        draws = Draws(recipe.draws, recipe.seed) if isinstance(recipe.draws, int) else recipe.draws
        order = self.rule.order(draws.count if draws else Draws.count)
        self.draws = draws or Draws(len(order) if order is not None else Draws.count, recipe.seed)
        self.timesteps_S = self.draws.visit(denoiser.schedule, order)
        log_snr_S = denoiser.schedule.log_snr(self.timesteps_S).double()
        self.weights_S, self.log_snr_S = timestep_weights(recipe.weights, log_snr_S).numpy(), log_snr_S.numpy()
        self.microbatch = microbatch
        self.in_flight = in_flight or microbatch
        self.keep_errors, self.keep_distances = keep_errors, keep_distances
        self.budget, self.abstain, self.proposal = recipe.budget, recipe.abstain, recipe.proposal
        # One candidate for each class has no mean to take.
        classes = denoiser.candidates.classes
        pools = recipe.ensemble == "mean" and len(set(classes)) < len(classes)
        self.class_of = np.array(classes) if pools else None
        self._compiled = CompiledPredict(denoiser, microbatch) if compile else None

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
            ValueError: if images, ids or candidates have the wrong shape or values (NaN, out of range, more candidates
                than ``budget`` pays for), before the first network call; or if the network's output has the wrong
                shape, at the first.
        """
        run = self.run()
        run.add(images, ids, candidates)
        return run.finish()

    @torch.no_grad()
    def error_map(self, image: Tensor, image_id: int | str, candidates: Sequence[int], draws: int = 16) -> Tensor:
        """Where in the image candidates are wrong: squared error of the noise at each position.

        Args:
            image: (C, H, W), as ``denoiser.encode`` takes it in a batch.
            image_id: Its id.
            candidates: Indices of K candidates.
            draws: So many of its draws are averaged, which are the first ones that classification spends.

        Returns:
            (K, h, w) float32 on the CPU, the mean over draws and the channels of x0.
        """
        schedule, noise = self.denoiser.schedule, self.draws.noise
        timesteps_R = self.timesteps_S[:draws]
        with evaluating(self.denoiser):
            x0 = self.denoiser.encode(image[None]).float()
            if noise is None:
                keyed = KeyedNoise(self.draws.seed)
                noise_RD = np.empty((len(timesteps_R), x0.numel()), dtype=np.float32)
                for draw, out_D in enumerate(noise_RD):
                    keyed.fill(out_D, keyed.key(image_id), draw)
                noise = torch.from_numpy(noise_RD).view(-1, *x0.shape[1:])
            shape = len(timesteps_R), len(candidates)
            draw_N = torch.arange(shape[0]).repeat_interleave(shape[1])
            candidate_N = torch.as_tensor(candidates).repeat(shape[0]).to(x0.device)
            maps = []
            for rows in torch.arange(len(draw_N)).split(self.microbatch):
                t, noise_N = timesteps_R[draw_N[rows]].to(x0.device), noise[draw_N[rows]].to(x0.device)
                x0_N = x0.expand(len(rows), *x0.shape[1:])
                x_t = schedule.add_noise(x0_N, noise_N, t)
                output = self.predict(*schedule.network_rows(x_t, t), candidate_N[rows.to(x0.device)])
                epsilon = Rows(schedule, output, x0_N, x_t, t, noise_N).epsilon
                maps.append((epsilon - noise_N).square().mean(1).cpu())
        return torch.cat(maps).unflatten(0, shape).mean(0)

    def run(self) -> Run:
        """For images that arrive in parts: micro-batches are then filled across the parts."""
        return Run(self)

    def predict(self, x_in: Tensor, time: Tensor, candidate: Tensor) -> Tensor:
        """The denoiser's prediction for a micro-batch, by the compiled network if there is one."""
        return (self._compiled or self.denoiser.predict)(x_in, time, candidate)


@dataclass
class _Launch:
    """A micro-batch on its way through the network."""

    pieces: list[Piece]
    errors_N: Tensor  # in the CPU's memory once ``arrived``
    arrived: torch.cuda.Event | None


class Run:
    """Classifies images that arrive in parts; see :meth:`DiffusionClassifier.run`.

    Results come in the order in which images were added, at any later time: :meth:`work` calls the network as long as
    full micro-batches can be made, :meth:`finish` until everything is decided.

    Example:
        >>> run = classifier.run()  # doctest: +SKIP
        >>> for images in loader:  # doctest: +SKIP
        ...     run.add(images)
        ...     results += run.work()
        >>> results += run.finish()  # doctest: +SKIP
    """

    def __init__(self, classifier: DiffusionClassifier) -> None:
        self._classifier = c = classifier
        self._noise = KeyedNoise(c.draws.seed)
        self._slots = Slots(c.in_flight)
        self._waiting: deque[Flight] = deque()
        self._flights: list[Flight] = []
        self._launched: deque[_Launch] = deque()
        self._decided: dict[int, Classification] = {}
        self._added = self._yielded = 0
        self._ahead = 0  # micro-batches that stay on their way while the CPU prepares the next

    def add(
        self,
        images: Tensor,
        ids: Iterable[int | str] | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Check images and let them wait; arguments and errors as in :meth:`DiffusionClassifier.__call__`."""
        c = self._classifier
        numbers = range(self._added, self._added + len(images))
        id_list: list[int | str] = list(numbers if ids is None else ids)
        if isinstance(ids, Tensor):
            id_list = ids.tolist()
        check_images(images, id_list)
        spent, origin = 0, "candidates"
        if candidates is None and c.proposal is not None and len(images):
            with evaluating(c.denoiser), torch.no_grad():
                candidates = c.proposal(images)
            spent, origin = int(getattr(c.proposal, "nfe", 0)), "proposal"
        lists = resolve_candidates(candidates, len(images), len(c.denoiser.candidates), origin)
        for image_id, one in zip(id_list, lists, strict=True):
            if c.budget is not None and c.budget < spent + len(one):
                raise UserError(
                    f"budget: {c.budget} network calls for the {len(one)} candidates of image {image_id!r}, "
                    f"expected at least {spent + len(one)}: one for each{', and those of the proposal' * (spent > 0)}"
                )
        for number, image, image_id, one in zip(numbers, images, id_list, lists, strict=True):
            state, key = c.rule.start(len(one)), self._noise.key(image_id)
            self._waiting.append(Flight(number, image, image_id, one, state, key, spent))
        self._added += len(images)

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
                if self._launched and not (launches and len(self._launched) <= self._ahead):
                    self._land()
                elif not launches:
                    break
                while self._yielded in self._decided:
                    yield self._decided.pop(self._yielded)
                    self._yielded += 1

    def _board(self) -> int:
        """Encode waiting images until a micro-batch is full. Returns the rows at hand."""
        c = self._classifier
        rows = sum(f.rows - f.cut for f in self._flights)
        arrivals: list[Flight] = []
        while self._waiting and rows < c.microbatch and self._slots.free:
            flight = self._waiting.popleft()
            flight.slot = self._slots.free.pop()
            num_candidates = len(flight.candidates_K)
            if c.keep_errors:
                flight.errors_KS = np.full((num_candidates, len(c.timesteps_S)), np.nan, dtype=np.float32)
            if c.keep_distances:
                shape = len(c.timesteps_S), num_candidates, num_candidates
                flight.distances_SKK = np.full(shape, np.nan, dtype=np.float32)
            flight.begin_round(self._next_stop(flight), c.rule.needs)
            arrivals.append(flight)
            rows += flight.rows
        if arrivals:
            images = torch.stack([f.image for f in arrivals if f.image is not None])
            self._slots.put(self._encode(images), [f.slot for f in arrivals])
            for flight in arrivals:
                flight.image = None
            self._flights += arrivals
        return rows

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        x0 = self._classifier.denoiser.encode(images).float()
        if len(x0) != len(images) or x0.ndim < 2:
            raise UserError(f"denoiser.encode: {tuple(images.shape)} became {tuple(x0.shape)}, expected (B, C, h, w)")
        if x0.is_cuda:  # works by itself
            self._ahead = 1
        given = self._classifier.draws.noise
        if given is not None and given.shape[1:] != x0.shape[1:]:
            raise UserError(f"draws: noise of shape {tuple(given.shape[1:])} for x0 of shape {tuple(x0.shape[1:])}")
        return x0

    def _next_stop(self, flight: Flight) -> int:
        """Draws after the next round; those of this round if the budget pays for no more."""
        c = self._classifier
        stop = c.rule.next_stop(flight.stop, len(c.timesteps_S))
        if c.budget is None:
            return stop
        return min(stop, flight.stop + (c.budget - flight.nfe) // len(flight.active_A))

    def _noise_of(self, piece: Piece, out_MD: np.ndarray) -> None:
        """Noise of the piece's draws, in order, into the rows of ``out_MD``."""
        flight, given = piece.flight, self._classifier.draws.noise
        for out_D, draw in zip(out_MD, range(piece.draw[0], piece.draw[-1] + 1), strict=True):
            number = flight.done + draw
            if given is not None:
                out_D[:] = given[number].reshape(-1).cpu()
            elif flight.last_noise is not None and flight.last_noise[0] == number:
                out_D[:] = flight.last_noise[1]
            else:
                self._noise.fill(out_D, flight.key, number)
        unfinished = piece.last % len(flight.active_A) != 0  # the last draw goes on in the next micro-batch
        flight.last_noise = (number, out_D.copy()) if unfinished else None

    @torch.no_grad()
    def _launch(self) -> None:
        """Hand the next micro-batch to the network. The only place that calls it."""
        c, x0_slots = self._classifier, self._slots.x0
        schedule, device = c.denoiser.schedule, x0_slots.device
        pieces = cut(self._flights, c.microbatch)
        # The M distinct (image, draw) pairs of the micro-batch: one x_t each, shared by all candidates.
        draws_per_piece = [piece.draw[-1] - piece.draw[0] + 1 for piece in pieces]
        ends = np.cumsum(draws_per_piece)
        noise_MD = np.empty((ends[-1], self._dims), dtype=np.float32)
        for piece, end, num_draws in zip(pieces, ends, draws_per_piece, strict=True):
            self._noise_of(piece, noise_MD[end - num_draws : end])
        slot_M = np.repeat([p.flight.slot for p in pieces], draws_per_piece)
        number_M = np.concatenate([p.flight.done + np.arange(p.draw[0], p.draw[-1] + 1) for p in pieces])
        pair_N = np.concatenate(
            [p.draw - p.draw[0] + end - n for p, end, n in zip(pieces, ends, draws_per_piece, strict=True)]
        )
        candidate_N = np.concatenate([p.flight.candidates_K[p.flight.active_A][p.column] for p in pieces])

        pair = upload(pair_N, device)
        t_M = c.timesteps_S[torch.from_numpy(number_M)].to(device, non_blocking=True)
        x0_M = x0_slots[upload(slot_M, device)]
        noise_M = upload(noise_MD, device).view_as(x0_M)
        x_t, t, noise = schedule.add_noise(x0_M, noise_M, t_M)[pair], t_M[pair], noise_M[pair]
        output = c.predict(*schedule.network_rows(x_t, t), upload(candidate_N, device))
        check_output(output, x_t)
        with torch.autocast(device.type, enabled=False):
            rows = Rows(schedule, output, x0_M[pair], x_t, t, noise)
            errors_N = download(c.loss(rows))
            if c.rule.needs == "distances" or c.keep_distances:
                measure_distances(pieces, rows.epsilon.flatten(1))
        arrived = None
        if device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        self._launched.append(_Launch(pieces, errors_N, arrived))

    def _land(self) -> None:
        """Wait for the oldest micro-batch and give its results back to the images."""
        c, launch, start = self._classifier, self._launched.popleft(), 0
        if launch.arrived is not None:
            launch.arrived.synchronize()
        errors_N, finished = launch.errors_N.numpy(), []
        for piece in launch.pieces:
            flight = piece.flight
            flight.land(piece, errors_N[start : start + piece.size], c.weights_S)
            start += piece.size
            if flight.landed == flight.rows:
                flight.end_round()
                if not np.isfinite(flight.sums_K[flight.active_A]).all():
                    self._drop_broken(flight)
                finished.append(flight)
        rounds = [self._round(flight) for flight in finished if len(flight.active_A)]
        asked = [flight for flight in finished if len(flight.active_A)]
        survivors = c.rule.survivors_of([flight.state for flight in asked], rounds)
        for flight, current, survives_A in zip(asked, rounds, survivors, strict=True):
            flight.keep(current.whole_classes(survives_A), current.scores_A, self._dims)
        for flight in finished:
            if self._is_decided(flight):
                self._decided[flight.position] = self._decide(flight)
                self._slots.free.append(flight.slot)
                self._flights.remove(flight)

    def _class_of(self, flight: Flight) -> np.ndarray | None:
        """Class of each candidate in play, where classes are compared by means over theirs."""
        class_of = self._classifier.class_of
        return None if class_of is None else class_of[flight.candidates_K[flight.active_A]]

    def _round(self, flight: Flight) -> Round:
        """What the rule is shown of the round that has just landed."""
        c, spent, class_A = self._classifier, slice(flight.done, flight.stop), self._class_of(flight)
        return Round(
            c.loss.name,
            flight.stop,
            len(c.timesteps_S),
            self._dims,
            flight.active_A,
            flight.pooled(flight.sums_K[flight.active_A], class_A) / flight.stop,
            c.log_snr_S[spent],
            c.weights_S[spent],
            None if flight.errors_RA is None else flight.pooled(flight.errors_RA, class_A),
            flight.distances_RAA,
            class_A,
        )

    def _is_decided(self, flight: Flight) -> bool:
        """Whether the flight has arrived; begins its next round if not."""
        c, in_play = self._classifier, len(flight.active_A)
        class_A = self._class_of(flight)
        rivals = in_play if class_A is None else len(np.unique(class_A))
        if in_play == 0 or flight.stop == len(c.timesteps_S) or rivals == 1 < len(flight.candidates_K):
            return True
        stop = self._next_stop(flight)
        if stop == flight.stop:  # out of budget
            return True
        flight.begin_round(stop, c.rule.needs)
        return False

    def _drop_broken(self, flight: Flight) -> None:
        """Take candidates with NaN or infinite errors out of play."""
        finite_A = np.isfinite(flight.sums_K[flight.active_A])
        broken = flight.active_A[~finite_A]
        names = [self._classifier.denoiser.candidates.names[i] for i in flight.candidates_K[broken][:3]]
        warnings.warn(
            f"image {flight.image_id!r}: the network returned NaN or infinity for {len(broken)} of "
            f"{len(finite_A)} candidates ({', '.join(names)}{', …' if len(broken) > 3 else ''}); they cannot win",
            RuntimeWarning,
            stacklevel=2,
        )
        flight.sums_K[broken] = np.inf
        flight.forget(~finite_A)

    def _decide(self, flight: Flight) -> Classification:
        c = self._classifier
        class_K = None if c.class_of is None else c.class_of[flight.candidates_K]
        best, scores_K, differences_K = flight.decide(self._dims, class_K)
        candidate = None if best is None else int(flight.candidates_K[best])
        return Classification(
            image_id=flight.image_id,
            label=None if candidate is None else c.denoiser.candidates.classes[candidate],
            candidate=candidate,
            margin=flight.margin,
            abstained=candidate is None or flight.margin < c.abstain,
            candidates_K=torch.from_numpy(flight.candidates_K.copy()),
            scores_K=torch.from_numpy(scores_K),
            differences_K=torch.from_numpy(differences_K),
            draws_K=torch.from_numpy(flight.draws_K),
            nfe=flight.nfe,
            dims=self._dims,
            timesteps_S=c.timesteps_S,
            errors_KS=None if flight.errors_KS is None else torch.from_numpy(flight.errors_KS),
            distances_SKK=None if flight.distances_SKK is None else torch.from_numpy(flight.distances_SKK),
        )

    @property
    def _dims(self) -> int:
        """Number of values of x0."""
        return self._slots.dims


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
