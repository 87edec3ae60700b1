"""One HTML file that shows a run, and its figures as PNG and SVG files."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_diffclf.files import write_text
from lightning_diffclf.results import charts, headline, one_image, tables
from lightning_diffclf.results.evaluation import Evaluation

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
    evaluation = Evaluation.read(run)
    path = Path(run) / REPORT if out is None else Path(out)
    with ThreadPoolExecutor(1) as beside:  # what needs seconds of its own
        library = beside.submit(chart_library)
        specs = charts.specs(make_figures(evaluation))
        for picture in (path.parent / FIGURES).glob("*.???"):  # of an earlier report; files of others stay
            if picture.stem in charts.NAMES_OF_PICTURES:
                picture.unlink()
        pictures = beside.submit(charts.save, specs, path.parent / FIGURES)
        html = render(evaluation, specs, library.result(), gallery)
        pictures.result()
    write_text(html, path, "report")
    return path


def chart_library() -> str:
    """The scripts that draw charts: Vega-Embed and what it needs, as vl_convert brings them.

    To bundle them takes longer than all charts, so that the bundle is kept in the user's cache, one of each version.
    """
    name = f"charts-{version('vl-convert-python')}.js"
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_diffclf" / name
    except RuntimeError:  # a user without a home
        return _bundle()
    with suppress(OSError, ValueError):  # none yet, or none that can be read: it is made again
        return path.read_bytes().decode()
    library = _bundle()
    with suppress(OSError):  # where there is no room for a cache, the next report takes as long
        write_text(library, path, "cache")
    return library


def _bundle() -> str:
    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub knows no default


def make_figures(run: Evaluation) -> dict[str, charts.Chart]:
    """The charts that say something of this run, by name."""
    figures = charts.of_summary(run.summary)
    if run.summary.labelled:
        calibrated = None if run.crossfitted is None else run.crossfitted.judged
        sure, surest = tables.reliability(run.probabilities), tables.selective(run.sureness, calibrated)
        cost = tables.costs(run.costs)
        if len(sure) >= charts.FEWEST_POINTS:
            figures["reliability"] = charts.reliability(sure)
        if surest["accuracy"].nunique() > 1:
            figures["coverage"] = charts.selective(surest)
        if len(cost) >= charts.FEWEST_POINTS and not run.outline.one_call:
            figures["cost"] = charts.by_cost(cost)
    survivors = tables.survivors(run.survivors)
    if survivors["candidates"].nunique() > 1:  # none is dropped by Exhaustive
        figures["survivors"] = charts.survivors(survivors)
    return figures


def templates() -> Environment:
    """The templates of this folder; what is put into them is escaped."""
    environment = Environment(loader=PackageLoader("lightning_diffclf.results", "."), undefined=StrictUndefined)
    environment.autoescape = True
    environment.filters["percent"] = headline.percent
    return environment


def render(run: Evaluation, specs: dict[str, dict[str, Any]], library: str, gallery: int) -> str:
    """The report as HTML that needs nothing else, with the ``library`` that draws charts from their ``specs``."""
    images = [one_image.page(run, row) for row in run.gallery(gallery)]
    images.sort(key=lambda image: -image["sure"] if image["kind"] == "wrong" else 1)  # wrong and sure first
    return (
        templates()
        .get_template("report.html.j2")
        .render(
            title=f"{run.path.resolve().parent.name}/{run.path.resolve().name}",
            sentence=headline.sentence(run),
            cards=headline.cards(run),
            numbers=headline.details(run),
            figures={name: spec["title"] for name, spec in specs.items()},
            specs=_safe(specs),
            light=charts.LIGHT,
            dark=charts.DARK,
            themes=_safe({"light": charts.theme(charts.LIGHT), "dark": charts.theme(charts.DARK)}),
            library=library.replace("</script", "<\\/script"),
            classes=tables.classes(run.summary).to_dict("records") if run.summary.labelled else [],
            images=images,
            stories=_safe([image["story"] for image in images]),
            total=run.summary.images,
            wrong=run.summary.labelled - run.summary.right,
            without_pixels=sum(image["picture"] is None for image in images),
            settings=_flat(run.settings.identity) | _flat(_for_readers(run.settings.info)),
            command=run.settings.info.get("command", "unknown"),
            version=version("lightning-diffclf"),
        )
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
