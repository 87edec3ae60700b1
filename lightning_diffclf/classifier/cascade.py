"""A small network proposes candidates to a large one.

Suffixes of shapes: K candidates of one image.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.classifier.classification import Classification
from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier
from lightning_diffclf.classifier.recipe import Recipe
from lightning_diffclf.classifier.search import Found, Search, check_kept, flops_of, groups_of, heaviest
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.errors import UserError


@dataclass(frozen=True)
class Cascade(Search):
    """Proposes the candidates that another network finds likely, usually a much cheaper one: no labels are needed.

    The other network classifies the images by a recipe of its own, best of few draws of all candidates. Against each
    there is evidence of n · D · d / (2e) nats: its mean error over n draws is larger by d than the winner's, e (D:
    values of x0). Tempered, these make weights, and the candidates with most of the weight are proposed.

    Both networks see the same images, each in the space of its own ``encode``, and have the same candidates. Calls of
    the other network are counted by their FLOPs, in calls of the one that decides; ``encode`` is not counted, as
    nowhere. The noise is keyed by the recipe's seed and the image's id, in another way than that of the contest, so
    that the draws which decide are independent of those that proposed: results depend on neither batch, rank nor order.

    Made in Python: the other network comes with its weights.

    Args:
        denoiser: The other network. A module is moved to the device of the images.
        recipe: How it classifies; two antithetic draws of all candidates, in the middle of the time axis, if omitted.
        miss: Candidates are kept until the weight of all others is below this, in (0, 1). Weights are tempered: what
            they leave out is right far less often than they say.
        least: Candidates to keep at least. Images with no more than these, or two, are not searched.
        most: Candidates to keep at most.
        temper: Share of the nats that count, above 0: neighbouring values are correlated, and networks differ.

    Raises:
        ValueError: if a setting is out of range, or the recipe names candidates or has a proposal.

    Example:
        >>> cascade = Cascade(dit_s)  # doctest: +SKIP
        >>> classifier = DiffusionClassifier(  # doctest: +SKIP
        ...     dit_xl, draws=250, elimination=LikelihoodRatio(), proposal=cascade
        ... )
    """

    denoiser: ConditionalDenoiser = field(repr=False)
    recipe: Recipe = field(default_factory=lambda: Recipe(draws=2, antithetic=True))
    miss: float = 0.1
    least: int = 2
    most: int = 64
    temper: float = 0.1

    def __post_init__(self) -> None:
        check_kept("cascade", self.miss, self.least, self.most)
        if not 0 < self.temper < math.inf:
            raise UserError(f"cascade: temper {self.temper}, expected a number above 0")
        for name in ("candidates", "proposal"):
            if getattr(self.recipe, name) is not None:
                raise UserError(f"cascade: a recipe with {name}, expected one of all candidates")

    def check(self, denoiser: Any) -> None:
        """Raise ValueError unless both networks have the same candidates and the recipe fits the other network.

        Raises:
            TypeError: if the other network is no denoiser.
        """
        DiffusionClassifier(self.denoiser, self.recipe)
        ours, theirs = self.denoiser.candidates, denoiser.candidates
        if len(ours) != len(theirs):
            raise UserError(f"cascade: a network with {len(ours)} candidates, expected the {len(theirs)} of the other")
        pairs = (zip(one.names, one.classes, strict=True) for one in (ours, theirs))
        for k, (own, other) in enumerate(zip(*pairs, strict=True)):
            if own != other:
                raise UserError(
                    f"cascade: candidate {k} is {own[0]!r} of class {own[1]}, expected {other[0]!r} of class "
                    f"{other[1]} as in the network that decides"
                )

    def propose(
        self,
        classifier: DiffusionClassifier,
        images: Tensor,
        ids: Sequence[int | str],
        candidates: Sequence[np.ndarray],
    ) -> Found:
        """As :meth:`Search.propose`. Of an image without a winner, all draws are dropped and all candidates stay.

        Raises:
            ValueError: as the other network's :class:`DiffusionClassifier` does.
        """
        found, nfe, dropped = list(candidates), [0] * len(ids), [0] * len(ids)
        searched = [b for b, one in enumerate(candidates) if len(one) > max(2, self.least)]
        if not searched:
            return Found(found, nfe, dropped)
        if isinstance(self.denoiser, nn.Module):  # no part of the module that a Trainer moves
            self.denoiser.to(images.device)
        small = DiffusionClassifier(self.denoiser, self.recipe, microbatch=classifier.microbatch)
        cost, group_of = cost_of(classifier, small, images[:1]), groups_of(classifier)
        lists = [candidates[b].tolist() for b in searched]
        results = small(images[searched], [f"cascade: {ids[b]}" for b in searched], lists)
        for b, result in zip(searched, results, strict=True):
            nfe[b] = math.ceil(cost * result.nfe)
            if result.candidate is None:
                dropped[b] = int(result.draws_K.max())
            else:
                weights_K = self.weights(result)
                found[b] = heaviest(weights_K, candidates[b], group_of, self.miss, self.least, self.most)
        return Found(found, nfe, dropped)

    def weights(self, result: Classification) -> np.ndarray:
        """Weight of each candidate of a decided image (K,), of a total of 1; 0 where the network returned NaN."""
        winner = result.candidates_K.tolist().index(result.candidate)
        error = max(float(result.scores_K[winner]), 1e-300)
        nats_K = result.draws_K * result.dims * result.differences_K / (2 * error)
        return (-self.temper * nats_K).softmax(0).numpy()


_COSTS: weakref.WeakKeyDictionary[Any, float] = weakref.WeakKeyDictionary()  # one for each classifier


def cost_of(classifier: DiffusionClassifier, small: DiffusionClassifier, image: Tensor) -> float:
    """FLOPs of a prediction of ``small`` in those of ``classifier``, measured once on ``image`` (1, C, H, W)."""
    if classifier not in _COSTS:
        with torch.no_grad():
            ours, theirs = (flops_of(one.denoiser, one.denoiser.encode(image).float()) for one in (small, classifier))
        _COSTS[classifier] = ours / theirs if ours and theirs else 1.0  # nothing is counted: a call is a call
    return _COSTS[classifier]
