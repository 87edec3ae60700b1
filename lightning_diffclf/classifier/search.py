"""Below one call per candidate: the gradient of the error by the condition ranks all candidates at once.

Suffixes of shapes: B images, K candidates, P numbers of one condition, M images of a micro-batch.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.denoiser import ConditionalDenoiser, ConditionVectors, SearchableDenoiser
from lightning_diffclf.errors import UserError, WrongType
from lightning_diffclf.noise import KeyedNoise
from lightning_diffclf.schedule import NoiseSchedule

if TYPE_CHECKING:
    from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier

FIRST_DRAW = 2**63  # of the search: its noise is none of the contest's
CONDITIONS_AT_ONCE = 64  # in float32, since a thousand prompts of T5 are gigabytes


class Found(NamedTuple):
    """What a search found for B images.

    Attributes:
        candidates: Indices of those to try, ascending, int64, one array for each image.
        nfe: What finding them cost each image, in network calls.
        dropped: Draws of each image that did not count, since their gradient was NaN or infinite.
    """

    candidates: list[np.ndarray]
    nfe: list[int]
    dropped: list[int]


class Search:
    """Proposes candidates with the help of the denoiser itself.

    Attributes:
        inflation: That of :class:`~.sequential.LikelihoodRatio` where it was given none: what the search measured, or 1
            if it measures nothing; None if it has not been fitted yet.
    """

    inflation: float | None = 1.0

    def check(self, denoiser: Any) -> None:
        """Raise TypeError if ``denoiser`` cannot be searched."""

    def propose(
        self,
        classifier: DiffusionClassifier,
        images: Tensor,
        ids: Sequence[int | str],
        candidates: Sequence[np.ndarray],
    ) -> Found:
        """Which of ``candidates`` to try for each image, and what finding them cost.

        Args:
            classifier: Says denoiser, seed of the noise, and what an ensemble is.
            images: (B, C, H, W), as ``denoiser.encode`` takes them.
            ids: Their ids (B,), which key the noise.
            candidates: Indices of those in play, one int64 array for each image.
        """
        raise NotImplementedError


class FittedSearch(Search):
    """A search that learns from images before it proposes any: by :meth:`fit`, or, where that was not called, by an
    evaluation under a Trainer, from the training set of its data module.

    Attributes:
        images: Training images that an evaluation fits it to, at most.
    """

    images: int

    @property
    def fitted(self) -> bool:
        """Whether it has learnt."""
        return bool(self.state_dict())

    def calls(self, num_candidates: int) -> int:
        """Network calls that learning from one image takes."""
        raise NotImplementedError

    def fit(self, denoiser: ConditionalDenoiser, batches: Iterable[tuple[Tensor, Any]]) -> FittedSearch:
        """Learn from batches of images (B, C, H, W) and classes (B,), int64, or None; returns itself."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """What it has learnt, for saving; nothing before."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Take over what another one has learnt."""
        raise NotImplementedError


@dataclass(frozen=True)
class GradientSearch(Search):
    """Proposes candidates by mirror descent on mixtures of their conditions: no labels, no other network.

    One forward and one backward pass at the mixture c̄ = Σ w_k c_k give the gradient of the error e by the condition.
    To first order, candidate k fits by D/(2e) ⟨∇e, c̄ - c_k⟩ nats better than the mixture does (D: values of x0). Each
    draw adds these to log w, tempered, and the next draw is taken at the new mixture: a few draws rank any number of
    candidates. Those with most of the weight are proposed. See docs/elimination.md.

    Results depend on (seed, image id, image, candidates) only. Noise and timesteps are the search's own, so that the
    draws which decide among the proposed are independent of those that proposed them.

    Args:
        draws: Gradients for each image: few for few candidates, about 2 for ten and 6 for a hundred.
        miss: Candidates are kept until the weight of all others is below this, in (0, 1). Weights are tempered: what
            they leave out is right far less often than they say.
        least: Candidates to keep at least. Images with no more than these, or two, are not searched.
        most: Candidates to keep at most.
        temper: Share of the nats that the first draw adds, above 0: linear extrapolation is too confident.
        fall: The j-th draw, from 0 on, adds ``temper / (1 + fall · j)`` of them: 0 or more.
        timesteps: Part of the time axis that draws are taken from, 0 being the cleanest and 1 the noisiest.
        microbatch: Images in one forward and backward pass, which keeps activations.

    Raises:
        ValueError: if a setting is out of range.
    """

    draws: int = 6
    miss: float = 0.3
    least: int = 2
    most: int = 64
    temper: float = 0.03
    fall: float = 0.2
    timesteps: tuple[float, float] = (0.3, 0.7)
    microbatch: int = 64

    def __post_init__(self) -> None:
        for name, value in (("draws", self.draws), ("microbatch", self.microbatch)):
            if value < 1:
                raise UserError(f"search: {name} {value}, expected at least 1")
        check_kept("search", self.miss, self.least, self.most)
        if not 0 < self.temper < math.inf:
            raise UserError(f"search: temper {self.temper}, expected a number above 0")
        if not 0 <= self.fall < math.inf:
            raise UserError(f"search: fall {self.fall}, expected 0 or more")
        if len(self.timesteps) != 2 or not 0 <= self.timesteps[0] < self.timesteps[1] <= 1:
            raise UserError(f"search: timesteps {tuple(self.timesteps)}, expected a part of 0 … 1, such as (0.3, 0.7)")

    def check(self, denoiser: Any) -> None:
        """Raise TypeError if ``denoiser`` is no :class:`~lightning_diffclf.denoiser.SearchableDenoiser`."""
        missing = [member for member in ("conditions", "predict_from") if not hasattr(denoiser, member)]
        if missing:
            raise WrongType(f"search: {type(denoiser).__name__} lacks {missing}; see SearchableDenoiser")

    def propose(
        self,
        classifier: DiffusionClassifier,
        images: Tensor,
        ids: Sequence[int | str],
        candidates: Sequence[np.ndarray],
    ) -> Found:
        """As :meth:`Search.propose`.

        Raises:
            TypeError: if the denoiser has no conditions to search among.
            ValueError: if its error cannot be differentiated by them.
        """
        self.check(classifier.denoiser)
        # A Trainer evaluates in inference mode, whose tensors no gradient goes through.
        with torch.inference_mode(False), torch.no_grad():
            x0 = classifier.denoiser.encode(images.clone()).float()
            return self._search(classifier, x0.clone(), ids, candidates)

    def _search(
        self, classifier: DiffusionClassifier, x0: Tensor, ids: Sequence[int | str], candidates: Sequence[np.ndarray]
    ) -> Found:
        denoiser = cast(SearchableDenoiser, classifier.denoiser)
        found, nfe, dropped = list(candidates), [0] * len(ids), [0] * len(ids)
        searched = [b for b, one in enumerate(candidates) if len(one) > max(2, self.least)]
        if not searched:
            return Found(found, nfe, dropped)
        cost = cost_of(classifier, x0[:1])
        group_K = groups_of(classifier)

        keyed = KeyedNoise(classifier.draws.seed)
        keys = [keyed.key(image_id) for image_id in ids]
        log_w_BK = torch.full((len(ids), len(group_K)), -math.inf)
        for b in searched:
            log_w_BK[b, torch.from_numpy(candidates[b])] = 0
        log_w_BK = log_w_BK.to(x0.device)
        for draw, t in enumerate(self.times(denoiser.schedule)):
            share = self.temper / (1 + self.fall * draw)
            for first in range(0, len(searched), self.microbatch):
                rows = searched[first : first + self.microbatch]
                noise = np.empty((len(rows), *x0.shape[1:]), dtype=np.float32)
                for out, b in zip(noise, rows, strict=True):
                    keyed.fill(out, keys[b], FIRST_DRAW + draw)
                nats_MK = _nats(denoiser, x0[rows], torch.from_numpy(noise).to(x0.device), t, log_w_BK[rows])
                counts_M = nats_MK.isfinite().all(1)
                log_w_BK[rows] += share * torch.where(counts_M[:, None], nats_MK, 0)
                for b, counts in zip(rows, counts_M.tolist(), strict=True):
                    dropped[b] += not counts
        w_BK = log_w_BK.softmax(1).cpu().numpy()
        for b in searched:
            nfe[b] = math.ceil(cost * self.draws)
            if dropped[b] < self.draws:
                found[b] = heaviest(w_BK[b, candidates[b]], candidates[b], group_K, self.miss, self.least, self.most)
        if any(dropped):
            worst = max(range(len(ids)), key=dropped.__getitem__)
            warnings.warn(
                f"search: {sum(dropped)} of {self.draws * len(searched)} gradients were NaN or infinite and do not "
                f"count (image {ids[worst]!r}: {dropped[worst]} of {self.draws}); without any, all candidates stay",
                RuntimeWarning,
                stacklevel=2,
            )
        return Found(found, nfe, dropped)

    def times(self, schedule: NoiseSchedule) -> Tensor:
        """Timesteps of the draws (draws,): spread evenly over their part of the time axis, from its middle on."""
        grid = schedule.timesteps(schedule.num_timesteps or 1000)
        grid = grid[schedule.log_snr(grid).argsort(descending=True)]
        low, high = self.timesteps
        place = low + (high - low) * (nested_order(self.draws) + 0.5) / self.draws
        return grid[(place * len(grid)).long()]


def check_kept(name: str, miss: float, least: int, most: int) -> None:
    """Raise ValueError unless these say how many candidates the search called ``name`` keeps."""
    if least < 1:
        raise UserError(f"{name}: least {least}, expected at least 1")
    if most < least:
        raise UserError(f"{name}: most {most}, expected at least the {least} of least")
    if not 0 < miss < 1:
        raise UserError(f"{name}: miss {miss}, expected a share between 0 and 1")


def heaviest(
    weights_K: np.ndarray, candidates_K: np.ndarray, group_of: np.ndarray, miss: float, least: int, most: int
) -> np.ndarray:
    """Those of ``candidates_K`` whose groups have most of the weight, ascending.

    Args:
        weights_K: Weight of each, of a total of 1.
        candidates_K: Their indices.
        group_of: What stays or goes together: the group of each candidate that there is.
        miss: Groups are kept until the weight of all others is below this.
        least: Groups to keep at least.
        most: Groups to keep at most.
    """
    group_K = np.unique(group_of[candidates_K], return_inverse=True)[1]
    weights_G = np.bincount(group_K, weights=weights_K)
    order = np.argsort(-weights_G, kind="stable")
    left = weights_G.sum() - np.cumsum(weights_G[order])  # after so many
    count = int(np.clip(1 + (left >= miss).sum(), least, most))
    return np.sort(candidates_K[np.isin(group_K, order[:count])])


def groups_of(classifier: DiffusionClassifier) -> np.ndarray:
    """What a search keeps or drops together (K,): classes where their candidates' mean counts, or else candidates."""
    candidates = classifier.denoiser.candidates
    return np.array(candidates.classes) if classifier.recipe.ensemble == "mean" else np.arange(len(candidates))


def _conditions(denoiser: SearchableDenoiser, device: torch.device) -> Iterator[tuple[slice, ConditionVectors]]:
    """Conditions of all candidates, some at a time."""
    for first in range(0, len(denoiser.candidates), CONDITIONS_AT_ONCE):
        some = torch.arange(first, min(first + CONDITIONS_AT_ONCE, len(denoiser.candidates)), device=device)
        yield slice(first, first + len(some)), denoiser.conditions(some)


def _flat(conditions: ConditionVectors) -> Tensor:
    """One row of numbers for each condition (N, P), float32."""
    parts = (conditions,) if isinstance(conditions, Tensor) else conditions
    return torch.cat([part.flatten(1).float() for part in parts], dim=1)


def _unflat(rows_NP: Tensor, like: ConditionVectors) -> ConditionVectors:
    """Undo :func:`_flat`."""
    if isinstance(like, Tensor):
        return rows_NP.unflatten(1, like.shape[1:])
    parts = rows_NP.split([part[0].numel() for part in like], dim=1)
    return tuple(rows.unflatten(1, part.shape[1:]) for rows, part in zip(parts, like, strict=True))


def _nats(denoiser: SearchableDenoiser, x0: Tensor, noise: Tensor, t: Tensor, log_w_MK: Tensor) -> Tensor:
    """What each candidate's condition fits better than the mean of all of them, to first order (M, K), in nats.

    NaN or infinite in all of a row, or in the columns of broken conditions, where there is no gradient.
    """
    w_MK, mixture_MP, like = log_w_MK.softmax(1), torch.zeros(0), cast(ConditionVectors, None)
    for some, conditions in _conditions(denoiser, x0.device):
        part_MP = w_MK[:, some] @ _flat(conditions)
        mixture_MP, like = (part_MP if like is None else mixture_MP + part_MP), conditions
    gradient_MP = gradient(denoiser, x0, noise, t, mixture_MP, like)
    nats_MK = torch.cat([gradient_MP @ _flat(conditions).T for _, conditions in _conditions(denoiser, x0.device)], 1)
    return nats_MK - nats_MK.mean(1, keepdim=True)


def gradient(
    denoiser: SearchableDenoiser, x0: Tensor, noise: Tensor, t: Tensor, mixture_MP: Tensor, like: ConditionVectors
) -> Tensor:
    """Gradient of the log likelihood -D/2 · log e by the condition (M, P); e is the mean squared error of the noise.

    Raises:
        ValueError: if the prediction does not depend on the condition, or not by operations that have a derivative.
    """
    schedule, t_M = denoiser.schedule, t.to(x0.device).expand(len(x0))
    x_t = schedule.add_noise(x0, noise, t_M)
    with torch.enable_grad():
        mixture_MP = mixture_MP.detach().requires_grad_()
        output = denoiser.predict_from(*schedule.network_rows(x_t, t_M), _unflat(mixture_MP, like))
        found = None
        if output.requires_grad:
            with torch.autocast(x0.device.type, enabled=False):
                error_M = (schedule.to_epsilon(output.float(), x_t, t_M) - noise).square().flatten(1).mean(1)
                likelihood = -x0[0].numel() / 2 * error_M.log().sum()
            (found,) = torch.autograd.grad(likelihood, mixture_MP, allow_unused=True)
    if found is None:
        raise UserError(
            f"search: what {type(denoiser).__name__} predicts has no gradient by its conditions (predict_from under "
            "no_grad, or detached), expected a differentiable network; or classify without a search"
        )
    return found


_COSTS: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()  # one for each classifier


def cost_of(classifier: DiffusionClassifier, x0: Tensor) -> float:
    """FLOPs of a gradient in units of those of a prediction, measured once on ``x0`` (1, C, h, w).

    Raises:
        ValueError: if there is no gradient.
    """
    if classifier not in _COSTS:
        denoiser = cast(SearchableDenoiser, classifier.denoiser)
        t = denoiser.schedule.timesteps(1)
        first = torch.zeros(1, dtype=torch.int64, device=x0.device)
        conditions = denoiser.conditions(first)
        try:
            with FlopCounterMode(display=False) as both:
                gradient(denoiser, x0, torch.zeros_like(x0), t[0], _flat(conditions), conditions)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"search: {type(denoiser).__name__} cannot be differentiated by its conditions ({reason}); quantised "
                "networks and some kernels have no derivative: classify without a search"
            ) from error
        total = flops_of(denoiser, x0)
        # A backward pass is at most two forward ones, if nothing is counted.
        _COSTS[classifier] = both.get_total_flops() / total if total else 3.0
    return _COSTS[classifier]


def flops_of(denoiser: ConditionalDenoiser, x0: Tensor) -> int:
    """FLOPs of one prediction, measured on ``x0`` (1, C, h, w): matrix products, convolutions and attention."""
    t, first = denoiser.schedule.timesteps(1).to(x0.device), torch.zeros(1, dtype=torch.int64, device=x0.device)
    with FlopCounterMode(display=False) as counter:
        denoiser.predict(*denoiser.schedule.network_rows(x0, t), first)
    return counter.get_total_flops()
