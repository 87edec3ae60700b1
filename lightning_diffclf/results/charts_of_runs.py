"""Charts of several runs; those of one, and how charts look and are written, are in :mod:`~.charts`."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd
from scipy.special import logit

from lightning_diffclf.results.charts import PERCENT, WIDTH, Chart, finished


def disagreement(counts: pd.DataFrame) -> Chart:
    """How many images each of two runs gets right."""
    chart = (
        alt.Chart(counts)
        .mark_bar()
        .encode(x=alt.X("images:Q"), y=alt.Y("what:N", title=None, sort=None), tooltip=["what:N", "images:Q"])
    )
    return chart.properties(width=WIDTH, height=120, title="Images decided rightly")


def leaderboard(frame: pd.DataFrame) -> Chart:
    """Accuracy with its interval against network calls, of several runs by rank.

    Args:
        frame: ``rank``, ``nfe``, ``accuracy``, ``low`` and ``high``.
    """
    base = alt.Chart(frame).encode(
        x=alt.X("nfe:Q", title="network calls per image", scale=alt.Scale(type="log", nice=False, padding=20))
    )
    bars = base.mark_rule().encode(y=alt.Y("low:Q", title="accuracy", axis=PERCENT), y2="high:Q")
    points = base.mark_circle(size=60, opacity=1).encode(
        y=alt.Y("accuracy:Q", axis=PERCENT, scale=alt.Scale(zero=False))
    )
    ranks = base.mark_text(align="left", dx=7, dy=-7).encode(y="accuracy:Q", text="rank:N")  # names would not fit
    return finished(alt.layer(bars, points, ranks), "Accuracy by cost", "runs by their rank, with 95 % intervals")


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
    return finished(alt.layer(*layers), "Effective robustness", "accuracy on shifted data beside that on ordinary data")


def ablations(frame: pd.DataFrame) -> dict[str, Chart]:
    """One chart for each ablation in a frame as :func:`~lightning_diffclf.results.ablations.ablations` has it."""
    titles = {
        "one draw": ("Which timestep says most", "decided by one draw; by time, from clean to noisy", "share of time"),
        "timesteps": ("Which timesteps to take", "accuracy by the draws of a decision", "draws"),
        "draws": ("Shared or own draws", "the same (t, noise) for all classes, or others for each", "draws"),
        "guidance": ("Guidance", "predictions (1 + w) conditional − w unconditional", "w"),
    }
    found: dict[str, Chart] = {}
    for name, some in frame.groupby("ablation", sort=False):
        title, subtitle, axis = titles[str(name)]
        scale = alt.Scale(type="log") if axis == "draws" else alt.Scale(zero=False)
        x = alt.X("x:Q", title=axis, scale=scale)
        y = alt.Y("accuracy:Q", title="accuracy", axis=PERCENT, scale=alt.Scale(domain=[0, 1]))
        base = alt.Chart(some)
        color = {} if some["setting"].nunique() == 1 else {"color": alt.Color("setting:N", title=None)}
        tips = ["setting:N", alt.Tooltip("x:Q"), alt.Tooltip("accuracy:Q", format=".1%")]
        line = base.mark_line(point=True).encode(x=x, y=y, tooltip=tips, **color)
        rule = base.mark_rule(opacity=0.4).encode(x=x, y="low:Q", y2="high:Q", **color)
        found[str(name).replace(" ", "-")] = finished(alt.layer(rule, line), title, subtitle)
    return found
