"""Runs on the same images, the best first: one page as HTML, Markdown and CSV."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_text
from lightning_diffclf.results import charts, charts_of_runs, headline
from lightning_diffclf.results.compare import Paired, answers
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.page import templates
from lightning_diffclf.results.settings import differences
from lightning_diffclf.results.statistics import Interval, holm

PREPARATION = ("size", "preparation", "crop")  # how a network wants the same images: no other data

KINDS = ("html", "md", "csv")


@dataclass(frozen=True)
class Standing:
    """A run among others.

    Attributes:
        rank: 1 for the best. Runs that are equally right share one.
        run: Its name.
        folder: Where it is.
        accuracy: Share of its labelled images decided rightly, with its interval.
        images: Its labelled images.
        groups: Groups of these; None where the data do not say.
        nfe_per_image: Network calls for an image; those that an earlier run had made count as well.
        seconds: What its images took.
        behind: Accuracy less that of the best, with a paired interval; None for the best, and of other images.
        p_value: That it is as accurate as the best, adjusted for all runs of the board (Holm); None likewise.
    """

    rank: int
    run: str
    folder: str
    accuracy: Interval
    images: int
    groups: int | None
    nfe_per_image: float
    seconds: float
    behind: Interval | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Board:
    """Runs on the same data, the best first.

    Attributes:
        title: What the data are called.
        standings: The runs.
    """

    title: str
    standings: list[Standing]


def board(runs: Mapping[str, Evaluation], title: str = "") -> Board:
    """Runs by accuracy, then by network calls; each is compared with the best where they decided the same images.

    Args:
        runs: By name, at least one.
        title: What the data are called; as their settings say, if omitted.

    Raises:
        UserError: if runs disagree about data (settings, classes, or labels of images), or one has no labels.
    """
    names = list(runs)
    first = runs[names[0]]
    for name in names[1:]:
        _check_same_data(names[0], first, name, runs[name])
    found = [_standing(name, run) for name, run in runs.items()]
    found.sort(key=lambda one: (-one.accuracy.value, one.nfe_per_image, one.run))
    best = answers(runs[found[0].run])
    paired = {one.run: _against(best, answers(runs[one.run])) for one in found[1:]}
    compared = {name: one for name, one in paired.items() if one is not None}
    adjusted = dict(zip(compared, holm([one.p_value for one in compared.values()]), strict=True))
    shares = [one.accuracy.value for one in found]
    standings = [
        Standing(
            **vars(one)
            | {"rank": 1 + shares.index(one.accuracy.value)}
            | ({"behind": compared[one.run].difference, "p_value": adjusted[one.run]} if one.run in compared else {})
        )
        for one in found
    ]
    data = headline.names(first.settings.identity)[1]
    return Board(title or data or "one data set", standings)


def _standing(name: str, run: Evaluation) -> Standing:
    numbers = run.numbers
    if run.accuracy is None:
        raise UserError(f"leaderboard: {str(run.path)!r} has no labels, expected an evaluation of labelled images")
    calls = numbers["nfe_per_image"] + numbers.get("reused_per_image", 0)
    groups = numbers.get("groups")
    return Standing(
        0,
        name,
        str(run.path),
        run.accuracy,
        run.summary.labelled,
        None if groups is None else int(groups),
        calls,
        numbers["seconds"],
    )


def _check_same_data(name: str, run: Evaluation, other_name: str, other: Evaluation) -> None:
    """Raise UserError unless two runs are of the same images, which they may have wanted prepared in other ways."""
    different = list(differences(_data(other), _data(run)))
    if run.outline.class_names != other.outline.class_names:
        different.append(f"classes: {_few(other.outline.class_names)} there, {_few(run.outline.class_names)} here")
    if different:
        raise UserError(
            f"leaderboard: {other_name!r} and {name!r} are not of the same data ({'; '.join(different)}); expected one "
            "leaderboard for each data set"
        )


def _data(run: Evaluation) -> dict[str, Any]:
    identity = run.settings.identity
    data = identity.get("data")
    kept = {n: v for n, v in data.items() if n not in PREPARATION} if isinstance(data, dict) else data
    return {"data": kept, "corruption": identity.get("corruption")}


def _few(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _against(best: pd.DataFrame, run: pd.DataFrame) -> Paired | None:
    """A run less the best one, on the same labelled images; None where these are others.

    Raises:
        UserError: if they disagree about a label.
    """
    best, run = best[best["label"] >= 0], run[run["label"] >= 0]
    common = best.join(run, how="inner", lsuffix="_best", rsuffix="_run")
    for image_id, row in common[common["label_best"] != common["label_run"]].head(1).iterrows():
        raise UserError(
            f"leaderboard: image {image_id!r} has label {row['label_best']} in one run, {row['label_run']} in another"
        )
    if len(common) != len(best) or len(common) != len(run):
        return None
    right, right_best = (common[f"answer_{which}"] == common[f"label_{which}"] for which in ("run", "best"))
    return Paired.of(right.to_numpy(), right_best.to_numpy(), common["group_best"])


def names_of(folders: Sequence[str]) -> list[str]:
    """Names for folders: what is left of their paths without what all begin and end with.

    Example:
        >>> names_of(["runs/a/b/evaluation", "runs/c/b/evaluation"])
        ['a', 'c']
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    same = [len(set(level)) == 1 for level in zip(*parts, strict=False)]
    head = same.index(False) if False in same else len(same)
    back = [len(set(level)) == 1 for level in zip(*(one[head:][::-1] for one in parts), strict=False)]
    tail = back.index(False) if False in back else len(back)
    return ["/".join(one[head : len(one) - tail]) or one[-1] for one in parts]


# --- pages -----------------------------------------------------------------------------------------------------------

COLUMNS = ("", "run", "accuracy", "95 % interval", "NFE / image", "seconds", "images", "behind the best", "p")


def write_leaderboard(boards: Sequence[Board], out: Path) -> list[Path]:
    """Write ``leaderboard.html``, ``.md`` and ``.csv`` to a folder; returns the files."""
    texts = {"html": to_html(boards), "md": to_markdown(boards), "csv": to_frame(boards).to_csv(index=False)}
    paths = [out / f"leaderboard.{kind}" for kind in KINDS]
    for path, kind in zip(paths, KINDS, strict=True):
        write_text(texts[kind], path, "leaderboard")
    return paths


def cells(one: Standing) -> list[str]:
    """What is shown of a run, in the order of :data:`COLUMNS`."""
    images = f"{one.images:,}" if one.groups is None else f"{one.images:,} in {one.groups:,} groups"
    behind = p_value = ""
    if one.behind is not None and one.p_value is not None:
        low, high = (f"{100 * end:+.1f}" for end in (one.behind.low, one.behind.high))
        behind, p_value = f"{100 * one.behind.value:+.1f} ({low} to {high})", f"{one.p_value:.2g}"
    accuracy, interval = headline.percent(one.accuracy.value), headline.between(one.accuracy)
    calls = f"{one.nfe_per_image:,.1f}"
    return [str(one.rank), one.run, accuracy, interval, calls, f"{one.seconds:,.1f}", images, behind, p_value]


NOTE = (
    "Accuracy with its 95 % interval: Wilson's, or where images come in groups, for as many independent images as they "
    "are worth. Behind the best: difference of accuracies in points, with a 95 % interval (Bonett and Price's, of a "
    "t-test in groups); p is that of McNemar's exact test (of a cluster-robust t-test in groups), adjusted for all "
    "runs of the board by Holm's method. The best is the one that looked best, which the interval does not know. "
    "Nothing is said of runs that decided other images. NFE are network calls, those of a proposal included."
)


def to_markdown(boards: Sequence[Board]) -> str:
    """One table for each board."""
    lines = ["# Leaderboard", ""]
    for one in boards:
        lines += [f"## {_plain(one.title)}", "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
        lines += [f"| {' | '.join(map(_plain, cells(standing)))} |" for standing in one.standings]
        lines.append("")
    return "\n".join([*lines, NOTE, ""])


def _plain(text: str) -> str:
    """Text that means nothing to Markdown or to the HTML in it."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
    return "".join(f"\\{c}" if c in "\\|`*_[]#" else c for c in escaped)


def to_frame(boards: Sequence[Board]) -> pd.DataFrame:
    """A line for each run: all numbers, not rounded."""
    lines = []
    for one in boards:
        for standing in one.standings:
            values = asdict(standing) | {"accuracy": standing.accuracy.value}
            values |= {"low": standing.accuracy.low, "high": standing.accuracy.high}
            gap = standing.behind or (None, None, None)
            values |= dict(zip(("behind", "behind_low", "behind_high"), gap, strict=True))
            lines.append({"data": one.title} | values)
    return pd.DataFrame(lines)


def to_html(boards: Sequence[Board]) -> str:
    """One page that needs nothing else, and runs nothing: charts are pictures in it."""
    sections = [
        {"title": one.title, "rows": [cells(standing) for standing in one.standings], "chart": _pictures(one)}
        for one in boards
    ]
    return (
        templates()
        .get_template("leaderboard.html.j2")
        .render(
            sections=sections,
            columns=COLUMNS,
            note=NOTE,
            light=charts.LIGHT,
            dark=charts.DARK,
            version=version("lightning-diffclf"),
        )
    )


def _pictures(one: Board) -> dict[str, str] | None:
    """The chart as addresses that hold it, for light and dark pages; None where there is nothing to compare."""
    if len(one.standings) < 2:
        return None
    lines = [
        {
            "rank": s.rank,
            "nfe": s.nfe_per_image,
            "accuracy": s.accuracy.value,
            "low": s.accuracy.low,
            "high": s.accuracy.high,
        }
        for s in one.standings
    ]
    [spec] = charts.specs({"leaderboard": charts_of_runs.leaderboard(pd.DataFrame(lines))}).values()
    pictures = {"light": charts.svg(spec, charts.LIGHT), "dark": charts.svg(spec, charts.DARK)}
    return {name: f"data:image/svg+xml;base64,{b64encode(text.encode()).decode()}" for name, text in pictures.items()}
