"""Two runs on the same images, compared image by image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.errors import UserError
from lightning_diffclf.results import tables
from lightning_diffclf.results.columns import Chunk, Columns
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.groups import Grouped
from lightning_diffclf.results.shown import shown
from lightning_diffclf.results.statistics import Clusters, Interval, mcnemar, paired_difference, wilson
from lightning_diffclf.results.summary import Outline, Summary

ANSWERS = ("label", "prediction", "group")  # what is wanted first of both runs: best read with ``kept`` of these


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
        difference: Accuracy of the first less that of the second, with a 95 % interval: Bonett and Price's, or where
            images come in groups, by Student's t.
        p_value: Of such a difference, or a larger one, between equally accurate classifiers: by McNemar's exact test;
            where images come in groups, by a t-test with a cluster-robust standard error.
        missing: Images that only one of them decided.
        groups: Groups that the labelled images are of; None where the data do not say.
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
    difference: Interval | None
    p_value: float
    missing: int
    groups: int | None = None
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
    ours, theirs = answers(first), answers(second)
    common = ours.join(theirs, how="inner", lsuffix="_first", rsuffix="_second")
    if common.empty:
        raise UserError(f"compare: {str(first.path)!r} and {str(second.path)!r} have no image in common")
    known = common[(common["label_first"] >= 0) & (common["label_second"] >= 0)]
    for image_id, row in known[known["label_first"] != known["label_second"]].iterrows():
        labels = f"{row['label_first']} in one run and {row['label_second']} in the other"
        raise UserError(f"compare: image {image_id!r} has label {labels}")
    a, b = (known[f"answer_{which}"] == known[f"label_{which}"] for which in ("first", "second"))
    paired = Paired.of(a.to_numpy(), b.to_numpy(), known["group_first"])
    ids = list(common.index)
    summaries, kept = [], []
    for run, other in ((first, "answer_second"), (second, "answer_first")):
        summary, grouped, recall = Summary(run.outline), Grouped(), Kept(run.outline, common[other])
        run.show(summary, grouped, *([recall] if run.outline.proposes else []), ids=ids)
        summaries.append(summary.numbers() | grouped.numbers())
        kept.append(recall.share)
    return Comparison(
        images=len(common),
        agreement=wilson(int((common["answer_first"] == common["answer_second"]).sum()), len(common)),
        labelled=len(known),
        first=summaries[0],
        second=summaries[1],
        only_first=int((a & ~b).sum()),
        only_second=int((b & ~a).sum()),
        both=int((a & b).sum()),
        neither=int((~a & ~b).sum()),
        difference=paired.difference if len(known) else None,
        p_value=paired.p_value,
        missing=len(ours) + len(theirs) - 2 * len(common),
        groups=paired.groups,
        first_kept=kept[0],
        second_kept=kept[1],
    )


class Paired(NamedTuple):
    """Two classifiers on the same labelled images.

    Attributes:
        difference: Accuracy of the first less that of the second, with its interval.
        p_value: That they are equally accurate: McNemar's, or by groups.
        groups: Number of groups; None where the data do not say.
    """

    difference: Interval
    p_value: float
    groups: int | None

    @classmethod
    def of(cls, first_B: np.ndarray, second_B: np.ndarray, group_B: pd.Series) -> Paired:
        """Of what each got right (B,), bool, and the group of each image; None or NaN where it has none."""
        if not len(first_B):
            return cls(Interval(np.nan, -np.inf, np.inf), 1.0, None)
        gain_B = first_B.astype(np.float64) - second_B
        if group_B.isna().all():
            only = int((first_B & ~second_B).sum()), int((second_B & ~first_B).sum())
            return cls(paired_difference(*only, len(gain_B)), mcnemar(*only), None)
        alone = group_B.isna().to_numpy()
        named = [(i,) if single else group for i, (single, group) in enumerate(zip(alone, group_B, strict=True))]
        clusters = Clusters.of(gain_B, named)
        return cls(clusters.interval(), clusters.p_value, len(clusters.sums_G))


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


def answers(run: Evaluation) -> pd.DataFrame:
    """Label and answer by id, -1 where there is none; and the group, None where there is none."""
    frames, names = [], ("id", *ANSWERS)
    for chunk in run.chunks(names):
        columns = Columns(chunk, names)
        values = {"label": columns.numbers("label"), "answer": columns.numbers("prediction")}
        values["group"] = np.array(columns.strings("group"), dtype=object)
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
        if found.difference is not None:
            gap = found.difference
            table.add_row("difference", f"{gap.value:+.2%} ({gap.low:+.2%} – {gap.high:+.2%})", "")
        test = "McNemar, exact p" if found.groups is None else f"p, by {found.groups:,} groups"
        table.add_row(test, f"{found.p_value:.3g}", "")
    return table


def _saved(run: dict[str, float], other: dict[str, float]) -> str:
    """What a run cost less than another; nothing where it made no fewer calls."""
    if run["nfe_per_image"] >= other["nfe_per_image"]:
        return ""
    calls = 1 - run["nfe_per_image"] / other["nfe_per_image"]
    time = f", {1 - run['seconds'] / other['seconds']:.1%} of the time" if other["seconds"] else ""
    return f"{calls:.1%} of the calls{time}"


def save_plots(first: Evaluation, second: Evaluation, found: Comparison, folder: Path) -> None:
    """With labels, ``disagreement`` and ``cost`` of both runs as PNG and SVG in ``folder``."""
    from lightning_diffclf.results import charts, charts_of_runs  # slow to import, and not all comparisons are drawn

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
        figures["disagreement"] = charts_of_runs.disagreement(frame)
        both = zip(names, (first, second), strict=True)
        figures["cost"] = charts.by_cost(pd.concat([tables.costs(run.costs).assign(run=name) for name, run in both]))
    charts.save(charts.specs(figures), folder)


def _names(first: Evaluation, second: Evaluation) -> tuple[str, str]:
    """Short names that tell the runs apart."""
    a, b = first.path.resolve(), second.path.resolve()
    return (a.name, b.name) if a.name != b.name else (str(first.path), str(second.path))
