"""``diffclf replay|merge|compare|report``: what works on stored results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.classifier import LikelihoodRatio
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results import charts
from lightning_diffclf.results.compare import compare, save_plots
from lightning_diffclf.results.compare import to_table as comparison_table
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.replay import measure_inflation, replay, to_table, usual_rules
from lightning_diffclf.results.report import headline, write_report
from lightning_diffclf.results.robustness import Counted, read_timm, robustness
from lightning_diffclf.results.statistics import Interval
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


def robustness_command(given: Namespace) -> None:
    """``diffclf robustness``: prints a table and, with ``--out``, draws it."""
    if len(given.run) % 2:
        raise UserError(f"run: {len(given.run)} folders, expected pairs: one of ordinary data, one of shifted data")
    runs = [_counted(folder) for folder in given.run]
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    found = robustness(read_timm(given.ordinary), read_timm(given.shifted), pairs)
    table = Table(title=f"effective robustness, against {found.line.models} models; 99.5 % intervals")
    for name in ("run", "ordinary", "shifted", "expected", "effective"):
        table.add_column(name)
    for row in found.runs.to_dict("records"):
        shares = [str(Interval(*(row[f"{n}{end}"] for end in ("", "_low", "_high")))) for n in ("ordinary", "shifted")]
        effective = [f"{row[f'effective{end}']:+.2%}" for end in ("", "_low", "_high")]
        expected = f"{row['expected']:.2%}"
        table.add_row(escape(row["run"]), *shares, expected, "{} ({} – {})".format(*effective))
    Console(soft_wrap=True).print(table)
    if given.out is not None:
        x = np.linspace(found.models["ordinary"].min(), found.models["ordinary"].max(), 50).clip(1e-4, 1 - 1e-4)
        line = pd.DataFrame({"ordinary": x, "shifted": found.line.expected(x)})
        chart = charts.robustness(found.models, line, found.runs)
        charts.save(charts.specs({"robustness": chart}), Path(given.out))
        numbers = {"line": found.line._asdict(), "runs": found.runs.to_dict("records")}
        write_json(numbers, Path(given.out) / "robustness.json", indent=2, what="robustness")


def _counted(folder: str) -> Counted:
    summary = Evaluation.read(folder).summary
    if not summary.labelled:
        raise UserError(f"run: {folder!r} has no labels, expected an evaluation of labelled images")
    return Counted(folder, summary.right, summary.labelled)


def report_command(given: Namespace) -> None:
    """``diffclf report``: one HTML file."""
    if given.gallery < 0:
        raise UserError(f"gallery: {given.gallery}, expected 0 or more")
    print(f"report: {write_report(given.run, given.out, given.gallery)}")
