"""One HTML file that shows a run, and its figures as PNG and SVG files."""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import colormaps
from PIL import Image

from lightning_diffclf.files import write_text
from lightning_diffclf.results import charts, tables
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.predictions import Record
from lightning_diffclf.results.summary import NO_ANSWER

RECALL = (
    "the right class is among the candidates kept. Whether the class that all draws of all candidates decide for is, a "
    "run with a proposal cannot know: diffclf compare with one without"
)

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
        library = beside.submit(vl_convert.javascript_bundle)  # type: ignore[call-arg]  # its stub knows no default
        specs = charts.specs(make_figures(evaluation))
        for picture in (path.parent / FIGURES).glob("*.???"):  # of an earlier report; files of others stay
            if picture.stem in charts.NAMES_OF_PICTURES:
                picture.unlink()
        pictures = beside.submit(charts.save, specs, path.parent / FIGURES)
        html = render(evaluation, specs, library.result(), gallery)
        pictures.result()
    write_text(html, path, "report")
    return path


def make_figures(run: Evaluation) -> dict[str, charts.Chart]:
    """The charts that this run allows, by name."""
    figures, takes_draws = charts.of_summary(run.summary), not run.outline.one_call
    if run.summary.labelled:
        calibrated = None if run.crossfitted is None else run.crossfitted.judged
        figures["reliability"] = charts.reliability(tables.reliability(run.probabilities))
        figures["coverage"] = charts.selective(tables.selective(run.sureness, calibrated))
        if takes_draws:
            figures["cost"] = charts.by_cost(tables.costs(run.costs))
    if takes_draws:
        figures["survivors"] = charts.survivors(tables.survivors(run.survivors))
    return figures


def headline(run: Evaluation) -> list[tuple[str, str, str]]:
    """Name, value and explanation of the numbers that sum the run up."""
    summary, numbers = run.summary, run.summary.numbers()
    lines = []
    if summary.accuracy is not None:
        interval = f"95 % interval {summary.accuracy.low:.2%} to {summary.accuracy.high:.2%} (Wilson)"
        lines.append(("accuracy", f"{numbers['accuracy']:.2%}", interval))
        occurring = int((summary.sums["confusion_CA"].sum(1) > 0).sum())
        lines.append(("mean per class", f"{numbers['mean_per_class']:.2%}", f"over the {occurring} classes that occur"))
        for name, title, note in (
            ("top5", "top 5", "the right class is among the best five"),
            ("proposal_recall", "proposal recall", RECALL),
            ("coverage", "coverage", "images with an answer of the margin asked for"),
            ("answered_accuracy", "accuracy of these", "among the images with such an answer"),
        ):
            if name in numbers:
                lines.append((title, f"{numbers[name]:.2%}", note))
        if summary.unanswered:
            lines.append(("no answer", f"{summary.unanswered:,}", "images; they count as wrong"))
        for name, scores in run.probabilities.items():
            found = scores.numbers()
            note = f"NLL {found['nll']:.4f} nats, Brier score {found['brier']:.4f}"
            lines.append((f"ECE, {name}", f"{found['ece']:.4f}", note))
    lines.append(("images", f"{summary.images:,}", f"{summary.labelled:,} with a label"))
    lines.append(("NFE / image", f"{numbers['nfe_per_image']:,.1f}", "network calls"))
    if run.outline.proposes:
        lines += _search_lines(numbers)
    rate = f"{numbers['images_per_second']:,.2f} images / s"
    lines.append(("time", f"{numbers['seconds']:,.1f} s", rate))
    return lines


def _search_lines(numbers: dict[str, float]) -> list[tuple[str, str, str]]:
    """What a search or another proposal cost, and left to decide between."""
    lines = [("candidates kept", f"{numbers['kept_per_image']:,.1f}", "of an image, by the proposal")]
    if "search_nfe_per_image" not in numbers:
        return [*lines, ("NFE of the search", "unknown", "decided by an earlier version, which did not store it")]
    search, contest = numbers["search_nfe_per_image"], numbers["contest_nfe_per_image"]
    lines += [
        (f"NFE of the {name}", f"{value:,.1f}", f"of an image, {value / (search + contest):.1%} of all")
        for name, value in (("search", search), ("contest", contest))
    ]
    if numbers["dropped_draws"]:
        note = "draws of the search, whose gradient was NaN or infinite"
        lines.append(("dropped", f"{numbers['dropped_draws']:,}", note))
    return lines


def render(run: Evaluation, specs: dict[str, dict[str, Any]], library: str, gallery: int) -> str:
    """The report as HTML that needs nothing else, with the ``library`` that draws charts from their ``specs``."""
    environment = Environment(loader=PackageLoader("lightning_diffclf.results", "."), undefined=StrictUndefined)
    environment.autoescape = True
    rows = run.gallery(gallery)
    per_class = tables.classes(run.summary).to_dict("records") if run.summary.labelled else []
    return environment.get_template("report.html.j2").render(
        title=f"{run.path.resolve().parent.name}/{run.path.resolve().name}",
        headline=headline(run),
        figures=list(specs),
        specs=_safe(specs),
        library=library.replace("</script", "<\\/script"),
        classes=per_class,
        cards=[_card(run, number, row) for number, row in enumerate(rows)],
        details=_safe({number: _details(run, row) for number, row in enumerate(rows)}),
        total=run.summary.images,
        wrong=run.summary.labelled - run.summary.right,
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


def _card(run: Evaluation, number: int, row: Record) -> dict[str, Any]:
    return {
        "number": number,
        "id": row.id,
        "label": None if row.label is None else run.outline.name(row.label),
        "prediction": NO_ANSWER if row.prediction is None else run.outline.name(row.prediction),
        "right": row.label == row.prediction,
        "margin": row.margin,
        "nfe": row.nfe,
        "search_nfe": row.search_nfe or 0,
        "picture": None if row.thumbnail is None else _data_uri("webp", row.thumbnail),
    }


def _details(run: Evaluation, row: Record) -> dict[str, Any]:
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
