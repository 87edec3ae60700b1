"""Charts of a run: one definition each, for the report and as PNG and SVG files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert
from scipy.special import logit

from lightning_diffclf.files import write_bytes, write_text
from lightning_diffclf.results import tables
from lightning_diffclf.results.summary import Summary

WIDTH, HEIGHT = 460, 300
NAME_PIXELS = 150  # of a class's name

PERCENT = alt.Axis(format="~%")
NAMES = alt.value("#808080")  # readable on light and dark

NAMES_OF_PICTURES = ("confusion", "timesteps", "reliability", "coverage", "cost", "survivors", "disagreement")

Chart = alt.Chart | alt.LayerChart | alt.FacetChart


def of_summary(summary: Summary) -> dict[str, Chart]:
    """``confusion``, and where enough draws can be judged alone, ``timesteps``; empty without labels."""
    charts: dict[str, Chart] = {}
    if summary.accuracy is None:
        return charts
    if summary.outline.num_classes > 1:
        subtitle = f"{summary.labelled:,} images, accuracy {summary.accuracy.value:.1%}"
        counts, names = tables.confusion(summary), tables.class_names(summary)
        if counts["images"].sum() < summary.labelled:
            subtitle += f", the {len(counts):,} commonest pairs"
        charts["confusion"] = confusion(counts, names, summary.outline.num_classes, subtitle)
    timesteps = tables.timesteps(summary)
    # With elimination, all candidates are seen at few timesteps only.
    if len(timesteps) and not summary.outline.one_call:
        charts["timesteps"] = by_timestep(timesteps, summary.accuracy.value, summary.chance)
    return charts


def specs(charts: dict[str, Chart]) -> dict[str, dict[str, Any]]:
    """Each chart as Vega-Lite has it, by name."""
    with alt.data_transformers.enable("default", max_rows=None):
        return {name: chart.to_dict() for name, chart in charts.items()}


def save(specs: dict[str, dict[str, Any]], folder: Path, kinds: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Write each of :func:`specs` as PNG (for slides) and SVG (for papers) to ``folder``; returns the files."""
    paths = []
    for name, spec in specs.items():
        text = json.dumps(spec)
        for kind in kinds:
            path = folder / f"{name}.{kind}"
            if kind == "png":
                write_bytes(vl_convert.vegalite_to_png(text, scale=2), path, "figure")
            else:
                write_text(vl_convert.vegalite_to_svg(text), path, "figure")
            paths.append(path)
    return paths


def _finished(chart: Chart, title: str) -> Chart:
    return chart.properties(width=WIDTH, height=HEIGHT, title=title).configure_legend(orient="bottom")


def confusion(counts: pd.DataFrame, names: pd.DataFrame, num_classes: int, subtitle: str) -> Chart:
    """Heat map of (true, predicted) pairs; a menu sorts classes by number or from the worst on.

    Args:
        counts: :func:`~lightning_diffclf.results.tables.confusion`.
        names: :func:`~lightning_diffclf.results.tables.class_names`: of the columns.
        num_classes: Number of classes, which are the rows.
        subtitle: What to say of the whole.
    """
    order = alt.param(
        name="order",
        value="class",
        bind=alt.binding_select(options=["class", "accuracy"], labels=["number", "accuracy"], name="Sort by "),
    )
    cell = max(WIDTH, min(900, 24 * len(names))) / len(names)
    width, height = cell * len(names), cell * num_classes
    # Names are marks, because the order of an axis cannot change.
    longest = min(NAME_PIXELS, 5.6 * int(names["name"].str.len().max()))
    aslant = longest > cell
    named = len(names) <= 50

    def side(field: str, title: str, count: int, pixels: float) -> dict[str, Any]:
        first, last = -0.5, count - 0.5
        return {
            "field": field,
            "type": "quantitative",
            "title": title,
            "axis": alt.Axis(
                labels=False, ticks=False, domain=False, grid=False, titlePadding=pixels + 12 if named else 5
            ),
            "scale": alt.Scale(domain=[first, last] if field == "x" else [last, first], nice=False),
        }

    x = alt.X(**side("x", "predicted", len(names), (0.7 if aslant else 0) * longest + 6))
    y = alt.Y(**side("y", "true", num_classes, longest))
    base = alt.Chart(counts).transform_calculate(
        x="order == 'class' ? datum.predicted : datum.predicted_rank",
        y="order == 'class' ? datum.true : datum.true_rank",
    )
    squares = base.mark_rect(width=max(cell, 2), height=max(cell, 2)).encode(
        x=x,
        y=y,
        color=alt.Color(
            "share:Q",
            title="share of the true class",
            scale=alt.Scale(scheme="blues", domain=[0, 1]),
            legend=alt.Legend(format=".0%"),
        ),
        tooltip=[
            alt.Tooltip("true_name:N", title="true"),
            alt.Tooltip("predicted_name:N", title="predicted"),
            alt.Tooltip("images:Q"),
            alt.Tooltip("share:Q", format=".1%"),
        ],
    )
    chart: Chart = squares
    if named:
        numbers = base.mark_text(fontSize=10).encode(
            x=x,
            y=y,
            text="images:Q",
            color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value("black")),
        )
        place = "order == 'class' ? datum.class : datum.rank"
        across = (
            alt.Chart(names)
            .transform_calculate(x=place)
            .mark_text(
                fontSize=10,
                limit=NAME_PIXELS,
                angle=315 if aslant else 0,
                align="right" if aslant else "center",
                baseline="top",
                dy=4,
            )
            .encode(x=x, y=alt.value(height), text="name:N", color=NAMES)
        )
        down = (
            alt.Chart(names[names["class"] < num_classes])
            .transform_calculate(y=place)
            .mark_text(align="right", fontSize=10, limit=NAME_PIXELS, dx=-6)
            .encode(y=y, x=alt.value(0), text="name:N", color=NAMES)
        )
        chart = alt.layer(squares, numbers, across, down)
    title = alt.TitleParams("Confusion matrix", subtitle=subtitle)
    return chart.add_params(order).properties(width=width, height=height, title=title).configure_legend(orient="bottom")


def by_timestep(frame: pd.DataFrame, overall: float, chance: float) -> Chart:
    """Accuracy of each draw alone."""
    x = alt.X("timestep:Q")
    band = alt.Chart(frame).mark_area(opacity=0.25).encode(x=x, y=alt.Y("low:Q", title="accuracy"), y2="high:Q")
    line = (
        alt.Chart(frame)
        .mark_line(point=len(frame) <= 120)
        .encode(
            x=x,
            y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(domain=[0, 1])),
            tooltip=["timestep:Q", alt.Tooltip("accuracy:Q", format=".1%"), "images:Q"],
        )
    )
    rules = (
        alt.Chart(pd.DataFrame({"accuracy": [overall, chance], "what": ["all draws", "chance"]}))
        .mark_rule(strokeDash=[4, 4])
        .encode(y="accuracy:Q", color=alt.Color("what:N", title=None, scale=alt.Scale(range=["#2ca02c", "#808080"])))
    )
    return _finished(alt.layer(band, line, rules), "Accuracy of one draw, by timestep")


def by_cost(frame: pd.DataFrame) -> Chart:
    """Accuracy of the answer so far against network calls; of several runs, if there is a column ``run``."""
    several = "run" in frame.columns
    x = alt.X(
        "nfe:Q",
        title="network calls per image",
        scale=alt.Scale(type="log") if several else alt.Scale(zero=False),
    )
    lines = alt.Chart(frame).mark_line(point=len(frame) <= 120)
    chart = lines.encode(
        x=x,
        y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(zero=False)),
        tooltip=["draws:Q", alt.Tooltip("nfe:Q", format=".1f"), alt.Tooltip("accuracy:Q", format=".2%")],
    )
    if several:
        chart = chart.encode(color=alt.Color("run:N"))
    return _finished(chart, "Accuracy of the answer so far, by cost")


def survivors(frame: pd.DataFrame) -> Chart:
    """Candidates in play over the draws."""
    x = alt.X("draw:Q")
    band = alt.Chart(frame).mark_area(opacity=0.25).encode(x=x, y=alt.Y("low:Q", title="candidates"), y2="high:Q")
    line = (
        alt.Chart(frame)
        .mark_line()
        .encode(x=x, y="candidates:Q", tooltip=["draw:Q", alt.Tooltip("candidates:Q", format=".2f")])
    )
    title = "Candidates in play (mean, and 80 % of the images)"
    return _finished(alt.layer(band, line), title)


def reliability(frame: pd.DataFrame) -> Chart:
    """Confidence against accuracy."""
    x = alt.X("confidence:Q", axis=PERCENT, scale=alt.Scale(domain=[0, 1]))
    color = alt.Color("probabilities:N", title=None)
    diagonal = alt.Chart(pd.DataFrame({"confidence": [0, 1], "accuracy": [0, 1]})).mark_line(
        strokeDash=[4, 4], opacity=0.5
    )
    bars = alt.Chart(frame).mark_rule().encode(x=x, y=alt.Y("low:Q", title="accuracy"), y2="high:Q", color=color)
    points = (
        alt.Chart(frame)
        .mark_circle(opacity=1)
        .encode(
            x=x,
            y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(domain=[0, 1])),
            size=alt.Size("images:Q", legend=None, scale=alt.Scale(range=[20, 300])),
            color=color,
            tooltip=[
                "probabilities:N",
                alt.Tooltip("confidence:Q", format=".1%"),
                alt.Tooltip("accuracy:Q", format=".1%"),
                "images:Q",
            ],
        )
    )
    layers = alt.layer(diagonal.encode(x=x, y="accuracy:Q"), bars, points)
    return _finished(layers, "Reliability (with 95 % intervals)")


def selective(frame: pd.DataFrame) -> Chart:
    """Accuracy of the surest answers against their share."""
    chart = (
        alt.Chart(frame)
        .mark_line()
        .encode(
            x=alt.X("coverage:Q", title="share of the images answered", axis=PERCENT),
            y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(zero=False)),
            color=alt.Color("by:N", title="surest by"),
            tooltip=["by:N", alt.Tooltip("coverage:Q", format=".1%"), alt.Tooltip("accuracy:Q", format=".2%")],
        )
    )
    return _finished(chart, "Accuracy of the surest answers")


def disagreement(counts: pd.DataFrame) -> Chart:
    """How many images each of two runs gets right."""
    chart = (
        alt.Chart(counts)
        .mark_bar()
        .encode(x=alt.X("images:Q"), y=alt.Y("what:N", title=None, sort=None), tooltip=["what:N", "images:Q"])
    )
    return chart.properties(width=WIDTH, height=120, title="Images decided rightly")


def robustness(models: pd.DataFrame, line: pd.DataFrame, runs: pd.DataFrame) -> Chart:
    """Accuracy on shifted against ordinary data, on logit axes: models, the line through them, runs with intervals.

    Args:
        models: ``model``, ``ordinary``, ``shifted``, in 0 … 1.
        line: Points of the line, ``ordinary`` and ``shifted``.
        runs: As :class:`~lightning_diffclf.results.robustness.Robustness` has them.
    """

    def on_logits(frame: pd.DataFrame) -> pd.DataFrame:
        shares = frame.select_dtypes("number")
        return frame.assign(**{f"{n}_logit": logit(shares[n].clip(1e-4, 1 - 1e-4)) for n in shares if n != "effective"})

    label = "format(1 / (1 + exp(-datum.value)), '~%')"
    ticks = logit(np.array([0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99])).tolist()
    axis = alt.Axis(values=ticks, labelExpr=label)
    x = alt.X("ordinary_logit:Q", title="accuracy, ordinary data", axis=axis, scale=alt.Scale(zero=False))
    y = alt.Y("shifted_logit:Q", title="accuracy, shifted data", axis=axis, scale=alt.Scale(zero=False))
    percent = [alt.Tooltip(f"{name}:Q", format=".1%") for name in ("ordinary", "shifted")]
    points = alt.Chart(on_logits(models)).mark_circle(opacity=0.5).encode(x=x, y=y, tooltip=["model:N", *percent])
    fitted = alt.Chart(on_logits(line)).mark_line(strokeDash=[4, 4]).encode(x=x, y=y)
    ours = alt.Chart(on_logits(runs))
    stars = ours.mark_point(size=120, filled=True).encode(x=x, y=y, color="run:N", tooltip=["run:N", *percent])
    upright = ours.mark_rule().encode(x=x, y="shifted_low_logit:Q", y2="shifted_high_logit:Q", color="run:N")
    across = ours.mark_rule().encode(y=y, x="ordinary_low_logit:Q", x2="ordinary_high_logit:Q", color="run:N")
    layers = [points, fitted] if runs.empty else [points, fitted, upright, across, stars]
    return _finished(alt.layer(*layers), "Effective robustness")
