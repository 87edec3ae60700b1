"""Networks that give all logits at once, decided about as denoisers are: by contests of a single draw."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.classifier.checks import resolve_candidates, resolve_ids
from lightning_diffclf.classifier.classification import Classification
from lightning_diffclf.classifier.contest import Contest, Terms, judge
from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier
from lightning_diffclf.classifier.elimination import Elimination, Exhaustive
from lightning_diffclf.classifier.logits import by_class
from lightning_diffclf.classifier.recipe import Recipe
from lightning_diffclf.denoiser import evaluating
from lightning_diffclf.discriminative import Discriminative
from lightning_diffclf.errors import UserError, WrongType, check_at_least

OF_LOGITS = ("abstain", "ensemble", "candidates", "reduction", "temperature", "coverage", "coverage_by_class")
"""Fields of the recipe that mean something without noise."""


class DiscriminativeClassifier:
    """Classifies images by the logits of a network, which is called once for each.

    The error of a candidate is its negative logit, over one draw at timestep 0: the image without noise. So decisions,
    ensembles of prompts, margins (in nats: the difference of two logits), probabilities (a softmax of the logits) and
    what is stored of them are those of :class:`~.diffusion_classifier.DiffusionClassifier`; the NFE of an image is 1.

    The caller chooses device and precision, as there.

    Args:
        network: See :class:`~lightning_diffclf.discriminative.Discriminative`.
        recipe: Only what means something without noise may be set: ``ensemble``, ``candidates``, ``abstain``,
            ``reduction``, ``temperature``, ``coverage``, ``coverage_by_class``.
        microbatch: Images of one network call.
        **settings: Fields of the recipe by their names, in place of ``recipe``.

    Raises:
        TypeError: if ``network`` lacks one of the two members.
        ValueError: if another field of the recipe is set.

    Example:
        >>> class Brightness:
        ...     candidates = Candidates(["dark", "bright"])
        ...
        ...     def logits(self, images):
        ...         return images.mean((1, 2, 3))[:, None] * torch.tensor([-1.0, 1.0])
        >>> [result] = DiscriminativeClassifier(Brightness())(torch.full((1, 3, 4, 4), 0.5))
        >>> result.names[result.candidate], result.margin, result.nfe
        ('bright', 1.0, 1)
    """

    def __init__(
        self, network: Discriminative, recipe: Recipe | None = None, *, microbatch: int = 256, **settings: Any
    ) -> None:
        missing = [name for name in ("candidates", "logits") if not hasattr(network, name)]
        if missing:
            raise WrongType(f"network: {type(network).__name__} lacks {missing}; see Discriminative")
        check_at_least(1, microbatch=microbatch)
        self.network, self.microbatch = network, microbatch
        self.recipe = recipe if recipe is not None else Recipe(**settings)
        usual = Recipe()
        for field in fields(Recipe):
            found, expected = getattr(self.recipe, field.name), getattr(usual, field.name)
            if field.name not in OF_LOGITS and found != expected:
                raise UserError(
                    f"{field.name}: {found}, but {type(network).__name__} adds no noise: it is called once for each "
                    f"image; expected {'null' if expected is None else expected}"
                )
        self.timesteps_S = torch.zeros(1)
        self.terms = Terms(Exhaustive(), "logits", np.array([np.inf]), np.ones(1), logits=True)

    @property
    def candidates(self) -> Candidates:
        """What the network can be asked about."""
        return self.network.candidates

    @property
    def rule(self) -> Elimination:
        """Drops no candidate."""
        return self.terms.rule

    def __call__(
        self,
        images: Tensor,
        ids: Iterable[int | str] | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[Classification]:
        """Classify images (B, C, H, W); arguments, results and errors are those of DiffusionClassifier."""
        run = self.run()
        run.add(images, ids, candidates)
        return list(run.finish())

    def run(self) -> LogitsRun:
        """For images that arrive in parts."""
        return LogitsRun(self)


class LogitsRun:
    """Classifies images that arrive in parts, in the order in which they were added; as :class:`~.engine.Packer`."""

    def __init__(self, classifier: DiscriminativeClassifier) -> None:
        self._classifier = classifier
        self._added = 0
        self._waiting: deque[tuple[Tensor, list[int | str], list[np.ndarray]]] = deque()

    def add(
        self,
        images: Tensor,
        ids: Iterable[int | str] | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Check images and let them wait."""
        c = self._classifier
        names = resolve_ids(images, ids, self._added)
        given = c.recipe.candidates if candidates is None else candidates
        lists = resolve_candidates(given, len(images), len(c.candidates))
        self._waiting += (
            (images[rows], names[rows], lists[rows])
            for start in range(0, len(images), c.microbatch)
            for rows in [slice(start, start + c.microbatch)]
        )
        self._added += len(images)

    def work(self) -> Iterator[Classification]:
        """Call the network for all added images; yields each decision."""
        while self._waiting:
            images, names, lists = self._waiting.popleft()
            yield from self._decided(self._logits(images), names, lists)

    finish = work

    @torch.no_grad()
    def _logits(self, images: Tensor) -> np.ndarray:
        c = self._classifier
        with evaluating(c.network):
            logits = c.network.logits(images)
        if tuple(logits.shape) != (len(images), len(c.candidates)):
            raise UserError(f"logits: shape {tuple(logits.shape)}, expected ({len(images)}, {len(c.candidates)})")
        return logits.float().cpu().numpy()

    def _decided(
        self, logits_BK: np.ndarray, names: list[int | str], lists: list[np.ndarray]
    ) -> Iterator[Classification]:
        c = self._classifier
        classes, pools = np.array(c.candidates.classes), c.recipe.ensemble == "mean"
        contests = [Contest(c.terms, len(one), classes[one] if pools else None) for one in lists]
        errors = [-logits_K[one] for logits_K, one in zip(logits_BK, lists, strict=True)]
        for contest, errors_K in zip(contests, errors, strict=True):
            contest.land(errors_K[None])
        judge(contests, 1)
        for contest, name, one, errors_K in zip(contests, names, lists, errors, strict=True):
            yield Classification.of(
                contest,
                name,
                one,
                c.candidates,
                c.recipe.abstain,
                1,
                c.timesteps_S,
                c.recipe.posterior,
                errors_KS=errors_K[:, None],
            )


class DiscriminativeLogits(nn.Module):
    """A discriminative classifier as a plain network, as :class:`~.logits.DiffusionLogits`: images in [0, 1] to logits.

    Args:
        classifier: The classifier.
    """

    def __init__(self, classifier: DiscriminativeClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        if isinstance(classifier.network, nn.Module):
            self.network: nn.Module = classifier.network  # so that .to(), .eval() and parameters reach it

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W) in [0, 1] for the K classes in play, in ascending order; float32."""
        c = self.classifier
        with evaluating(c.network):
            logits = c.network.logits(images * 2 - 1).float()
        candidate_K = torch.as_tensor(c.recipe.candidates or range(len(c.candidates)), device=logits.device)
        class_K = torch.tensor(c.candidates.classes, device=logits.device)[candidate_K]
        return -by_class(-logits[:, candidate_K], class_K, c.recipe.ensemble)


Classifier = DiffusionClassifier | DiscriminativeClassifier
"""What an evaluation classifies with."""
