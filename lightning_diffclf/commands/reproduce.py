"""``diffclf reproduce``: a table of the paper, its values beside ours."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.commands.cells import EVALUATION, folder_of, is_done, run_cell
from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_json, write_json
from lightning_diffclf.results import charts, charts_of_runs
from lightning_diffclf.results.ablations import ablations
from lightning_diffclf.results.errors import ERRORS, StoredErrors
from lightning_diffclf.results.paper import ABLATED, TABLES, Cell, Needs


def missing(needs: tuple[Needs, ...]) -> list[Needs]:
    """What of ``needs`` is not on this machine."""
    cached: set[str] = set()
    if any(one.hub for one in needs):
        with suppress(CacheNotFound):
            cached = {repository.repo_id for repository in scan_cache_dir().repos}
    return [one for one in needs if not (one.what in cached if one.hub else Path(one.what).exists())]


def outcome(cell: Cell, folder: Path) -> dict[str, Any]:
    """A cell's numbers: in percent, with the verdict whether the paper's value is in our interval."""
    found: dict[str, Any] = {"row": cell.row, "column": cell.column, "paper": cell.paper}
    path = folder / EVALUATION / "metrics.json"
    if not path.is_file():
        return found
    metrics = read_json(path, "reproduce")["metrics"]
    value, low, high = (100 * metrics[f"{cell.metric}{end}"] for end in ("", "_low", "_high"))
    found |= {"ours": value, "low": low, "high": high, "images": metrics["images"]}
    found |= {"nfe_per_image": metrics["nfe_per_image"], "seconds": metrics["seconds"]}
    if cell.paper is not None:
        found["verdict"] = "inside" if low <= cell.paper <= high else "outside"
    return found


def reproduce_command(given: Namespace) -> None:
    """``diffclf reproduce``: runs what can be run, prints a table and writes it."""
    if given.table not in TABLES:
        raise UserError(unknown("table", given.table, TABLES))
    out, rows, lacking = Path(given.out), [], dict[Needs, None]()
    for cell in TABLES[given.table]:
        folder = folder_of(out, given.table, cell)
        lacks = missing(cell.needs)
        lacking |= dict.fromkeys(lacks)
        done = is_done(cell, folder)
        if not given.dry_run and not lacks and not done:
            run_cell(cell, folder, given.flags)
        rows.append(outcome(cell, folder) | ({"missing": [one.what for one in lacks]} if lacks and not done else {}))
    ablated = ablated_by(ABLATED.get(given.table), out, given)
    console = Console(soft_wrap=True)
    console.print(to_table(given.table, rows))
    if ablated is not None:
        console.print(of_ablations(ablated))
    for one in lacking:
        console.print(escape(f"missing: {one.what}: {one.get}"))
    found = {} if ablated is None else {"ablations": ablated.to_dict("records")}
    write_json({"table": given.table, "cells": rows} | found, out / given.table / "reproduction.json", 2, "reproduce")


def ablated_by(cell: Cell | None, out: Path, given: Namespace) -> pd.DataFrame | None:
    """The ablations of a table from the errors of one run, which is run where it is not there; their figures.

    Returns:
        As :func:`~lightning_diffclf.results.ablations.ablations`; None where the table has none, or nothing is run.
    """
    if cell is None:
        return None
    folder = folder_of(out, given.table, cell)
    errors = folder / EVALUATION / ERRORS
    if not errors.is_file():
        if given.dry_run:
            return None
        run_cell(cell, folder, given.flags)
    found = ablations(StoredErrors(errors))
    charts.save(charts.specs(charts_of_runs.ablations(found)), out / given.table / "figures")
    return found


def of_ablations(found: pd.DataFrame) -> Table:
    """For the terminal."""
    table = Table(title="ablations, from the errors of one run")
    for column in ("ablation", "setting", "x", "accuracy"):
        table.add_column(column)
    for row in found.to_dict("records"):
        share = f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} – {100 * row['high']:.1f})"
        table.add_row(row["ablation"], row["setting"], f"{row['x']:g}", share)
    return table


def to_table(name: str, rows: list[dict[str, Any]]) -> Table:
    """For the terminal."""
    table = Table(title=f"{name}: the paper's values, and ours with 95 % intervals")
    for column in ("system", "data", "paper", "ours", "images", "NFE", "seconds", "verdict"):
        table.add_column(column)
    for row in rows:
        paper = "–" if row["paper"] is None else f"{row['paper']:.1f}"
        if "ours" in row:
            ours = f"{row['ours']:.1f} ({row['low']:.1f} – {row['high']:.1f})"
            numbers = [ours, str(row["images"]), f"{row['nfe_per_image']:,.0f}", f"{row['seconds']:,.1f}"]
            table.add_row(row["row"], row["column"], paper, *numbers, row.get("verdict", "–"))
        else:
            table.add_row(row["row"], row["column"], paper, *["–"] * 4, "missing" if "missing" in row else "not run")
    return table
