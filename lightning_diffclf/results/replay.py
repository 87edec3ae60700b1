"""Other elimination rules and timestep weights on stored errors, without the network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.classifier import (
    Classification,
    Elimination,
    Exhaustive,
    LikelihoodRatio,
    PairedTest,
    Posterior,
    Stages,
)
from lightning_diffclf.classifier.contest import Contest, Terms, judge
from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.classifier.known import distances_between, pair_of
from lightning_diffclf.classifier.score import timestep_weights
from lightning_diffclf.classifier.sequential import inflation_of
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.results.errors import ErrorsInfo, StoredErrors, StoredImage


@dataclass(frozen=True)
class Replay:
    """What a rule would have decided, and what it would have cost.

    Attributes:
        rule: The rule.
        weights: The timestep weights.
        budget: Network calls for one image at most; None for no limit.
        results: The decision on each image, as the classifier would have given it.
        labels: Class of each image; None where unknown.
        exhaustive: Class that all draws decide for under the same weights, for each image; None where all errors are
            NaN or infinite.
        exhaustive_nfe: Network calls of all images without a rule.
    """

    rule: Elimination
    weights: str | Sequence[float]
    budget: int | None
    results: list[Classification]
    labels: list[int | None]
    exhaustive: list[int | None]
    exhaustive_nfe: int

    @property
    def accuracy(self) -> float | None:
        """Share of the images with a label that get it; None if there are none."""
        right = [r.prediction == label for r, label in zip(self.results, self.labels, strict=True) if label is not None]
        return sum(right) / len(right) if right else None

    @property
    def agreement(self) -> float:
        """Share of the images that get the class that all draws decide for."""
        return sum(r.prediction == e for r, e in zip(self.results, self.exhaustive, strict=True)) / len(self.results)

    @property
    def nfe_per_image(self) -> float:
        """Network calls for an image, on average."""
        return sum(r.nfe for r in self.results) / len(self.results)

    @property
    def factor(self) -> float:
        """How many times fewer network calls than without a rule."""
        return self.exhaustive_nfe / sum(r.nfe for r in self.results)

    def summary(self) -> dict[str, str | float | int | list[float] | None]:
        """The numbers above, by name."""
        return {
            "elimination": repr(self.rule),
            "weights": self.weights if isinstance(self.weights, str) else list(self.weights),
            "budget": self.budget,
            "images": len(self.results),
            "labelled": sum(label is not None for label in self.labels),
            "accuracy": self.accuracy,
            "agreement": self.agreement,
            "nfe_per_image": self.nfe_per_image,
            "factor": self.factor,
        }


def replay(
    errors: StoredErrors,
    rule: Elimination | None = None,
    weights: str | Sequence[float] | None = None,
    budget: int | None = None,
    ensemble: str | None = None,
) -> Replay:
    """Decide on stored errors as the classifier would have under another rule, other weights or another budget.

    The stored (timestep, noise) pairs are visited in the order of the rule. A run of :class:`Stages` with the same seed
    would pair the noise with other timesteps, since its order is another: its decisions can differ from the replayed
    ones as those of another seed would. Rules without an order of their own see exactly what they would see in a run.

    Args:
        errors: Errors of a run that dropped no candidate.
        rule: The rule; none if omitted.
        weights: Timestep weights, as in :func:`~lightning_diffclf.classifier.score.timestep_weights`; those of the run
            if omitted.
        budget: Network calls for one image at most; no limit if omitted.
        ensemble: ``best`` or ``mean``, as in :class:`~lightning_diffclf.classifier.Recipe`; that of the run if omitted.

    Returns:
        Decisions in the order of the file, and their cost.

    Raises:
        ValueError: if the file holds no image, its run dropped candidates, the rule needs another number of draws than
            are stored or distances that are not, it does not fit the loss, ``weights`` are wrong, or ``budget`` does
            not pay for one call of each candidate.
    """
    rule, info = rule or Exhaustive(), errors.info
    ensemble = info.ensemble if ensemble is None else ensemble
    if ensemble not in ("best", "mean"):
        raise UserError(f"ensemble: {ensemble!r}, expected 'best' or 'mean'")
    weights = info.weights if weights is None else weights
    if len(errors) == 0:
        raise UserError(f"errors: {str(errors.path)!r} holds no image")
    check_at_least(1, budget=budget)
    rule.check(info.loss)
    if rule.needs == "distances" and not errors.has_distances:
        raise UserError(
            f"{type(rule).__name__}: needs distances between candidates, which {str(errors.path)!r} does not hold; "
            "evaluate with `--keep-errors distances`"
        )
    order_S = visiting_order(info, rule)
    log_snr_S = np.array(info.log_snr_S)[order_S]
    weights_S = timestep_weights(weights, torch.from_numpy(log_snr_S)).numpy()
    terms = Terms(rule, info.loss, log_snr_S, weights_S, budget)
    every_draw = Terms(Exhaustive(), info.loss, log_snr_S, weights_S)
    reference, calls = [], 0
    results, labels = [], []
    for image in errors.images(distances=rule.needs == "distances"):
        _check(image, info)
        ordered = replace(
            image,
            errors_SK=image.errors_SK[order_S],
            distances_SP=None if image.distances_SP is None else image.distances_SP[order_S],
        )
        results.append(decide(ordered, terms, ensemble, info))
        labels.append(image.label)
        reference.append(decide(ordered, every_draw, ensemble, info).prediction)
        calls += image.nfe
    return Replay(rule, weights, budget, results, labels, reference, calls)


def measure_inflation(errors: StoredErrors) -> float:
    """How much more errors' differences vary than :class:`LikelihoodRatio` assumes: its ``inflation``, without labels.

    The mean over images of what :func:`~lightning_diffclf.classifier.sequential.inflation_of` finds, 1 if residuals
    are as assumed. Measure it once, on images of the same kind, and keep it: results then depend on nothing else.

    Raises:
        ValueError: if the file has no distances, fewer than two draws or candidates, or its run dropped candidates.
    """
    info = errors.info
    if not errors.has_distances or info.draws < 2 or len(info.names) < 2:
        raise UserError(
            f"inflation: needs distances, two draws and two candidates; {str(errors.path)!r} has "
            f"{'' if errors.has_distances else 'no '}distances, {info.draws} draws, {len(info.names)} candidates"
        )
    found = []
    for image in errors.images():
        _check(image, info)
        assert info.dims is not None
        assert image.distances_SP is not None
        every = np.arange(len(image.candidates_K))
        distances_SKK = distances_between(image.distances_SP, pair_of(len(every)), every)
        found.append(inflation_of(info.loss, info.dims, image.errors_SK, distances_SKK))
    return float(np.mean(found))


def visiting_order(info: ErrorsInfo, rule: Elimination) -> np.ndarray:
    """Positions of the stored draws in the order in which ``rule`` visits them (S,), int64.

    Raises:
        ValueError: if the rule visits another number of draws than are stored, or in an order of its own pairs of them.
    """
    if info.antithetic:
        if rule.order(info.draws) is not None:
            raise UserError(f"{type(rule).__name__}: has grids of its own, but the draws stored are antithetic pairs")
        return np.arange(info.draws)
    # The grid goes from clean to noisy, which for some schedules is from large to small timesteps.
    grid_S = np.lexsort((np.array(info.timesteps_S), -np.array(info.log_snr_S)))
    order = rule.order(info.draws)
    if order is None:
        return grid_S[nested_order(info.draws).numpy()]
    if sorted(order) != list(range(info.draws)):
        raise UserError(
            f"{type(rule).__name__}: spends {len(order)} draws, but {info.draws} are stored; their timesteps are those "
            f"of a grid of {info.draws}"
        )
    return grid_S[np.asarray(order)]


def _check(image: StoredImage, info: ErrorsInfo) -> None:
    unseen = int((image.draws_K < info.draws).sum())
    if unseen:
        limit = "" if info.budget is None else f", with a budget of {info.budget}"
        raise UserError(
            f"image {image.image_id!r}: {unseen} of {len(image.draws_K)} candidates did not see all {info.draws} "
            f"draws: the run eliminated candidates ({info.elimination}{limit}); keep errors of an Exhaustive run"
        )


def decide(image: StoredImage, terms: Terms, ensemble: str, info: ErrorsInfo) -> Classification:
    """The decision on one image, as the classifier makes it.

    Args:
        image: Its errors, draws in the order in which the rule visits them.
        terms: Rule, loss, weights and budget, in the same order.
        ensemble: ``best`` or ``mean``.
        info: What the errors of the file have in common.

    Raises:
        ValueError: if the budget does not pay for one call of each candidate.
    """
    num_candidates, spent = len(image.candidates_K), image.nfe - int(image.draws_K.sum())  # before the first draw
    assert info.dims is not None  # known since the first image
    terms.check_budget(image.image_id, num_candidates, spent)
    class_K = np.array(info.classes)[image.candidates_K] if ensemble == "mean" else None
    contest = Contest(terms, num_candidates, class_K, spent)
    pair_KK = pair_of(num_candidates) if terms.rule.needs == "distances" else None
    while not contest.decided:
        draws, distances_RPP = slice(contest.done, contest.stop), None
        if pair_KK is not None and image.distances_SP is not None:
            distances_RPP = distances_between(image.distances_SP[draws], pair_KK, contest.playing)
        contest.land(image.errors_SK[draws, contest.playing], distances_RPP)
        judge([contest], info.dims)
    timesteps_S = torch.tensor(info.timesteps_S)
    return Classification.of(
        contest, image.image_id, image.candidates_K, info.candidates, 0.0, info.dims, timesteps_S, Posterior()
    )


def usual_rules(errors: StoredErrors) -> Iterator[Elimination]:
    """Rules to compare on ``errors``: those that its draws, candidates, loss and distances allow."""
    yield Exhaustive()
    draws, num_candidates = errors.info.draws, len(next(errors.images(distances=False)).candidates_K)
    if draws > 1:
        keep = 5 if num_candidates >= 10 else (num_candidates + 1) // 2
        yield Stages(samples=(max(1, draws // 10), draws), keep=(keep, 1))
    for alpha in (0.05, 0.01, 0.001):
        yield PairedTest(alpha)
    if errors.has_distances and errors.info.loss in LikelihoodRatio.losses:
        for alpha in (0.05, 0.01, 0.001):
            yield LikelihoodRatio(alpha)


def to_table(replays: Sequence[Replay], info: ErrorsInfo) -> Table:
    """A table of what rules decide and cost, for the terminal."""
    table = Table(title=f"{len(replays[0].results)} images, {info.draws} draws, {escape(info.loss)}")
    table.add_column("rule")
    for name in ("accuracy", "as exhaustive", "NFE/image", "fewer"):
        table.add_column(name, justify="right")
    for one in replays:
        accuracy = "unknown" if one.accuracy is None else f"{one.accuracy:.2%}"
        cost = f"{one.nfe_per_image:.1f}", f"{one.factor:.2f} x"
        table.add_row(escape(repr(one.rule)), accuracy, f"{one.agreement:.2%}", *cost)
    if any(0 < sum(label is None for label in one.labels) < len(one.labels) for one in replays):
        table.caption = "accuracy: of the images with a label"
    return table
