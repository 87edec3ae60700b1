"""One HTML file that shows a run, and its figures as PNG and SVG files."""

from __future__ import annotations

import base64
import io
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from PIL import Image

from lightning_diffclf.files import write_bytes, write_text
from lightning_diffclf.results import charts
from lightning_diffclf.results.analysis import RunAnalysis
from lightning_diffclf.results.predictions import Record

REPORT = "report.html"
FIGURES = "figures"


def write_report(run: str | Path, out: str | Path | None = None, gallery: int = 240) -> Path:
    """Make the report of a run, which may still be going on.

    Args:
        run: Its folder.
        out: The HTML file; ``report.html`` in the run's folder if omitted. Figures go to ``figures/`` beside it.
        gallery: Images to show at most.

    Returns:
        The HTML file.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it cannot be read, or has no images.
        OSError: if the report cannot be written.
    """
    analysis = RunAnalysis.read(run)
    path = Path(run) / REPORT if out is None else Path(out)
    figures = make_figures(analysis)
    save_figures(figures, path.parent / FIGURES)
    write_text(render(analysis, figures, gallery), path, "report")
    return path


def make_figures(run: RunAnalysis) -> dict[str, Any]:
    """The charts that this run allows, by name."""
    figures: dict[str, Any] = {}
    if run.labelled:
        assert run.accuracy is not None
        if len(run.class_names) > 1:
            figures["confusion"] = charts.confusion(run.confusion(), len(run.class_names))
        figures["reliability"] = charts.reliability(run.reliability())
        figures["coverage"] = charts.selective(run.selective())
        chance = 1 / max(1, len(set(run.classes)))
        timesteps = run.by_timestep()
        if len(timesteps) > 2:  # with elimination, all candidates are seen at few timesteps only
            figures["timesteps"] = charts.by_timestep(timesteps, run.accuracy.value, chance)
        figures["cost"] = charts.by_cost(run.by_cost())
    figures["survivors"] = charts.survivors(run.survivors())
    return figures


def save_figures(figures: dict[str, Any], folder: Path) -> None:
    """Each chart as PNG (for slides) and SVG (for papers); pictures of an earlier report are replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    with alt.data_transformers.enable("default", max_rows=None):
        for name, chart in figures.items():
            spec = chart.to_json()
            write_text(vl_convert.vegalite_to_svg(spec), folder / f"{name}.svg", "figure")
            write_bytes(vl_convert.vegalite_to_png(spec, scale=2), folder / f"{name}.png", "figure")


def render(run: RunAnalysis, figures: dict[str, Any], gallery: int) -> str:
    """The report as HTML that needs nothing else."""
    environment = Environment(loader=PackageLoader("lightning_diffclf.results", "."), undefined=StrictUndefined)
    environment.autoescape = True
    with alt.data_transformers.enable("default", max_rows=None):
        specs = {name: chart.to_dict() for name, chart in figures.items()}
    library = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub does not know the default
    rows = run.gallery(gallery)
    per_class = run.per_class().to_dict("records") if run.labelled else []
    return environment.get_template("report.html.j2").render(
        title=f"{run.path.resolve().parent.name}/{run.path.resolve().name}",
        headline=run.headline(),
        figures=list(figures),
        specs=_safe(specs),
        library=library.replace("</script", "<\\/script"),
        classes=per_class,
        cards=[_card(run, number, row) for number, row in enumerate(rows)],
        details=_safe({number: _details(run, row) for number, row in enumerate(rows)}),
        total=len(run.rows),
        wrong=int((~run.right_B).sum()) if run.labelled else 0,
        without_pixels=sum(row.thumbnail is None for row in rows),
        settings=_flat(run.settings.identity) | _flat(_for_readers(run.settings.info)),
        command=run.settings.info.get("command", "unknown"),
        version=version("lightning-diffclf"),
    )


def _for_readers(info: dict[str, Any]) -> dict[str, Any]:
    lists = ("candidate_names", "candidate_classes", "class_names", "timesteps_S", "log_snr_S", "command")
    return {name: value for name, value in info.items() if name not in lists}


def _flat(values: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _safe(values: Any) -> str:
    """JSON that may stand inside a script element; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(values), separators=(",", ":")).replace("<", "\\u003c")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    if isinstance(values, (float, np.floating)):
        return float(values) if np.isfinite(values) else None
    return values.item() if isinstance(values, np.generic) else values


def _card(run: RunAnalysis, number: int, row: Record) -> dict[str, Any]:
    return {
        "number": number,
        "id": row.id,
        "label": None if row.label is None else run.name(row.label),
        "prediction": run.name(-1 if row.prediction is None else row.prediction),
        "right": row.label == row.prediction,
        "margin": row.margin,
        "nfe": row.nfe,
        "picture": None if row.thumbnail is None else _data_uri("webp", row.thumbnail),
    }


def _details(run: RunAnalysis, row: Record) -> dict[str, Any]:
    """What a click on a card shows."""
    story = run.story(row).to_dict("records")
    details: dict[str, Any] = {"candidates": story, "votes": row.votes, "draws": int(row.draws_K.max())}
    if row.error_map is not None:
        details["map"] = _data_uri("png", error_map_picture(row.error_map))
    return details


def error_map_picture(difference: np.ndarray, side: int = 128) -> bytes:
    """An error map (h, w) as PNG of about ``side`` pixels: red where the chosen class fits better, blue where worse."""
    scale = max(float(np.abs(difference).max()), 1e-12)
    colored = colormaps["RdBu_r"](difference / scale / 2 + 0.5)
    times = max(1, side // max(difference.shape))
    pixels = (colored[..., :3] * 255).round().astype(np.uint8).repeat(times, 0).repeat(times, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
