"""Charts of a run: one definition each, for the report and as PNG and SVG files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd

from lightning_diffclf.files import write_bytes, write_text
from lightning_diffclf.results import drawing, tables
from lightning_diffclf.results.summary import Summary

WIDTH, HEIGHT = 460, 300
NAME_PIXELS = 150  # of a class's name
FEWEST_POINTS = 3  # of a line that says something

PERCENT = alt.Axis(format="~%")

# By role. Text on page or card has a contrast of 4.5 at least (tests/results/test_charts.py); grids are quiet.
LIGHT = {
    **{"page": "#ffffff", "card": "#f5f6f8", "text": "#1c2024", "quiet": "#565d67", "line": "#d5d9df"},
    **{
        "accent": "#1f5fbf",
        "right": "#14713d",
        "wrong": "#b3261e",
        "warm": "#b45309",
        "faint": "#e7eaee",
        "low": "#c4d6f2",
    },
}
DARK = {
    **{"page": "#15181c", "card": "#20252b", "text": "#e6e9ed", "quiet": "#a4acb7", "line": "#3a414b"},
    **{
        "accent": "#86b6ff",
        "right": "#6fd39a",
        "wrong": "#ff9a8f",
        "warm": "#f0b06a",
        "faint": "#2b3138",
        "low": "#31486b",
    },
}

NAMES_OF_PICTURES = (
    *("confusion", "timesteps", "reliability", "coverage", "cost", "survivors", "disagreement"),
    *("shares", "margins", "certified"),  # of attacks and certificates
)

Chart = alt.Chart | alt.LayerChart | alt.FacetChart


def theme(colors: dict[str, str]) -> dict[str, Any]:
    """The look of a chart in :data:`LIGHT` or :data:`DARK` colors, as a config of Vega-Lite."""
    quiet = colors["quiet"]
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "title": {
            "color": colors["text"],
            "subtitleColor": quiet,
            "anchor": "start",
            "fontSize": 14,
            "subtitleFontSize": 12,
            "offset": 12,
        },
        "axis": {
            **{"gridColor": colors["faint"], "domainColor": colors["line"], "tickColor": colors["line"]},
            **{"labelColor": quiet, "titleColor": quiet, "labelFontSize": 11, "titleFontSize": 12},
            **{"titleFontWeight": "normal", "labelOverlap": True},
        },
        "legend": {
            **{"labelColor": quiet, "titleColor": quiet, "labelFontSize": 12, "titleFontSize": 12},
            **{"titleFontWeight": "normal", "orient": "bottom", "symbolStrokeWidth": 3},
        },
        "text": {"color": colors["text"]},
        "rule": {"color": quiet},
        "mark": {"color": colors["accent"]},
        "range": {
            "category": [colors["accent"], colors["warm"], colors["right"]],
            "heatmap": [colors["low"], colors["accent"]],
        },
    }


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
    # With elimination, all candidates are seen at few timesteps only, and at most of these by hard images only.
    timesteps = timesteps[2 * timesteps["images"] >= summary.labelled]
    if len(timesteps) >= FEWEST_POINTS and not summary.outline.one_call:
        charts["timesteps"] = by_timestep(timesteps, summary.accuracy.value, summary.chance)
    return charts


def specs(charts: dict[str, Chart]) -> dict[str, dict[str, Any]]:
    """Each chart as Vega-Lite has it, by name."""
    with alt.data_transformers.enable("default", max_rows=None):
        return {name: chart.to_dict() | {"config": {}} for name, chart in charts.items()}


def svg(spec: dict[str, Any], colors: dict[str, str] = LIGHT) -> str:
    """One of :func:`specs` as SVG, on a background in the color of the page."""
    return drawing.svg(_with_look(spec, colors))


def _with_look(spec: dict[str, Any], colors: dict[str, str]) -> str:
    look = theme(colors) | {"background": colors["page"]}
    return json.dumps(spec | {"config": look})


def save(specs: dict[str, dict[str, Any]], folder: Path, kinds: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Write each of :func:`specs` as PNG (for slides) and SVG (for papers) to ``folder``; returns the files."""
    paths = []
    pictures = drawing.pictures({name: _with_look(spec, LIGHT) for name, spec in specs.items()}) if specs else {}
    for name, (drawn, pixels) in pictures.items():
        for kind in kinds:
            path = folder / f"{name}.{kind}"
            if kind == "png":
                write_bytes(pixels, path, "figure")
            else:
                write_text(drawn, path, "figure")
            paths.append(path)
    return paths


def finished(chart: Chart, title: str, subtitle: str) -> Chart:
    """A chart of the usual size, with its titles."""
    words = alt.TitleParams(title, subtitle=subtitle)
    return chart.properties(width=WIDTH, height=HEIGHT, title=words)


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
    edge = max(1, 3 / cell)  # cells smaller than three pixels could not be seen
    edges = base.transform_calculate(
        **{name: f"datum.{name} - {edge / 2}" for name in "xy"},
        **{f"{name}2": f"datum.{name} + {edge}" for name in "xy"},
    )
    squares = edges.mark_rect().encode(
        x=x,
        x2="x2:Q",
        y=y,
        y2="y2:Q",
        color=alt.Color(
            "share:Q",
            title="share of the true class",
            scale=alt.Scale(domain=[0, 1], range="heatmap"),
            legend=alt.Legend(format=".0%", gradientLength=160),
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
            color=alt.condition("luminance(scale('color', datum.share)) > 0.18", *map(alt.value, ("black", "white"))),
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
            .encode(x=x, y=alt.value("height"), text="name:N")
        )
        down = (
            alt.Chart(names[names["class"] < num_classes])
            .transform_calculate(y=place)
            .mark_text(align="right", fontSize=10, limit=NAME_PIXELS, dx=-6)
            .encode(y=y, x=alt.value(0), text="name:N")
        )
        chart = alt.layer(squares, numbers, across, down)
    title = alt.TitleParams("Confusion matrix", subtitle=subtitle)
    return chart.add_params(order).properties(width=width, height=height, title=title)


def by_timestep(frame: pd.DataFrame, overall: float, chance: float) -> Chart:
    """Accuracy of each draw alone."""
    x = alt.X("timestep:Q")
    y = alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(domain=[0, 1]))
    band = alt.Chart(frame).mark_area(opacity=0.25).encode(x=x, y=alt.Y("low:Q", title="accuracy"), y2="high:Q")
    line = (
        alt.Chart(frame)
        .mark_line(point=len(frame) <= 120)
        .encode(x=x, y=y, tooltip=["timestep:Q", alt.Tooltip("accuracy:Q", format=".1%"), "images:Q"])
    )
    known = alt.Chart(pd.DataFrame({"accuracy": [overall, chance], "what": ["all draws", "chance"]}))
    rules = known.mark_rule(strokeDash=[4, 4]).encode(y="accuracy:Q")
    words = known.mark_text(align="right", baseline="bottom", dy=-3).encode(
        x=alt.value("width"), y="accuracy:Q", text="what:N"
    )
    subtitle = "if it decided alone, with 95 % intervals"
    return finished(alt.layer(band, line, rules, words), "Accuracy of one draw, by timestep", subtitle)


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
    return finished(chart, "Accuracy of the answer so far, by cost", "after each draw, on average over the images")


def survivors(frame: pd.DataFrame) -> Chart:
    """Candidates in play over the draws."""
    x = alt.X("draw:Q", scale=alt.Scale(type="log", nice=False))  # most fall early
    band = alt.Chart(frame).mark_area(opacity=0.25).encode(x=x, y=alt.Y("low:Q", title="candidates"), y2="high:Q")
    line = (
        alt.Chart(frame)
        .mark_line()
        .encode(x=x, y="candidates:Q", tooltip=["draw:Q", alt.Tooltip("candidates:Q", format=".2f")])
    )
    subtitle = "mean, and range of the middle 80 % of the images"
    return finished(alt.layer(band, line), "Candidates in play", subtitle)


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
    return finished(layers, "Reliability", "how sure answers are, and how often they are right, with 95 % intervals")


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
    return finished(chart, "Accuracy of the surest answers", "if only these are given")
