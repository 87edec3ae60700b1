"""Charts of a run: one definition each, for the report and as PNG and SVG files."""

from __future__ import annotations

import altair as alt
import pandas as pd

WIDTH, HEIGHT = 460, 300

PERCENT = alt.Axis(format="~%")
NAMES = alt.value("#808080")  # readable on light and dark

Chart = alt.Chart | alt.LayerChart | alt.FacetChart


def _finished(chart: Chart, title: str) -> Chart:
    return chart.properties(width=WIDTH, height=HEIGHT, title=title).configure_legend(orient="bottom")


def confusion(counts: pd.DataFrame, num_classes: int) -> Chart:
    """Heat map of (true, predicted) pairs; a menu sorts classes by index or from the worst on."""
    order = alt.param(
        name="order",
        value="class",
        bind=alt.binding_select(options=["class", "accuracy"], labels=["number", "accuracy"], name="Sort by "),
    )
    side = max(WIDTH, min(900, 24 * num_classes))
    labels = num_classes <= 50
    axis = alt.Axis(labels=False, ticks=False, domain=False, grid=False, titlePadding=40 if labels else 5)
    columns = ["true", "predicted", "true_rank", "predicted_rank", "true_name", "predicted_name", "images", "share"]
    base = alt.Chart(counts[columns]).transform_calculate(
        x="order == 'class' ? datum.predicted : datum.predicted_rank",
        y="order == 'class' ? datum.true : datum.true_rank",
    )
    extent = [-1 if (counts["predicted"] < 0).any() else 0, num_classes - 1]
    sides = {
        "x": alt.X("x:Q", title="predicted", scale=alt.Scale(domain=[extent[0] - 0.5, extent[1] + 0.5], nice=False)),
        "y": alt.Y(
            "y:Q",
            title="true",
            scale=alt.Scale(domain=[extent[1] + 0.5, extent[0] - 0.5], nice=False),
        ),
    }
    sides["x"].axis = axis
    sides["y"].axis = axis
    cell = max(1.0, side / (extent[1] - extent[0] + 1))
    squares = base.mark_rect(width=cell, height=cell).encode(
        **sides,
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
    if labels:
        text = base.mark_text(fontSize=10).encode(
            **sides,
            text="images:Q",
            color=alt.condition("datum.share > 0.5", alt.value("white"), alt.value("black")),
        )
        across = (
            base.transform_filter("datum.true == datum.predicted")
            .mark_text(dy=side / 2 + 10, fontSize=10)
            .encode(x=sides["x"], y=alt.value(side / 2), text="predicted_name:N", color=NAMES)
        )
        down = (
            base.transform_filter("datum.true == datum.predicted")
            .mark_text(align="right", fontSize=10, dx=-6)
            .encode(y=sides["y"], x=alt.value(0), text="true_name:N", color=NAMES)
        )
        chart = alt.layer(squares, text, across, down)
    chart = chart.add_params(order).properties(width=side, height=side, title="Confusion matrix")
    return chart.configure_legend(orient="bottom")


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
        .encode(y="accuracy:Q", color=alt.Color("what:N", title=None))
    )
    return _finished(alt.layer(band, line, rules), "Accuracy of one draw, by timestep")


def by_cost(frame: pd.DataFrame) -> Chart:
    """Accuracy of the answer so far against network calls."""
    chart = (
        alt.Chart(frame)
        .mark_line(point=len(frame) <= 60)
        .encode(
            x=alt.X("nfe:Q", title="network calls per image", scale=alt.Scale(zero=False)),
            y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(zero=False)),
            tooltip=["draws:Q", alt.Tooltip("nfe:Q", format=".1f"), alt.Tooltip("accuracy:Q", format=".2%")],
        )
    )
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


def costs(frame: pd.DataFrame) -> Chart:
    """:func:`by_cost` of several runs."""
    chart = (
        alt.Chart(frame)
        .mark_line(point=True)
        .encode(
            x=alt.X("nfe:Q", title="network calls per image", scale=alt.Scale(type="log")),
            y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(zero=False)),
            color=alt.Color("run:N"),
        )
    )
    return _finished(chart, "Accuracy of the answer so far, by cost")
