"""Two runs on the same images, compared image by image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from lightning_diffclf.errors import UserError
from lightning_diffclf.results import charts
from lightning_diffclf.results.analysis import RunAnalysis
from lightning_diffclf.results.report import save_figures
from lightning_diffclf.results.statistics import Interval, mcnemar, wilson


@dataclass(frozen=True)
class Comparison:
    """What the images that both runs decided say.

    Attributes:
        images: Images that both decided.
        agreement: Share that got the same class.
        labelled: Those of them with a label, the same in both.
        first: Accuracy of the first run on these; None without labels.
        second: Accuracy of the second.
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
        both: Images that both get right.
        neither: Images that neither gets right.
        p_value: Of McNemar's exact test: of such a difference, or a larger one, between equally accurate classifiers.
        first_nfe: Network calls for an image, on average.
        second_nfe: Network calls of the second run.
        missing: Images that only one of them decided.
    """

    images: int
    agreement: Interval
    labelled: int
    first: Interval | None
    second: Interval | None
    only_first: int
    only_second: int
    both: int
    neither: int
    p_value: float
    first_nfe: float
    second_nfe: float
    missing: int

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        return {name: value._asdict() if isinstance(value, Interval) else value for name, value in asdict(self).items()}


def compare(first: RunAnalysis, second: RunAnalysis) -> Comparison:
    """Compare two runs on the images that both have decided.

    Raises:
        ValueError: if they share no image, or disagree about a label or about what classes there are.
    """
    if first.class_names != second.class_names:
        raise UserError(f"compare: {str(first.path)!r} and {str(second.path)!r} have different classes")
    other = {row.id: row for row in second.rows}
    pairs = [(row, other[row.id]) for row in first.rows if row.id in other]
    if not pairs:
        raise UserError(f"compare: {str(first.path)!r} and {str(second.path)!r} have no image in common")
    for a, b in pairs:
        if None not in (a.label, b.label) and a.label != b.label:
            raise UserError(f"compare: image {a.id!r} has label {a.label} in one run and {b.label} in the other")
    judged = [(a, b) for a, b in pairs if a.label is not None and b.label is not None]
    outcomes = [(a.prediction == a.label, b.prediction == b.label) for a, b in judged]
    counts = {key: outcomes.count(key) for key in ((True, True), (True, False), (False, True), (False, False))}
    both, only_first, only_second = counts[True, True], counts[True, False], counts[False, True]
    return Comparison(
        images=len(pairs),
        agreement=wilson(sum(a.prediction == b.prediction for a, b in pairs), len(pairs)),
        labelled=len(judged),
        first=wilson(both + only_first, len(judged)) if judged else None,
        second=wilson(both + only_second, len(judged)) if judged else None,
        only_first=only_first,
        only_second=only_second,
        both=both,
        neither=counts[False, False],
        p_value=mcnemar(only_first, only_second),
        first_nfe=sum(a.nfe for a, _ in pairs) / len(pairs),
        second_nfe=sum(b.nfe for _, b in pairs) / len(pairs),
        missing=len(first.rows) + len(second.rows) - 2 * len(pairs),
    )


def to_table(found: Comparison, first: str, second: str) -> Table:
    """For the terminal."""
    table = Table(title=f"{found.images} images of both runs", show_header=False)
    if found.missing:
        table.caption = f"{found.missing} images are in one of them only"
    table.add_row("agreement", str(found.agreement))
    if found.first is not None:
        table.add_row(f"accuracy of {first}", str(found.first))
        table.add_row(f"accuracy of {second}", str(found.second))
        table.add_row("right in both / neither", f"{found.both} / {found.neither}")
        table.add_row(f"right only in {first}", str(found.only_first))
        table.add_row(f"right only in {second}", str(found.only_second))
        table.add_row("McNemar, exact p", f"{found.p_value:.3g}")
    table.add_row("NFE / image", f"{found.first_nfe:.1f} and {found.second_nfe:.1f}")
    return table


def save_plots(first: RunAnalysis, second: RunAnalysis, found: Comparison, folder: Path) -> None:
    """``disagreement`` and, with labels, ``cost`` and ``coverage`` of both runs as PNG and SVG in ``folder``."""
    names = _names(first, second)
    counts = {
        "right in both": found.both,
        f"only in {names[0]}": found.only_first,
        f"only in {names[1]}": found.only_second,
        "in neither": found.neither,
    }
    figures: dict[str, Any] = {}
    if found.labelled:
        frame = pd.DataFrame({"what": list(counts), "images": list(counts.values())})
        figures["disagreement"] = charts.disagreement(frame)
        both = zip(names, (first, second), strict=True)
        figures["cost"] = charts.costs(pd.concat([run.by_cost().assign(run=name) for name, run in both]))
    save_figures(figures, folder)


def _names(first: RunAnalysis, second: RunAnalysis) -> tuple[str, str]:
    """Short names that tell the runs apart."""
    a, b = first.path.resolve(), second.path.resolve()
    return (a.name, b.name) if a.name != b.name else (str(first.path), str(second.path))
