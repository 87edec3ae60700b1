"""What the report of an attack or of certificates shows; :mod:`~.report` writes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lightning_diffclf.errors import UserError
from lightning_diffclf.results import attacks, charts_of_trials, trials
from lightning_diffclf.results.curves import thin
from lightning_diffclf.results.headline import Line, between, count, date_of, duration, names, percent
from lightning_diffclf.results.page import Cell, Page
from lightning_diffclf.results.settings import SETTINGS, Settings
from lightning_diffclf.results.statistics import Interval, wilson
from lightning_diffclf.results.stored import Stored

MOST_POINTS = 2000  # of a chart of single images

MEANING = "What each number means: docs/trust.md."


def page_of(run: Path, settings: Settings) -> Page:
    """The page of an attack or of certificates.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it cannot be read, or has no images.
    """
    stored = Stored(run, settings)
    found = trials.numbers(settings, stored)
    if not found["images"]:
        raise UserError(f"run: no image in {str(run)!r} yet")
    rows = pd.concat([table.to_pandas() for table in stored], ignore_index=True)
    class_names = settings.info.get("class_names")
    if not isinstance(class_names, list) or len(class_names) <= rows["label"].max():
        raise UserError(f"run: {SETTINGS} names {class_names!r}, expected a class for each label")
    model, data, _ = names(settings.identity)
    about = f"{model or 'A model'}, {count(len(rows), 'image')}" + (f" of {data}" if data else "")
    about += f", {trials.told(settings, 'title')}, on {date_of(run, settings)}."
    return (_attack if settings.kind == attacks.KIND else _certificates)(found, rows, about, settings)


def _attack(found: Mapping[str, Any], rows: pd.DataFrame, about: str, settings: Settings) -> Page:
    label_B1 = rows["label"].to_numpy()[:, None]
    clean_BS, attacked_BS = (np.stack(rows[name].to_list()) for name in ("clean_S", "attacked_S"))
    right_BS = clean_BS == label_B1
    robust_BS = right_BS & (attacked_BS == label_B1)
    right_B, robust_B, seeds = right_BS.all(1), robust_BS.all(1), right_BS.shape[1]
    alone = {f"under attack, seed {seed} alone": robust_BS[:, seed] for seed in range(seeds) if seeds > 1}
    shares = {
        what: _share(one) for what, one in ({"without attack": right_B, "under attack": robust_B} | alone).items()
    }
    clean, robust = shares["without attack"], shares["under attack"]
    fooled, all_seeds = int((right_B & ~robust_B).sum()), f"; by all {seeds} seeds" if seeds > 1 else ""
    distance = f"{found['distance_of_fooled']:.3g}" if fooled else "–"
    calls = f"of {trials.told(settings, 'calls'):,} network calls each, gradients included"
    cards = [
        Line("right under attack", percent(robust.value), f"{between(robust)} (95 % interval){all_seeds}"),
        Line("right without", percent(clean.value), f"{between(clean)} (95 % interval){all_seeds}"),
        Line("fooled", f"{fooled:,}", f"of {count(int(right_B.sum()), 'image')} that are right without attack"),
        Line("distance of fooled", distance, "mean, in the norm of the attack, of images in [0, 1]"),
        Line("queries per image", f"{found['queries_per_image']:,.1f}", calls),
        _time(found),
    ]
    margins = pd.DataFrame(
        {
            "id": rows["id"],
            "before": rows["margin_before"],
            "after": rows["margin_after"],
            "what": np.select([robust_B, right_B], ["withstands", "fooled"], "wrong anyway"),
        }
    )
    charts = {
        "shares": charts_of_trials.shares(_frame(what=shares)),
        "margins": charts_of_trials.margins(margins[:: 1 + len(margins) // MOST_POINTS]),
    }

    def cells(places: np.ndarray) -> list[Cell]:
        under = _share(robust_B[places])
        return _percents(right_B[places].mean(), *under)

    columns = ("without attack", "under attack", "low", "high")
    return Page(
        f"{percent(robust.value)} right under attack (95 % interval {between(robust)}), {percent(clean.value)} "
        f"without: {about}",
        cards,
        [*_lines(shares), *cards[2:]],
        MEANING,
        charts,
        ("name", "images", *columns, "mostly taken for, under attack"),
        _classes(rows, settings, cells, attacked_BS),
    )


def _certificates(found: Mapping[str, Any], rows: pd.DataFrame, about: str, settings: Settings) -> Page:
    answer_B = rows["prediction"].fillna(-1).to_numpy(dtype=np.int64)
    right_B = answer_B == rows["label"].to_numpy()
    radius_B = np.where(right_B, rows["radius"].to_numpy(), -1.0)  # a wrong answer is right within no distance
    at = {row["radius"]: Interval(row["accuracy"], row["low"], row["high"]) for row in found["certified"]}
    right, answered = _share(right_B), _share(answer_B >= 0)
    farthest = max(at)
    shown = min((radius for radius in at if radius > 0), default=farthest)
    cards = [
        Line("right", percent(right.value), f"{between(right)} (95 % interval), of the smoothed classifier"),
        Line(f"certified at {shown:g}", percent(at[shown].value), f"{between(at[shown])} (95 % interval)"),
        Line("median radius", f"{found['median_radius']:.3g}", "Euclidean, of images in [0, 1]; 0 for wrong answers"),
        Line("answered", percent(answered.value), "the others have no majority, and no certificate"),
        Line("images", f"{len(rows):,}", "tried"),
        _time(found),
    ]
    falls = np.unique(np.concatenate([[0.0], radius_B[right_B]]))
    curve = {radius: _share(radius_B >= radius) for radius in falls[thin(len(falls))].tolist()}
    curve[1.02 * falls[-1] if falls[-1] > 0 else 1.0] = _share(np.zeros(len(rows)))  # beyond the largest, nothing

    def cells(places: np.ndarray) -> list[Cell]:
        median = float(np.median(radius_B[places].clip(0)))
        return [*_percents(*_share(right_B[places])), Cell(f"{median:.3g}", median)]

    return Page(
        f"{percent(right.value)} right (95 % interval {between(right)}), {percent(at[shown].value)} right and "
        f"certified at {shown:g}: {about}",
        cards,
        [*_lines({f"right and certified at {radius:g}": one for radius, one in at.items()}), *cards[2:]],
        MEANING,
        {"certified": charts_of_trials.certified(_frame(radius=curve))},
        ("name", "images", "right", "low", "high", "median radius", "mostly taken for"),
        _classes(rows, settings, cells, np.where(answer_B < 0, rows["label"], answer_B)[:, None]),
    )


def _share(right_B: np.ndarray) -> Interval:
    return wilson(int(right_B.sum()), len(right_B))


def _time(found: Mapping[str, Any]) -> Line:
    return Line("time", duration(found["seconds"]), f"{duration(found['seconds'] / found['images'])} an image")


def _lines(shares: Mapping[str, Interval]) -> list[Line]:
    return [
        Line(what, percent(one.value, 2), f"95 % interval {between(one, 2)} (Wilson)") for what, one in shares.items()
    ]


def _frame(**shares: Mapping[Any, Interval]) -> pd.DataFrame:
    """Shares by the name of what they are shares at."""
    [(name, found)] = shares.items()
    return pd.DataFrame([(at, *one) for at, one in found.items()], columns=[name, "accuracy", "low", "high"])


def _percents(*shares: float) -> list[Cell]:
    return [Cell(percent(one), float(one)) for one in shares]


def _classes(
    rows: pd.DataFrame, settings: Settings, cells: Callable[[np.ndarray], list[Cell]], answers_BS: np.ndarray
) -> Sequence[Sequence[Cell]]:
    """A row for each class that occurs: name, images, some ``cells`` about these, and the commonest wrong answer."""
    class_names = settings.info["class_names"]
    found = []
    label_B = rows["label"].to_numpy()
    for label in np.unique(label_B).tolist():
        places = np.flatnonzero(label_B == label)
        answers, often = np.unique(answers_BS[places][answers_BS[places] != label], return_counts=True)
        mistake = f"{class_names[answers[often.argmax()]]} ({often.max()})" if len(often) else ""
        first = [Cell(class_names[label], place=label), Cell(f"{len(places):,}", len(places))]
        found.append([*first, *cells(places), Cell(mistake)])
    return found
