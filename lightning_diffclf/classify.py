"""``diffclf classify``: photos and labels in, probabilities out."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lightning_diffclf.classifier import DiffusionClassifier, LikelihoodRatio, Recipe
from lightning_diffclf.classifier.posterior import class_differences
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.images import find_images, open_image, transform
from lightning_diffclf.data.prompts import from_names
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.pipeline import PipelineDenoiser, load

LATENT_INFLATION = 5.0  # residuals of latents are correlated; docs/elimination.md
RECIPE = Recipe(draws=100, elimination=LikelihoodRatio(inflation=LATENT_INFLATION), ensemble="mean")

AHEAD = 16  # images that are read before the first of them is decided


@dataclass(frozen=True)
class Answer:
    """What an image shows.

    Attributes:
        image: The file.
        label: The most probable label; None if the network returned nothing finite.
        probabilities: Of each label, the most probable first.
        behind: How much larger the mean error of each label is than the winner's; see docs/results.md (differences).
            None for those that a search left out.
        draws: Draws that each label saw; 0 for those.
        margin: Evidence for the label against its closest rival, in nats.
        nfe: Network calls.
        search_nfe: Those of them that a search took.
        seconds: Time since the answer before.
    """

    image: str
    label: str | None
    probabilities: dict[str, float]
    behind: dict[str, float | None]
    draws: dict[str, int]
    margin: float
    nfe: int
    search_nfe: int
    seconds: float


def classify(
    images: Sequence[str],
    labels: Sequence[str],
    model: str,
    recipe: Recipe = RECIPE,
    templates: Sequence[str] = ("a photo of a {}.",),
    revision: str | None = None,
    microbatch: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    size: int | None = None,
    skip_bad: bool = False,
) -> Iterator[Answer]:
    """Classify image files by a text-to-image model; arguments as ``diffclf classify --help`` explains them.

    Yields:
        An answer for each image, in order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if labels, files or the model are wrong: before any work, except for broken images.
    """
    prompt_set = from_names(labels, list(templates))
    files = find_images(images)
    if not skip_bad:
        for path in files:
            open_image(path)
    on = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kinds = {"auto": torch.float16 if on.type == "cuda" else torch.float32} | {
        name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
    }
    if dtype not in kinds:
        raise UserError(f"dtype: {dtype!r}, expected one of {sorted(kinds)}")
    denoiser = PipelineDenoiser(load(model, revision, kinds[dtype]), *prompt_set)
    classifier = DiffusionClassifier(denoiser, recipe, microbatch=microbatch)
    prepare = transform(*((size, size) if size else denoiser.native_size))
    names = list(labels)
    waiting: list[Path] = []
    run, start = classifier.run(), time.perf_counter()

    def answers(results: Iterator[Any]) -> Iterator[Answer]:
        nonlocal start
        for result in results:
            classes = [denoiser.candidates.classes[k] for k in result.candidates_K.tolist()]
            differences_1C = class_differences(result.differences_K[None], torch.tensor([classes]), len(names))
            p_C = recipe.posterior(differences_1C, result.dims)[0]
            order = p_C.argsort(descending=True, stable=True).tolist()
            best = {classes[i]: i for i in reversed(result.ranking)}  # the best candidate of each label
            now = time.perf_counter()
            yield Answer(
                image=str(waiting.pop(0)),
                label=None if result.label is None else names[result.label],
                probabilities={names[c]: float(p_C[c]) for c in order},
                behind={names[c]: float(result.differences_K[best[c]]) if c in best else None for c in order},
                draws={names[c]: int(result.draws_K[best[c]]) if c in best else 0 for c in order},
                margin=result.margin,
                nfe=result.nfe,
                search_nfe=result.search_nfe,
                seconds=now - start,
            )
            start = now

    for path in files:
        try:
            pixels = prepare(open_image(path))[None].to(on)
        except ValueError as error:
            if not skip_bad:
                raise
            print(f"skipped: {error}", file=sys.stderr)
            continue
        run.add(pixels, content_ids(pixels))
        waiting.append(path)
        if len(waiting) >= AHEAD:
            yield from answers(run.work())
    yield from answers(run.finish())


def show(answer: Answer, top: int, console: Console) -> None:
    """Print a table of the best labels."""
    table = Table(title=escape(answer.image), title_justify="left")
    for name in ("label", "probability", "behind", "draws"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for name, p in list(answer.probabilities.items())[:top]:
        behind = answer.behind[name]
        table.add_row(escape(name), f"{p:.1%}", "" if behind is None else f"{behind:.5f}", str(answer.draws[name]))
    search = f" ({answer.search_nfe} search)" if answer.search_nfe else ""
    table.caption = f"{answer.nfe} NFE{search}, {answer.seconds:.1f} s"
    console.print(table)


def draw(answer: Answer, top: int, folder: Path) -> Path:
    """The image with a bar for each of the best labels, as PNG in ``folder``; returns the file."""
    some = list(answer.probabilities.items())[:top][::-1]
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(open_image(answer.image))
    left.axis("off")
    right.barh([name for name, _ in some], [p for _, p in some])
    right.set(xlim=(0, 1), xlabel="probability", title=f"{answer.nfe} network calls")
    folder.mkdir(parents=True, exist_ok=True)
    path, number = folder / f"{Path(answer.image).stem}.png", 1
    while path.exists():
        number += 1
        path = folder / f"{Path(answer.image).stem}-{number}.png"
    figure.savefig(path, dpi=120)
    return path


def report(answers: Iterator[Answer], total: int, top: int, as_json: bool, plots: Path | None) -> list[Answer]:
    """Print answers as they come, with a progress bar on a terminal; JSON goes to standard output, all at the end."""
    console = Console(stderr=as_json, soft_wrap=True)
    columns = TextColumn("classifying"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    done = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("classifying", total=total)
        for answer in answers:
            done.append(answer)
            if plots is not None:
                draw(answer, top, plots)
            if not as_json:
                show(answer, top, console)
            progress.advance(task)
    if as_json:
        print(json.dumps([asdict(answer) for answer in done], indent=2))
    return done
