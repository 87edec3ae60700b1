"""What decides results, said once: the engine, the callback and the command line all take a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_diffclf.classifier.conformal import check_coverage
from lightning_diffclf.classifier.draws import Draws
from lightning_diffclf.classifier.elimination import Elimination
from lightning_diffclf.classifier.posterior import Posterior
from lightning_diffclf.classifier.score import Loss
from lightning_diffclf.classifier.search import Search
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.identity import identity_of

Proposal = Search | Callable[[Tensor], Any]
"""A search, or a function of images (B, C, H, W) to the candidates to try: indices (B, m), or a list for each image.

A function may have an attribute ``nfe``: the network calls that it costs for each image, counted as spent.
"""


@dataclass(frozen=True)
class Recipe:
    """How a denoiser classifies.

    Args:
        draws: (t, noise) pairs for each image at most; 250, or what the elimination rule spends, if omitted. In Python
            also :class:`~.draws.Draws`, with a seed of its own.
        seed: Key of the noise.
        grid: Timesteps of the even grid that draws are the first of, in nested order; as many as draws if omitted. Runs
            on one grid (1000, say) can be extended: more draws begin with those of fewer.
        antithetic: Take draws in pairs with opposite noise at one timestep; see :class:`~.draws.Draws`.
        loss: Error terms: ``l2``, ``l1``, ``huber``, ``kl``, ``nll``, or several joined by ``+``.
        elimination: Rule that drops candidates early; none if omitted.
        weights: What the draws weigh in the score: ``uniform``, ``sample``, ``velocity``, ``clark_jaini``, or a number
            for each draw from the cleanest to the noisiest; see :func:`~.score.timestep_weights`.
        budget: Network calls for one image at most. An image that has spent them is decided by the draws so far.
        abstain: Margin in nats below which an answer counts as not given.
        ensemble: What counts where a class has several candidates (prompts): its ``best`` one, or the ``mean`` of their
            errors; its candidates then stay or go together.
        candidates: Indices of the candidates in play; all if omitted.
        proposal: Names the candidates to try for each image: :class:`~.search.GradientSearch`,
            :class:`~.covariance_search.CovarianceSearch`, :class:`~.linear_probe.LinearProbe`, in Python also
            :class:`~.cascade.Cascade`, or, where nothing else does, any callable from images (B, C, H, W) to indices
            (B, m).
        reduction: ``mean`` or ``sum``: how probabilities are read off scores; see :class:`~.posterior.Posterior`.
        temperature: Temperature of the probabilities.
        coverage: Share of images whose conformal set of classes shall contain the right one, above 0 and below 1; no
            sets if omitted. See :class:`~.conformal.Conformal`.
        coverage_by_class: Whether that shall hold for the images of each class, not only for all together.

    Raises:
        ValueError: if a value is out of range.
    """

    draws: int | Draws | None = None
    seed: int = 0
    loss: str = "l2"
    elimination: Elimination | None = None
    weights: str | list[float] = "uniform"
    budget: int | None = None
    abstain: float = 0.0
    ensemble: Literal["best", "mean"] = "best"
    candidates: list[int] | None = None
    proposal: Proposal | None = None
    reduction: Literal["mean", "sum"] = "sum"
    temperature: float = 1.0
    coverage: float | None = None
    coverage_by_class: bool = False
    grid: int | None = None
    antithetic: bool = False

    CANNOT_CHANGE_DECISIONS: ClassVar[dict[str, str]] = {
        "reduction": "probabilities are made of stored differences whenever they are read",
        "temperature": "likewise",
        "coverage": "likewise, sets",
        "coverage_by_class": "likewise",
    }

    def __post_init__(self) -> None:
        if isinstance(self.draws, int):
            Draws(self.draws, antithetic=self.antithetic)
        elif self.draws is not None and self.seed not in (0, self.draws.seed):
            raise UserError(f"seed: {self.seed}, but draws have the seed {self.draws.seed}; expected one of them")
        elif self.draws is not None and self.antithetic and not self.draws.antithetic:
            raise UserError("antithetic: true, but draws are given that are not; expected one of them")
        elif self.draws is not None and self.grid not in (None, self.draws.grid):
            raise UserError(f"grid: {self.grid}, but draws have the grid {self.draws.grid}; expected one of them")
        Loss(self.loss)
        check_at_least(1, grid=self.grid, budget=self.budget)
        if not self.abstain >= 0:
            raise UserError(f"abstain: {self.abstain}, expected a margin in nats, 0 or more")
        if self.ensemble not in ("best", "mean"):
            raise UserError(f"ensemble: {self.ensemble!r}, expected 'best' or 'mean'")
        if self.candidates is not None and len(self.candidates) == 0:
            raise UserError("candidates: an empty list, expected at least one index, or null for all")
        Posterior(self.reduction, self.temperature)
        if self.coverage is not None:
            check_coverage(self.coverage)
        elif self.coverage_by_class:
            raise UserError("coverage_by_class: given without a coverage, expected one, such as 0.9")

    @property
    def posterior(self) -> Posterior:
        """Turns differences of scores into probabilities."""
        return Posterior(self.reduction, self.temperature)

    def resolved(self, draws: Draws, rule: Elimination) -> Recipe:
        """With what a classifier uses where it leaves things open: so that a default is what it stands for."""
        fixed = draws.timesteps is not None or draws.noise is not None
        given = draws if fixed else draws.count
        return replace(
            self, draws=given, seed=draws.seed, elimination=rule, grid=draws.grid, antithetic=draws.antithetic
        )

    def identity(self) -> dict[str, Any]:
        """What decisions depend on."""
        names = [field.name for field in fields(self) if field.name not in self.CANNOT_CHANGE_DECISIONS]
        for name in ("grid", "antithetic"):
            if not getattr(self, name):  # as in runs of earlier versions, which can go on
                names.remove(name)
        found = {name: identity_of(getattr(self, name)) for name in names}
        if self.antithetic and self.grid is None:
            found["antithetic"] = "middle first"  # earlier versions, which wrote true, visited them in nested order
        return found
