"""Charts of attacks and certificates; how charts look and are written is in :mod:`~.charts`."""

from __future__ import annotations

import altair as alt
import pandas as pd

from lightning_diffclf.results.charts import PERCENT, Chart, finished


def shares(frame: pd.DataFrame) -> Chart:
    """Shares of images with their intervals, one below the other.

    Args:
        frame: ``what``, ``accuracy``, ``low`` and ``high``.
    """
    tips = ["what:N", *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("accuracy", "low", "high"))]
    base = alt.Chart(frame).encode(y=alt.Y("what:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)))
    x = alt.X("accuracy:Q", title="share of the images", axis=PERCENT, scale=alt.Scale(domain=[0, 1]))
    bars = base.mark_bar(opacity=0.55).encode(x=x, tooltip=tips)
    ends = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title="share of the images"), x2="high:Q")
    words = "without and with attack, with 95 % intervals"
    return finished(alt.layer(bars, ends), "Decided rightly", words).properties(height=max(120, 44 * len(frame)))


def margins(frame: pd.DataFrame) -> Chart:
    """How far the right class is ahead, before the attack and after it.

    Args:
        frame: ``id``, ``before``, ``after`` and ``what`` became of the image.
    """
    scale = alt.Scale(type="symlog", nice=False, padding=8)
    axis = alt.Axis(format="~s", tickCount=5)
    x = alt.X("before:Q", title="margin without attack", scale=scale, axis=axis)
    y = alt.Y("after:Q", title="margin under attack", scale=scale, axis=axis)
    tips = ["id:N", *(alt.Tooltip(f"{name}:Q", format=",.3g") for name in ("before", "after")), "what:N"]
    color = alt.Color("what:N", title=None, sort=["withstands", "fooled", "wrong anyway"])
    points = alt.Chart(frame).mark_circle(size=40, opacity=0.7).encode(x=x, y=y, color=color, tooltip=tips)
    level = alt.Chart(pd.DataFrame({"after": [0.0]})).mark_rule(strokeDash=[4, 4]).encode(y="after:Q")
    words = "logit of the right class less the best other one; below the line, the classifier is fooled"
    return finished(alt.layer(level, points), "Margins", words)


def certified(frame: pd.DataFrame) -> Chart:
    """Certified accuracy against the radius: it falls at each radius of a right answer.

    Args:
        frame: ``radius``, ``accuracy``, ``low`` and ``high``.
    """
    x = alt.X("radius:Q", title="radius: Euclidean, of images in [0, 1]", axis=alt.Axis(format="~g"))
    y = alt.Y("accuracy:Q", title="right and certified", axis=PERCENT, scale=alt.Scale(domain=[0, 1]))
    tips = [
        alt.Tooltip("radius:Q", format=".3g"),
        *(alt.Tooltip(f"{n}:Q", format=".1%") for n in ("accuracy", "low", "high")),
    ]
    base = alt.Chart(frame)
    band = base.mark_area(opacity=0.25, interpolate="step-before").encode(
        x=x, y=alt.Y("low:Q", title="right and certified"), y2="high:Q"
    )
    line = base.mark_line(interpolate="step-before").encode(x=x, y=y, tooltip=tips)
    words = "share of the images with the right answer and at least this radius, with 95 % intervals"
    return finished(alt.layer(band, line), "Certified accuracy", words)
