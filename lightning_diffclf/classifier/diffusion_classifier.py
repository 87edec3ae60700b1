"""The classifier: what decides, and what it decides with; the engine does the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.classifier.classification import Classification
from lightning_diffclf.classifier.contest import Terms
from lightning_diffclf.classifier.device import CompiledPredict
from lightning_diffclf.classifier.draws import Draws
from lightning_diffclf.classifier.elimination import Elimination, Exhaustive
from lightning_diffclf.classifier.engine import Packer
from lightning_diffclf.classifier.flight import Landed
from lightning_diffclf.classifier.from_checkpoint import FromCheckpoint
from lightning_diffclf.classifier.logits import Differentiable
from lightning_diffclf.classifier.recipe import Recipe
from lightning_diffclf.classifier.score import Loss, timestep_weights
from lightning_diffclf.classifier.search import Search
from lightning_diffclf.denoiser import ConditionalDenoiser, predict_rows
from lightning_diffclf.errors import WrongType, check_at_least


class DiffusionClassifier(FromCheckpoint, Differentiable):
    """Classifies images by the error of a conditional denoiser (Li et al. 2023, Algorithm 1).

    For each image, noise is added at several timesteps, the network predicts it under each candidate, and the candidate
    with the lowest mean error wins. Results depend on (seed, image id, draw index) only.

    The caller chooses the device, by where denoiser and images are, and the precision, by autocast around the call.
    Errors are always computed in float32 and summed in float64.

    Args:
        denoiser: The network; see :class:`~lightning_diffclf.denoiser.ConditionalDenoiser`.
        recipe: What decides results; see :class:`~.recipe.Recipe`. Or its draws alone.
        microbatch: Rows (image, candidate, draw) in one network call. Bounds the memory together with ``in_flight``.
        in_flight: Images between encoding and decision at most; ``microbatch`` by default.
        keep_errors: Keep every single error in the result (K × S numbers an image).
        keep_distances: Keep the distances between the candidates' predictions as well (S × K × K numbers an image).
        compile: Compile the network (``torch.compile``, with CUDA graphs on a GPU). Every call then has exactly
            ``microbatch`` rows, the last ones padded, so that it is compiled once. Pays after many calls.
        **settings: Fields of the recipe by their names, in place of ``recipe``.

    Raises:
        ValueError: if a setting is out of range, there are more draws than timesteps, fewer draws than the rule spends,
            or the loss does not fit the schedule or the rule.
        TypeError: if ``denoiser`` lacks one of the four members.

    Example:
        >>> classifier = DiffusionClassifier(denoiser, draws=Draws(100), microbatch=64)  # doctest: +SKIP
        >>> [result.prediction for result in classifier(images, ids=range(len(images)))]  # doctest: +SKIP
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
        check_at_least(1, microbatch=microbatch, in_flight=in_flight)
        if isinstance(recipe, Recipe):
            if settings:
                raise WrongType(f"{sorted(settings)}: given beside a recipe, expected them in it")
        else:
            recipe = Recipe(**settings) if recipe is None else Recipe(draws=recipe, **settings)
        self.recipe = recipe
        self.denoiser = denoiser
        rule = recipe.elimination or Exhaustive()
        self.loss = Loss(recipe.loss)
        self.loss.check(denoiser.schedule)
        rule.check(self.loss.name)
        if isinstance(recipe.proposal, Search):
            recipe.proposal.check(denoiser)
        keyed: dict[str, Any] = {"seed": recipe.seed, "grid": recipe.grid, "antithetic": recipe.antithetic}
        draws = Draws(recipe.draws, **keyed) if isinstance(recipe.draws, int) else recipe.draws
        order = rule.order(draws.count if draws else Draws.count)
        self.draws = draws or Draws(len(order) if order is not None else Draws.count, **keyed)
        self.timesteps_S = self.draws.visit(denoiser.schedule, order)
        log_snr_S = denoiser.schedule.log_snr(self.timesteps_S).double()
        weights_S = timestep_weights(recipe.weights, log_snr_S)
        self.terms = Terms(rule, self.loss.name, log_snr_S.numpy(), weights_S.numpy(), recipe.budget)
        self.microbatch = microbatch
        self.in_flight = in_flight or microbatch
        self.keep_errors, self.keep_distances = keep_errors, keep_distances
        self._compiled = CompiledPredict(denoiser, microbatch) if compile else None

    @property
    def candidates(self) -> Candidates:
        """What the denoiser can be asked about."""
        return self.denoiser.candidates

    @property
    def rule(self) -> Elimination:
        """Drops candidates early. It knows what the search measured, which may be fitted after this was made."""
        proposal = self.recipe.proposal
        return self.terms.rule.informed(proposal.inflation if isinstance(proposal, Search) else 1.0)

    def __call__(
        self,
        images: Tensor,
        ids: Iterable[int | str] | None = None,
        candidates: Sequence[int] | Sequence[Sequence[int]] | None = None,
    ) -> list[Classification]:
        """Classify images; :meth:`run` gives each result as soon as it is decided.

        Args:
            images: (B, C, H, W) floating point, what ``denoiser.encode`` takes, on the network's device.
            ids: A stable id of each image (an integer or a string); it keys the noise. By default the positions
                0 … B-1, which makes the noise depend on the order of the images.
            candidates: Indices of the candidates in play: one list for all images, or one list for each image.

        Returns:
            One :class:`Classification` for each image, in the order given.

        Raises:
            TypeError: if ``images`` is not a floating point tensor.
            ValueError: if images, ids or candidates have the wrong shape or values (NaN, out of range, more candidates
                than ``budget`` pays for), before the first network call; or if the network's output has the wrong
                shape, at the first.
        """
        run = self.run()
        run.add(images, ids, candidates)
        return list(run.finish())

    def run(self, watch: Callable[[Landed], None] | None = None) -> Packer:
        """For images that arrive in parts: micro-batches are then filled across the parts.

        Args:
            watch: Is shown errors as they come back; it may raise to end the run.
        """
        return Packer(self, watch)

    def predict(self, x_in: Tensor, time: Tensor, candidate: Tensor, pair: Tensor | None = None) -> Tensor:
        """The denoiser's prediction for a micro-batch, by the compiled network if there is one.

        Args:
            x_in: Inputs of the network, one for each row, or one for each (image, draw) pair.
            time: Likewise its time values.
            candidate: Candidate of each row (N,), int64.
            pair: The pair of each row (N,), int64; each row has inputs of its own if omitted.
        """
        if pair is None:
            pair = torch.arange(len(candidate), device=candidate.device)
        if self._compiled is not None:
            return self._compiled(x_in[pair], time[pair], candidate)
        return predict_rows(self.denoiser, x_in, time, pair, candidate)
