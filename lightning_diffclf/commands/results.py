"""``diffclf replay|merge|compare|ood|report``: what works on stored results."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.classifier import LikelihoodRatio
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results import ood
from lightning_diffclf.results.compare import compare, save_plots
from lightning_diffclf.results.compare import to_table as comparison_table
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.replay import measure_inflation, replay, to_table, usual_rules
from lightning_diffclf.results.report import headline, write_report
from lightning_diffclf.results.store import merge


def replay_command(given: Namespace) -> None:
    """``diffclf replay``: prints a table, and writes it to ``--out``."""
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


def merge_command(given: Namespace) -> None:
    """``diffclf merge``: several folders become one."""
    merge([Path(run) for run in given.runs], Path(given.out))
    run = Evaluation.read(given.out)
    table = Table(title=escape(f"merged into {given.out}"), show_header=False)
    for name, value, note in headline(run):
        table.add_row(name, value, note)
    Console(soft_wrap=True).print(table)


def compare_command(given: Namespace) -> None:
    """``diffclf compare``: prints a table and, with ``--out``, draws figures."""
    first, second = Evaluation.read(given.first), Evaluation.read(given.second)
    found = compare(first, second)
    Console(soft_wrap=True).print(comparison_table(found, given.first, given.second))
    if given.out is not None:
        save_plots(first, second, found, Path(given.out))
        runs = {"runs": [given.first, given.second]}
        write_json(runs | found.summary(), Path(given.out) / "comparison.json", indent=2, what="compare")


def ood_command(given: Namespace) -> None:
    """``diffclf ood``: prints a table, and writes it to ``--out``."""
    known, foreign = Evaluation.read(given.known), Evaluation.read(given.foreign)
    found = ood.compare_with_foreign(known, foreign, given.unconditional)
    Console(soft_wrap=True).print(ood.to_table(found, known.images, foreign.images))
    if given.out is not None:
        runs = {"known": given.known, "foreign": given.foreign}
        write_json(runs | {"scores": ood.to_dict(found)}, given.out, indent=2, what="ood")


def report_command(given: Namespace) -> None:
    """``diffclf report``: one HTML file."""
    if given.gallery < 0:
        raise UserError(f"gallery: {given.gallery}, expected 0 or more")
    print(f"report: {write_report(given.run, given.out, given.gallery)}")
