"""``diffclf replay|merge|compare|report``: what works on stored results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.classifier import Elimination, LikelihoodRatio
from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results.compare import compare, save_plots
from lightning_diffclf.results.compare import to_table as comparison_table
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.replay import measure_inflation, replay, to_table, usual_rules
from lightning_diffclf.results.report import headline, write_report
from lightning_diffclf.results.store import merge


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
        write_json(numbers | {"replays": [one.summary() for one in replays]}, given.out, indent=2, what="replay")


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
    run = Evaluation.read(given.out)
    table = Table(title=escape(f"merged into {given.out}"), show_header=False)
    for name, value, note in headline(run):
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
    first, second = Evaluation.read(given.first), Evaluation.read(given.second)
    found = compare(first, second)
    Console(soft_wrap=True).print(comparison_table(found, given.first, given.second))
    if given.out is not None:
        save_plots(first, second, found, Path(given.out))
        runs = {"runs": [given.first, given.second]}
        write_json(runs | found.summary(), Path(given.out) / "comparison.json", indent=2, what="compare")


def report_command(args: Sequence[str]) -> None:
    """``diffclf report``: one HTML file."""
    parser = Parser(
        prog="diffclf report",
        description="One HTML file that shows an evaluation (also one that is still running), and its figures as PNG "
        "and SVG. Needs no network, neither to make nor to open.",
    )
    parser.add_argument("run", type=str, help="folder of an evaluation")
    parser.add_argument("--out", type=str | None, default=None, help="the file (default: report.html in the folder)")
    parser.add_argument("--gallery", type=int, default=240, help="images to show at most")
    given = parser.parse_args(list(args))
    if given.gallery < 0:
        raise UserError(f"gallery: {given.gallery}, expected 0 or more")
    print(f"report: {write_report(given.run, given.out, given.gallery)}")
