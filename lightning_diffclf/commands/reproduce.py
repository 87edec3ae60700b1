"""``diffclf reproduce``: a table of the paper, its values beside ours."""

from __future__ import annotations

from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.commands.cells import EVALUATION, folder_of, is_done, run_cell, slug
from lightning_diffclf.commands.robustness import show_robustness
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_json, write_json
from lightning_diffclf.results import charts, charts_of_runs
from lightning_diffclf.results.ablations import ablations
from lightning_diffclf.results.errors import ERRORS, StoredErrors
from lightning_diffclf.results.paper import FIGURES, LINES, TABLES, Cell, Figure, Needs


def missing(needs: tuple[Needs, ...]) -> list[Needs]:
    """What of ``needs`` is not on this machine."""
    cached: set[str] = set()
    if any(one.hub for one in needs):
        with suppress(CacheNotFound):
            cached = {repository.repo_id for repository in scan_cache_dir().repos}

    def is_there(one: Needs) -> bool:
        if one.package:
            return find_spec(one.what) is not None
        return one.what in cached if one.hub else Path(one.what).exists()

    return [one for one in needs if not is_there(one)]


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
        raise UserError(f"no table {given.table!r}, expected one of {', '.join(TABLES)}")
    figures = FIGURES.get(given.table, []) if given.errors is None else own_figures(given.table, given.errors)
    out, rows, lacking = Path(given.out), [], dict[Needs, None]()
    for cell in TABLES[given.table]:
        folder = folder_of(out, given.table, cell)
        lacks = missing(cell.needs)
        lacking |= dict.fromkeys(lacks)
        done = is_done(cell, folder)
        if not given.dry_run and not lacks and not done:
            run_cell(cell, folder, given.flags)
        rows.append(outcome(cell, folder) | ({"missing": [one.what for one in lacks]} if lacks and not done else {}))
    console, ablated = Console(soft_wrap=True), []
    if rows:
        console.print(to_table(given.table, rows))
    for figure in figures:
        lacks = missing(figure.cell.needs) if given.errors is None else []
        lacking |= dict.fromkeys(lacks)
        errors = errors_of(figure.cell, out, given, run=not given.dry_run and not lacks)
        if errors is None:
            console.print(f"{figure.cell.row}, {figure.cell.column}: {'missing' if lacks else 'not run'}")
            continue
        found = ablated_by(figure, errors, out / given.table / "figures")
        console.print(of_ablations(figure.cell, found))
        ablated += found.assign(run=figure.cell.row).to_dict("records")
    line = LINES.get(given.table)
    if line is not None:
        lacks = missing(line)
        lacking |= dict.fromkeys(lacks)
        runs = runs_in_pairs(given.table, out)
        if runs and not lacks:
            show_robustness(line.ordinary.what, line.shifted.what, runs, out / given.table / "figures", console)
    for one in lacking:
        console.print(escape(f"missing: {one.what}: {one.get}"))
    written = {"table": given.table, "cells": rows} | ({"ablations": ablated} if ablated else {})
    write_json(written, out / given.table / "reproduction.json", 2, "reproduce")


def runs_in_pairs(table: str, out: Path) -> list[str]:
    """Evaluations of the rows whose two cells are both done, one after the other."""
    cells = [(cell, folder_of(out, table, cell)) for cell in TABLES[table]]
    pairs = zip(cells[::2], cells[1::2], strict=True)
    done = [pair for pair in pairs if all(is_done(cell, folder) for cell, folder in pair)]
    return [str(folder / EVALUATION) for pair in done for _, folder in pair]


def own_figures(table: str, errors: str) -> list[Figure]:
    """The figures of a table from the errors of an evaluation of one's own.

    Raises:
        UserError: if the table has none.
    """
    shown = {name for figure in FIGURES.get(table, []) for name in figure.shown}
    if not shown:
        known = ", ".join(name for name, figures in FIGURES.items() if any(one.shown for one in figures))
        raise UserError(f"errors: {errors!r} means nothing for {table}; expected one of {known}")
    return [Figure(Cell(errors, "own", None, ()), tuple(shown))]


def errors_of(cell: Cell, out: Path, given: Namespace, run: bool) -> Path | None:
    """The file of all errors of a run, which is run where it is not there; None if it is not to be."""
    if given.errors is not None:
        return Path(given.errors) / ERRORS
    folder = folder_of(out, given.table if cell.network else "figures", cell)  # one run is there for several figures
    if not is_done(cell, folder) or not (folder / EVALUATION / ERRORS).is_file():
        if not run:
            return None
        run_cell(cell, folder, given.flags)
    return folder / EVALUATION / ERRORS


def ablated_by(figure: Figure, errors: Path, place: Path) -> pd.DataFrame:
    """The ablations of a figure from the errors of a run, and their charts.

    Returns:
        As :func:`~lightning_diffclf.results.ablations.ablations`, with ``paper``, in percent or none.

    Raises:
        UserError: if these errors do not say what the figure shows.
    """
    found = ablations(StoredErrors(errors))
    found = found[found["ablation"].isin(figure.shown or found["ablation"])]
    if found.empty:
        raise UserError(
            f"errors: {str(errors)!r} says nothing of {', '.join(figure.shown)}; expected an evaluation with "
            "--model.none_of_these true --keep-errors distances --classifier.loss l2"
        )
    charts.save(
        charts.specs(charts_of_runs.ablations(found)), place if not figure.shown else place / slug(figure.cell.row)
    )
    keys = zip(found["ablation"], found["setting"], found["x"].round(2), strict=True)
    return found.assign(paper=pd.Series([figure.paper.get(key) for key in keys], found.index, dtype=object))


def of_ablations(cell: Cell, found: pd.DataFrame) -> Table:
    """For the terminal."""
    table = Table(title=f"{cell.row}, {cell.column}: ablations, from the errors of one run")
    has_paper = bool(found["paper"].notna().any())
    for column in ("ablation", "setting", "x", "accuracy", *(["paper, read off"] if has_paper else [])):
        table.add_column(column)
    for row in found.to_dict("records"):
        share = f"{100 * row['accuracy']:.1f} ({100 * row['low']:.1f} – {100 * row['high']:.1f})"
        paper = [] if not has_paper else ["–" if pd.isna(row["paper"]) else f"{row['paper']:.0f}"]
        table.add_row(row["ablation"], row["setting"], f"{row['x']:g}", share, *paper)
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
