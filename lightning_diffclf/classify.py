"""``diffclf classify``: photos and labels in, probabilities out."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning import LightningModule
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lightning_diffclf.callbacks.run_settings import module_identity
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.images import find_images, open_image
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import identity_of
from lightning_diffclf.progress import described, listening
from lightning_diffclf.results.conformal import CalibrationRun
from lightning_diffclf.zero_shot import ZeroShotClassifier


@dataclass(frozen=True)
class Answer:
    """What an image shows.

    Attributes:
        image: The file.
        prediction: The label decided for; None if the network returned nothing finite.
        probabilities: Of each label, the most probable first.
        behind: How much larger the mean error of each label is than the winner's; see docs/results.md (differences).
            None for those that a search left out.
        draws: Draws that each label saw; 0 for those.
        margin: Evidence for it against its closest rival, in nats.
        nfe: Network calls.
        search_nfe: Those of them that a search took.
        seconds: Time since the answer before.
        conforming: Labels in its conformal set, the likeliest first; None where no coverage was asked for.
    """

    image: str
    prediction: str | None
    probabilities: dict[str, float]
    behind: dict[str, float | None]
    draws: dict[str, int]
    margin: float
    nfe: int
    search_nfe: int
    seconds: float
    conforming: list[str] | None = None


def classify(
    images: Sequence[str],
    load: Callable[[], ZeroShotClassifier],
    skip_bad: bool = False,
    calibration: CalibrationRun | None = None,
) -> Iterator[Answer]:
    """Classify image files.

    Args:
        images: Files, folders or patterns.
        load: Makes the classifier, once the files have been looked at.
        skip_bad: Go on where an image cannot be read.
        calibration: What conformal sets are calibrated on, where the recipe asks for them.

    Yields:
        An answer for each image, in order.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if files, or what the classifier is made of, are wrong: before any work, except for broken images.
    """
    files = find_images(images)
    if not skip_bad:
        for path in files:
            open_image(path)
    zero_shot, calibrated = load(), calibration
    if calibrated is not None:
        c, known = zero_shot.classifier, calibrated.settings.identity
        if isinstance(c.denoiser, LightningModule):  # that was evaluated, as it is
            module = module_identity(c.denoiser)
        else:
            module = known.get("module", {}) | {"denoiser": identity_of(c.denoiser)}
        recipe_used = identity_of(c.recipe.resolved(c.draws, c.rule))
        if len(set(c.denoiser.candidates.classes)) == len(c.denoiser.candidates):  # then an ensemble is of one
            recipe_used["ensemble"] = known.get("recipe", {}).get("ensemble")
        calibrated.check(known | {"recipe": recipe_used, "module": module})
    waiting: deque[Path] = deque()

    def pixels() -> Iterator[Tensor]:
        for path in files:
            try:
                found = zero_shot.pixels(path)
            except ValueError as error:
                if not skip_bad:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                continue
            if calibrated is not None:
                calibrated.check_ids(content_ids(found[None]))
            waiting.append(path)
            yield found

    start = time.perf_counter()
    asked = zero_shot.classifier.denoiser.candidates
    names, classes = asked.class_names, asked.classes
    some = zero_shot.classifier.recipe.candidates or range(len(classes))
    labels = list(dict.fromkeys(names[classes[c]] for c in some))
    for result in zero_shot.run(pixels()):
        best: dict[str, int] = {}  # of the candidates of each label
        for i in result.ranking:
            best.setdefault(names[classes[int(result.candidates_K[i])]], i)
        probabilities = dict(result.top(len(labels)))
        probabilities |= {label: 0.0 for label in labels if label not in probabilities}  # which a search left out
        now = time.perf_counter()
        yield Answer(
            image=str(waiting.popleft()),
            prediction=None if result.prediction is None else names[result.prediction],
            probabilities=probabilities,
            behind={one: float(result.differences_K[best[one]]) if one in best else None for one in probabilities},
            draws={one: int(result.draws_K[best[one]]) if one in best else 0 for one in probabilities},
            margin=result.margin,
            nfe=result.nfe,
            search_nfe=result.search_nfe,
            seconds=now - start,
            conforming=None if calibrated is None else result.conforming(calibrated.conformal),
        )
        start = now


def calibrated_by(recipe: Recipe, calibration: str | None) -> CalibrationRun | None:
    """The run that conformal sets are calibrated on; None where the recipe asks for none.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it cannot be used, or none is given.
    """
    if recipe.coverage is None:
        return None
    if calibration is None:
        raise UserError(
            "coverage: nothing to calibrate on, expected --calibration RUN: an evaluation of labelled images by the "
            "same network, labels, prompts and recipe"
        )
    return CalibrationRun.read(calibration, recipe.coverage, recipe.coverage_by_class)


def show(answer: Answer, top: int, console: Console) -> None:
    """Print a table of the best labels."""
    table = Table(title=escape(answer.image), title_justify="left")
    for name in ("label", "probability", "behind", "draws"):
        table.add_column(name, justify="left" if name == "label" else "right")
    for name, p in list(answer.probabilities.items())[:top]:
        behind = answer.behind[name]
        table.add_row(escape(name), f"{p:.1%}", "" if behind is None else f"{behind:.5f}", str(answer.draws[name]))
    if answer.conforming is not None:
        table.title = f"{table.title}: {{{escape(', '.join(answer.conforming))}}}"
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
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    times = TimeElapsedColumn(), TimeRemainingColumn()
    done: list[Answer] = []
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("classifying", total=total)
        said = set()

        def show_stage(what: str, part: int, whole: int | None) -> None:
            progress.update(task, description=described(what, part, whole))
            if what not in said and not console.is_terminal:
                print(described(what, 0, whole), file=sys.stderr, flush=True)
            said.add(what)

        with listening(show_stage):
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
