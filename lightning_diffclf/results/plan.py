"""What an evaluation will cost, measured on its own network and its own first images before it begins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf.classifier import (
    Classification,
    DiffusionClassifier,
    DiscriminativeClassifier,
    Elimination,
    Exhaustive,
)
from lightning_diffclf.classifier.discriminative import Classifier

WARM_UP = 3  # micro-batches: a compiled network is compiled in the first and recorded in the others

ESTIMATE_IMAGES = 8  # images that the elimination rule is tried on at most


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    Attributes:
        num_candidates: Candidates in play, K.
        draws: Draws that an image may spend, S.
        microbatch: Rows of a network call.
        rows_per_second: Rows (image, candidate, draw) per second, with everything that an evaluation does for them.
        flops_per_row: Floating point operations of the network for one row, as PyTorch counts them: matrix products,
            convolutions and attention; 0 if it has none of these.
        nfe_sum: Network calls that the elimination rule spent on the images that it was tried on.
        nfe_images: Number of these images; 0 if there was no time to decide one.
        search_nfe_sum: Of the network calls on them, those that a search or another proposal took.
        kept_sum: Candidates that it kept of them.
        one_call: Whether one call of a network without noise decides about an image, whatever the candidates.
    """

    num_candidates: int
    draws: int
    microbatch: int
    rows_per_second: float
    flops_per_row: float
    nfe_sum: int
    nfe_images: int
    search_nfe_sum: int = 0
    kept_sum: int = 0
    one_call: bool = field(default=False, kw_only=True)

    @property
    def exhaustive_nfe(self) -> int:
        """Network calls for an image that sees every draw under every candidate."""
        return 1 if self.one_call else self.num_candidates * self.draws


class _Enough(Exception):
    """Ends a measurement."""


class _KeepAll(Elimination):
    """Stops where ``rule`` does and sees what it sees, but drops nobody: rows cost as in the evaluation to come."""

    def __init__(self, rule: Elimination) -> None:
        self.next_stop = rule.next_stop  # type: ignore[method-assign]
        self.needs = rule.needs  # type: ignore[misc]


class _Probe(DiffusionClassifier):
    """A classifier that shares all of another, but for its rule, and looks at the clock before each network call."""

    def __init__(self, classifier: DiffusionClassifier, rule: Elimination) -> None:
        self.__dict__.update(classifier.__dict__)
        self.terms = replace(classifier.terms, rule=rule)

    def before(self, x_in: Tensor, t: Tensor, candidate: Tensor, pair: Tensor) -> None:
        """Raise _Enough to end the measurement."""
        raise NotImplementedError

    def predict(self, x_in: Tensor, time: Tensor, candidate: Tensor, pair: Tensor | None = None) -> Tensor:
        if pair is None:
            pair = torch.arange(len(candidate), device=candidate.device)
        self.before(x_in, time, candidate, pair)
        return super().predict(x_in, time, candidate, pair)


class _Speed(_Probe):
    """Times micro-batches, from the beginning of one network call to that of the next."""

    def __init__(self, classifier: DiffusionClassifier, seconds: float) -> None:
        super().__init__(classifier, _KeepAll(classifier.rule))
        self.terms = replace(self.terms, budget=None)
        self.recipe = replace(self.recipe, proposal=None)  # whose calls, between two others, are not theirs
        self.flops_per_row = 0.0
        self._seconds = seconds
        self._rows: list[int] = []
        self._starts: list[float] = []

    def before(self, x_in: Tensor, t: Tensor, candidate: Tensor, pair: Tensor) -> None:
        if not self._rows:
            with FlopCounterMode(display=False) as counter:
                # Not the compiled network, which hides its operations, nor what rows share, whose cost is not a row's.
                self.denoiser.predict(x_in[pair], t[pair], candidate)
            self.flops_per_row = counter.get_total_flops() / len(candidate)
        self._rows.append(len(candidate))
        self._starts.append(time.perf_counter())
        if len(self._rows) >= WARM_UP + 3 and self._starts[-1] - self._starts[WARM_UP] >= self._seconds:
            raise _Enough

    @property
    def rows_per_second(self) -> float:
        return sum(self._rows[WARM_UP:-1]) / (self._starts[-1] - self._starts[WARM_UP])


class _Deadline(_Probe):
    def __init__(self, classifier: DiffusionClassifier, seconds: float) -> None:
        super().__init__(classifier, classifier.rule)
        self._end = time.perf_counter() + seconds

    def before(self, x_in: Tensor, t: Tensor, candidate: Tensor, pair: Tensor) -> None:
        if time.perf_counter() > self._end:
            raise _Enough


def measure(
    classifier: DiffusionClassifier,
    images: Tensor,
    ids: Sequence[int | str],
    candidates: Sequence[int] | None = None,
    seconds: float = 2.0,
    rule_seconds: float = 20.0,
) -> Measurement:
    """Measure what ``classifier`` costs. The caller chooses device and precision as for the classifier itself.

    Args:
        classifier: The classifier of the evaluation.
        images: The first images (B, C, H, W), at least one, as the classifier takes them.
        ids: Their ids.
        candidates: Indices of the candidates in play; all if omitted.
        seconds: Network calls are timed for so long, but two at least, after three to warm up.
        rule_seconds: The elimination rule is tried on the first images, eight at most, for so long.

    Raises:
        ValueError, TypeError: as the classifier would for these images.
    """
    speed = _Speed(classifier, seconds)
    run = speed.run()
    try:
        for turn in count():  # the same images again, under other ids, until micro-batches are full
            run.add(images, [f"{turn}/{i}" for i in ids], candidates)
            for _ in run.work():
                pass
    except _Enough:
        pass
    num_candidates, draws = len(candidates or classifier.denoiser.candidates), len(classifier.timesteps_S)
    spent = [(num_candidates * draws, 0, num_candidates)]
    if not spends_the_same(classifier):
        tried = _tried(classifier, images, ids, candidates, rule_seconds)
        spent = [(one.nfe, one.search_nfe, len(one.candidates_K)) for one in tried]
    return Measurement(
        num_candidates=num_candidates,
        draws=draws,
        microbatch=classifier.microbatch,
        rows_per_second=speed.rows_per_second,
        flops_per_row=speed.flops_per_row,
        nfe_sum=sum(nfe for nfe, _, _ in spent),
        nfe_images=len(spent),
        search_nfe_sum=sum(search for _, search, _ in spent),
        kept_sum=sum(kept for _, _, kept in spent),
    )


def measure_logits(classifier: DiscriminativeClassifier, images: Tensor, seconds: float = 2.0) -> Measurement:
    """As :func:`measure`, of a network that gives all logits at once."""
    rows = images[torch.arange(classifier.microbatch, device=images.device) % len(images)]
    with FlopCounterMode(display=False) as counter:
        classifier(rows)
    for _ in range(WARM_UP):
        classifier(rows)
    start, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - start < seconds:
        classifier(rows)
        calls += 1
    return Measurement(
        num_candidates=len(classifier.recipe.candidates or classifier.candidates),
        draws=1,
        microbatch=classifier.microbatch,
        rows_per_second=calls * len(rows) / (time.perf_counter() - start),
        flops_per_row=counter.get_total_flops() / len(rows),
        nfe_sum=1,
        nfe_images=1,
        one_call=True,
    )


def spends_the_same(classifier: Classifier) -> bool:
    """Whether every image costs the same, every draw of every candidate, so that nothing needs to be tried."""
    recipe = classifier.recipe
    return type(classifier.rule) is Exhaustive and recipe.budget is None and recipe.proposal is None


def _tried(
    classifier: DiffusionClassifier,
    images: Tensor,
    ids: Sequence[int | str],
    candidates: Sequence[int] | None,
    seconds: float,
) -> list[Classification]:
    """Decisions on the first images, as many as there is time for."""
    probe = _Deadline(classifier, seconds)
    results: list[Classification] = []
    try:
        # One after the other: those that take longest would be missing from a batch that is cut short.
        for i in range(min(len(images), ESTIMATE_IMAGES)):
            results += probe(images[i : i + 1], ids[i : i + 1], candidates)
    except _Enough:
        pass
    return results


@dataclass(frozen=True)
class Plan:
    """The cost of an evaluation.

    Attributes:
        ranks: What each process measured.
        images: Images that each process has to classify; None where unknown.
        rule: The elimination rule, as ``repr`` has it.
        exact: Whether the rule spends the same on every image, so that nothing is estimated.
        proposal: What names the candidates of each image, as ``repr`` has it; None if all are tried.
        fitting: Network calls that fitting it takes beforehand, at most.
    """

    ranks: list[Measurement]
    images: list[int | None]
    rule: str
    exact: bool
    proposal: str | None = None
    fitting: int = 0

    @property
    def total_images(self) -> int | None:
        """Images of all processes."""
        known = [images for images in self.images if images is not None]
        return sum(known) if len(known) == len(self.images) else None

    @property
    def tried(self) -> int:
        """Images that estimates are made from."""
        return sum(m.nfe_images for m in self.ranks)

    @property
    def nfe(self) -> float | None:
        """Estimated network calls for an image under the rule; None if no image could be decided in time."""
        return sum(m.nfe_sum for m in self.ranks) / self.tried if self.tried else None

    def hours(self, nfe: float) -> float | None:
        """Duration at ``nfe`` network calls for an image, by the process that needs longest; None if unknown."""
        if self.total_images is None:
            return None
        loads = zip(self.images, self.ranks, strict=True)
        return max((images or 0) * nfe / m.rows_per_second for images, m in loads) / 3600

    def numbers(self) -> dict[str, Any]:
        """What it comes to, as plain values: of all images, ``nfe`` and ``hours``; None where their number is unknown.

        Without an estimate, because no image could be decided in time, ``nfe_per_image`` is that of all draws of all
        candidates.
        """
        first, total = self.ranks[0], self.total_images
        per_image = float(first.exhaustive_nfe) if self.nfe is None else self.nfe
        return {
            "images": total,
            "candidates": first.num_candidates,
            "draws": first.draws,
            "nfe_per_image": per_image,
            "nfe": None if total is None else total * per_image,
            "hours": self.hours(per_image),
            "rows_per_second": sum(m.rows_per_second for m in self.ranks),
            "flops_per_row": max(m.flops_per_row for m in self.ranks),
            "exact": self.exact,
            "tried": self.tried,
        }

    def to_table(self) -> Table:
        """For the terminal."""
        table, first = Table(title="plan of the evaluation", show_header=False), self.ranks[0]
        flops = max(m.flops_per_row for m in self.ranks)
        everything = "without elimination" if self.proposal is None else "without elimination and proposal"
        costs = [(everything, float(first.exhaustive_nfe))]
        if not self.exact and self.nfe is not None:
            costs.append(("estimate", self.nfe))

        def row(name: str, value: Any) -> None:
            table.add_row(name, escape(str(value)))

        row("images", "unknown" if self.total_images is None else self.total_images)
        row("candidates", first.num_candidates)
        row("draws", first.draws)
        row("elimination", self.rule)
        if self.proposal is not None:
            row("proposal", self.proposal)
        for name, nfe in costs:
            row(f"NFE/image, {name}", f"{nfe:.6g}")
        if self.proposal is not None and self.nfe is not None:
            search = sum(m.search_nfe_sum for m in self.ranks) / self.tried
            kept = sum(m.kept_sum for m in self.ranks) / self.tried
            row("NFE/image, of the proposal", f"{search:.4g}")
            row("NFE/image, of the contest", f"{self.nfe - search:.4g}, of {kept:.4g} candidates kept")
        if not self.exact:
            tried = f"{self.tried} images" if self.tried else "none: the first image takes longer than the plan"
            row("estimated from", tried)
        if self.fitting:
            row("fitting the proposal, once", f"at most {self.fitting:,} network calls")
        row("micro-batch", f"{first.microbatch} rows")
        row("rows per second", f"{sum(m.rows_per_second for m in self.ranks):.4g} on {len(self.ranks)} ranks")
        row("FLOPs per row", f"{flops:.4g}" if flops else "not counted: no matrix product, convolution or attention")
        for name, nfe in costs:
            hours, total = self.hours(nfe), self.total_images
            if total is not None and flops:
                row(f"FLOPs in total, {name}", f"{total * nfe * flops:.4g}")
            if hours is not None:
                row(f"hours, {name}", f"{hours:.3g}" if hours >= 0.1 else f"{hours:.2g} ({hours * 3600:.3g} s)")
        return table
