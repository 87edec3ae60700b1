"""One HTML file that shows a run, and its figures as PNG and SVG files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

from lightning_diffclf.files import write_text
from lightning_diffclf.results import charts, headline, one_image, tables, trial_report
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.page import Cell, Page, as_script, render
from lightning_diffclf.results.settings import EVALUATION, Settings

REPORT = "report.html"
FIGURES = "figures"
COLUMNS = ("name", "images", "accuracy", "low", "high", "calls per image", "mostly taken for")


def write_report(run: str | Path, out: str | Path | None = None, gallery: int = 240) -> Path:
    """Make the report of an evaluation, an attack or certificates, which may still be going on.

    Args:
        run: The folder of the run.
        out: The HTML file; ``report.html`` in the run's folder if omitted. Figures go to ``figures/`` beside it.
        gallery: Images of an evaluation to show at most.

    Returns:
        The HTML file.

    Raises:
        FileNotFoundError: if there is no run.
        ValueError: if it cannot be read, or has no images.
        OSError: if the report cannot be written.
    """
    folder, settings = Path(run), Settings.read(Path(run))
    path = folder / REPORT if out is None else Path(out)
    with ThreadPoolExecutor(2) as beside:  # what needs seconds of its own
        library = beside.submit(chart_library)
        if settings.kind == EVALUATION:
            evaluation = Evaluation.read(folder)
            figures: Mapping[str, charts.Chart] = make_figures(evaluation)
            make_page: Callable[[], Page] = partial(evaluation_page, evaluation, figures, gallery)
        else:
            page = trial_report.page_of(folder, settings)
            figures, make_page = page.charts, lambda: page
        specs = charts.specs(dict(figures))
        for picture in (path.parent / FIGURES).glob("*.???"):  # of an earlier report; files of others stay
            if picture.stem in charts.NAMES_OF_PICTURES:
                picture.unlink()
        pictures = beside.submit(charts.save, specs, path.parent / FIGURES)
        html = render(make_page(), folder, settings, specs, library.result())
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
    import vl_convert  # a library of 50 MB, needed once

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


def evaluation_page(run: Evaluation, figures: Mapping[str, charts.Chart], gallery: int) -> Page:
    """What the report of an evaluation shows, with its ``figures`` and so many of its images at most."""
    images = [one_image.page(run, row) for row in run.gallery(gallery)]
    images.sort(key=lambda image: -image["sure"] if image["kind"] == "wrong" else 1)  # wrong and sure first
    rows = tables.classes(run.summary).to_dict("records") if run.summary.labelled else []
    return Page(
        headline.sentence(run),
        headline.cards(run),
        headline.details(run),
        "Calibrated: with a temperature fitted to the other images. What each number means: docs/results.md.",
        figures,
        COLUMNS,
        [
            [
                Cell(row["name"], place=row["class"]),
                Cell(str(row["images"]), row["images"]),
                *(Cell(headline.percent(row[share]), row[share]) for share in ("accuracy", "low", "high")),
                Cell(f"{row['nfe']:.1f}", row["nfe"]),
                Cell(row["taken for"]),
            ]
            for row in rows
        ],
        "report.html.j2",
        {
            "images": images,
            "stories": as_script([image["story"] for image in images]),
            "total": run.summary.images,
            "wrong": run.summary.labelled - run.summary.right,
            "without_pixels": sum(image["picture"] is None for image in images),
        },
    )
