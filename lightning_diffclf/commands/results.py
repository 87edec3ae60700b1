"""``diffclf merge|compare|leaderboard|report``: what works on stored results, without torch.

Charts are imported by what draws: they take as long as all else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results import trials
from lightning_diffclf.results.compare import ANSWERS, compare, save_plots
from lightning_diffclf.results.compare import to_table as comparison_table
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.headline import details
from lightning_diffclf.results.parts import Seen, unseen
from lightning_diffclf.results.settings import EVALUATION, Settings
from lightning_diffclf.results.store import merge

if TYPE_CHECKING:
    from lightning_diffclf.results.leaderboard import Board


def merge_command(given: Namespace) -> None:
    """``diffclf merge``: several folders become one."""
    out, run = Path(given.out), list[Evaluation]()

    def watch() -> Seen:
        run[:] = [Evaluation(out, Settings.read(out))]
        return run[0].watch() if run[0].settings.kind == EVALUATION else unseen

    merge([Path(run) for run in given.runs], out, watch)
    settings, console = run[0].settings, Console(soft_wrap=True)
    if settings.kind != EVALUATION:
        console.print(trials.to_table(settings, trials.write_metrics(out, settings)))
        console.print(f"merged into {given.out}", markup=False, highlight=False)
        return
    table = Table(title=escape(f"merged into {given.out}"), show_header=False)
    for name, value, note in details(run[0]):
        table.add_row(name, value, note)
    console.print(table)


def compare_command(given: Namespace) -> None:
    """``diffclf compare``: prints a table and, with ``--out``, draws figures."""
    first, second = Evaluation.read(given.first, ANSWERS), Evaluation.read(given.second, ANSWERS)
    found = compare(first, second)
    Console(soft_wrap=True).print(comparison_table(found, given.first, given.second))
    if given.out is not None:
        save_plots(first, second, found, Path(given.out))
        runs = {"runs": [given.first, given.second]}
        write_json(runs | found.summary(), Path(given.out) / "comparison.json", indent=2, what="compare")


def leaderboard_command(given: Namespace) -> None:
    """``diffclf leaderboard``: prints a table and writes the page."""
    from lightning_diffclf.results.leaderboard import board, names_of

    folders = list(dict.fromkeys(given.runs))
    runs = {name: Evaluation.read(folder) for name, folder in zip(names_of(folders), folders, strict=True)}
    show_boards([board(runs, given.title)], Path(given.out))


def show_boards(boards: Sequence[Board], out: Path) -> None:
    """Print leaderboards, and write their page to a folder."""
    from lightning_diffclf.results.leaderboard import COLUMNS, cells, write_leaderboard

    console = Console(soft_wrap=True)
    for one in boards:
        table = Table(*COLUMNS, title=escape(one.title))
        for standing in one.standings:
            table.add_row(*map(escape, cells(standing)))
        console.print(table)
    console.print(escape(f"leaderboard: {', '.join(map(str, write_leaderboard(boards, out)))}"))


def report_command(given: Namespace) -> None:
    """``diffclf report``: one HTML file."""
    from lightning_diffclf.results.report import write_report

    if given.gallery < 0:
        raise UserError(f"gallery: {given.gallery}, expected 0 or more")
    print(f"report: {write_report(given.run, given.out, given.gallery)}")
