"""Two runs on the same images, compared image by image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.errors import UserError
from lightning_diffclf.results import charts, tables
from lightning_diffclf.results.columns import Chunk, Columns
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.shown import shown
from lightning_diffclf.results.statistics import Interval, mcnemar, wilson
from lightning_diffclf.results.summary import Outline, Summary


@dataclass(frozen=True)
class Comparison:
    """What the images that both runs decided say.

    Attributes:
        images: Images that both decided.
        agreement: Share that got the same class.
        labelled: Those of them with a label, the same in both.
        first: Numbers of the first run on the images that both decided; see docs/results.md.
        second: Those of the second.
        only_first: Images that only the first gets right.
        only_second: Images that only the second gets right.
        both: Images that both get right.
        neither: Images that neither gets right.
        p_value: Of McNemar's exact test: of such a difference, or a larger one, between equally accurate classifiers.
        missing: Images that only one of them decided.
        first_kept: Share of the images whose class in the second run is among the candidates that the proposal of the
            first kept: its recall of decisions, if the second decides without one. None if the first has no proposal.
        second_kept: The same of the second.
    """

    images: int
    agreement: Interval
    labelled: int
    first: dict[str, float]
    second: dict[str, float]
    only_first: int
    only_second: int
    both: int
    neither: int
    p_value: float
    missing: int
    first_kept: Interval | None = None
    second_kept: Interval | None = None

    def summary(self) -> dict[str, Any]:
        """As plain values."""
        shares = {name: value._asdict() for name, value in vars(self).items() if isinstance(value, Interval)}
        return asdict(self) | shares


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two runs on the images that both have decided.

    Raises:
        ValueError: if they share no image, or disagree about a label or about what classes there are.
    """
    if first.outline.class_names != second.outline.class_names:
        raise UserError(f"compare: {str(first.path)!r} and {str(second.path)!r} have different classes")
    ours, theirs = _answers(first), _answers(second)
    common = ours.join(theirs, how="inner", lsuffix="_first", rsuffix="_second")
    if common.empty:
        raise UserError(f"compare: {str(first.path)!r} and {str(second.path)!r} have no image in common")
    known = common[(common["label_first"] >= 0) & (common["label_second"] >= 0)]
    for image_id, row in known[known["label_first"] != known["label_second"]].iterrows():
        labels = f"{row['label_first']} in one run and {row['label_second']} in the other"
        raise UserError(f"compare: image {image_id!r} has label {labels}")
    a, b = (known[f"answer_{which}"] == known[f"label_{which}"] for which in ("first", "second"))
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    ids = list(common.index)
    summaries, kept = [], []
    for run, other in ((first, "answer_second"), (second, "answer_first")):
        summary, recall = Summary(run.outline), Kept(run.outline, common[other])
        run.show(summary, *([recall] if run.outline.proposes else []), ids=ids)
        summaries.append(summary.numbers())
        kept.append(recall.share)
    return Comparison(
        images=len(common),
        agreement=wilson(int((common["answer_first"] == common["answer_second"]).sum()), len(common)),
        labelled=len(known),
        first=summaries[0],
        second=summaries[1],
        only_first=only_first,
        only_second=only_second,
        both=int((a & b).sum()),
        neither=int((~a & ~b).sum()),
        p_value=mcnemar(only_first, only_second),
        missing=len(ours) + len(theirs) - 2 * len(common),
        first_kept=kept[0],
        second_kept=kept[1],
    )


class Kept:
    """How often the class that another run decided for is among the candidates that a run's proposal kept.

    Args:
        outline: The evaluation.
        answers: The class that the other run decided for, by id; -1 where there is none.
    """

    COLUMNS = ("id", "candidates_K", "differences_K")

    def __init__(self, outline: Outline, answers: pd.Series) -> None:
        self._outline, self._answers = outline, answers
        self._hits = self._images = 0

    def update(self, chunk: Chunk) -> None:
        """Count more images."""
        for columns in Columns.of(chunk, self.COLUMNS).pieces():
            answer_B = self._answers.loc[columns.strings("id")].to_numpy()
            tried = columns.tried(self._outline.classes, self._outline.num_classes)
            self._hits += int((tried.has(answer_B).any(1) & (answer_B >= 0)).sum())
            self._images += int((answer_B >= 0).sum())

    @property
    def share(self) -> Interval | None:
        """Of the images so far; None without any."""
        return wilson(self._hits, self._images) if self._images else None


def _answers(run: Evaluation) -> pd.DataFrame:
    """Label and answer by id; -1 where there is none."""
    frames = []
    for chunk in run.chunks(("id", "label", "prediction")):
        columns = Columns(chunk, ("id", "label", "prediction"))
        values = {"label": columns.numbers("label"), "answer": columns.numbers("prediction")}
        frames.append(pd.DataFrame(values, index=columns.strings("id")))
    return pd.concat(frames)


def to_table(found: Comparison, first: str, second: str) -> Table:
    """For the terminal."""
    table = Table("", escape(first), escape(second), title=f"{found.images} images of both runs")
    if found.missing:
        table.caption = f"{found.missing} images are in one of them only"
    table.add_row("agreement", str(found.agreement), "")
    runs = shown(found.first), shown(found.second)
    for name in dict.fromkeys([*runs[0], *runs[1]]):
        table.add_row(name, *(run.get(name, "") for run in runs))
    table.add_row("saved beside the other", _saved(found.first, found.second), _saved(found.second, found.first))
    if found.first_kept or found.second_kept:
        kept = (str(one) if one else "" for one in (found.first_kept, found.second_kept))
        table.add_row("keeps the other's decision", *kept)
    if found.labelled:
        table.add_row("right in this one only", str(found.only_first), str(found.only_second))
        table.add_row("right in both / neither", f"{found.both} / {found.neither}", "")
        table.add_row("McNemar, exact p", f"{found.p_value:.3g}", "")
    return table


def _saved(run: dict[str, float], other: dict[str, float]) -> str:
    """What a run cost less than another; nothing where it made no fewer calls."""
    calls = 1 - run["nfe_per_image"] / other["nfe_per_image"]
    if calls <= 0:
        return ""
    time = f", {1 - run['seconds'] / other['seconds']:.1%} of the time" if other["seconds"] else ""
    return f"{calls:.1%} of the calls{time}"


def save_plots(first: Evaluation, second: Evaluation, found: Comparison, folder: Path) -> None:
    """With labels, ``disagreement`` and ``cost`` of both runs as PNG and SVG in ``folder``."""
    names = _names(first, second)
    counts = {
        "right in both": found.both,
        f"only in {names[0]}": found.only_first,
        f"only in {names[1]}": found.only_second,
        "in neither": found.neither,
    }
    figures: dict[str, charts.Chart] = {}
    if found.labelled:
        frame = pd.DataFrame({"what": list(counts), "images": list(counts.values())})
        figures["disagreement"] = charts.disagreement(frame)
        both = zip(names, (first, second), strict=True)
        figures["cost"] = charts.by_cost(pd.concat([tables.costs(run.costs).assign(run=name) for name, run in both]))
    charts.save(charts.specs(figures), folder)


def _names(first: Evaluation, second: Evaluation) -> tuple[str, str]:
    """Short names that tell the runs apart."""
    a, b = first.path.resolve(), second.path.resolve()
    return (a.name, b.name) if a.name != b.name else (str(first.path), str(second.path))
