"""``diffclf robustness``: runs against a line through the accuracies of ordinary classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results import charts, charts_of_runs
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.robustness import Counted, read_timm, robustness
from lightning_diffclf.results.statistics import Interval


def robustness_command(given: Namespace) -> None:
    """``diffclf robustness``: prints a table and, with ``--out``, draws it."""
    if len(given.run) % 2:
        raise UserError(f"run: {len(given.run)} folders, expected pairs: one of ordinary data, one of shifted data")
    out = None if given.out is None else Path(given.out)
    show_robustness(given.ordinary, given.shifted, given.run, out, Console(soft_wrap=True))


def show_robustness(ordinary: str, shifted: str, folders: Sequence[str], out: Path | None, console: Console) -> None:
    """Print a table and, with ``out``, draw it there.

    Args:
        ordinary: CSV of timm's results on ordinary data.
        shifted: CSV of its results on shifted data.
        folders: Evaluations, in turn of ordinary and of shifted data.
        out: Folder of the figure and its numbers.
        console: Where the table goes.
    """
    runs = [_counted(folder) for folder in folders]
    pairs = list(zip(runs[::2], runs[1::2], strict=True))
    found = robustness(read_timm(ordinary), read_timm(shifted), pairs)
    table = Table(title=f"effective robustness, against {found.line.models} models; 99.5 % intervals")
    for name in ("run", "ordinary", "shifted", "expected", "effective"):
        table.add_column(name)
    for row in found.runs.to_dict("records"):
        shares = [str(Interval(*(row[f"{n}{end}"] for end in ("", "_low", "_high")))) for n in ("ordinary", "shifted")]
        effective = [f"{row[f'effective{end}']:+.2%}" for end in ("", "_low", "_high")]
        expected = f"{row['expected']:.2%}"
        table.add_row(escape(row["run"]), *shares, expected, "{} ({} – {})".format(*effective))
    console.print(table)
    if out is not None:
        x = np.linspace(found.models["ordinary"].min(), found.models["ordinary"].max(), 50).clip(1e-4, 1 - 1e-4)
        line = pd.DataFrame({"ordinary": x, "shifted": found.line.expected(x)})
        chart = charts_of_runs.robustness(found.models, line, found.runs)
        charts.save(charts.specs({"robustness": chart}), out)
        numbers = {"line": found.line._asdict(), "runs": found.runs.to_dict("records")}
        write_json(numbers, out / "robustness.json", indent=2, what="robustness")


def _counted(folder: str) -> Counted:
    summary = Evaluation.read(folder).summary
    if not summary.labelled:
        raise UserError(f"run: {folder!r} has no labels, expected an evaluation of labelled images")
    return Counted(folder, summary.right, summary.labelled)
