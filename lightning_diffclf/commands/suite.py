"""``diffclf suite``: models × data sets × rules of a YAML file, evaluated one by one, and their leaderboard."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.commands.cells import EVALUATION, folder_of, is_done, run_cell, run_command, run_part, slug
from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.files import read_json, write_json
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.leaderboard import Board, board
from lightning_diffclf.results.paper import Cell

AXES = ("models", "data", "rules")
ONE_OF = {"model": "models", "data": "data", "rule": "rules"}  # in what is excluded
KEYS = (*AXES, "exclude", "flags", "out")

PLAN = "plan.json"  # in the folder of a cell

RUNS = "runs"  # in the folder of the suite: its cells


# --- the file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suite:
    """What a file asks for.

    Attributes:
        out: Folder for the runs and the leaderboard.
        cells: The evaluations, in the order of the file: models, of each the data, of each the rules. Their row is
            ``MODEL, RULE``, or the model where there is one rule, their column the data.
    """

    out: Path
    cells: list[Cell]

    @classmethod
    def read(cls, path: str | Path) -> Suite:
        """The suite of a YAML file: ``models``, ``data`` and ``rules`` map names to flags of ``diffclf evaluate``.

        ``data`` and ``rules`` may be left out; then there is one, without flags. ``flags`` are those of all cells.
        ``exclude`` lists combinations to leave out, such as ``{model: CLIP, rule: [all draws, Stages]}``.

        Raises:
            MissingFile: if there is no such file.
            UserError: if it says something else, or two names are the same in letters and digits.
        """
        path = Path(path)
        where = f"suite: {str(path)!r}"
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise MissingFile(f"suite: no file {str(path)!r}") from error
        except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
            raise UserError(f"{where} is no YAML file ({' '.join(str(error).split())[:300]})") from error
        if not isinstance(values, dict):
            raise UserError(f"{where} holds a {type(values).__name__}, expected {', '.join(KEYS)}")
        for name in values:
            if name not in KEYS:
                raise UserError(f"{where}: {unknown('setting', str(name), KEYS)} (it has: {', '.join(KEYS)})")
        axes = {axis: _axis(values.get(axis), axis, where) for axis in AXES}
        shared = _flags(values.get("flags"), "flags", where)
        excluded = _excluded(values.get("exclude"), axes, where)
        out = values.get("out", f"runs/{path.stem}")
        if not isinstance(out, str) or not out.strip():
            raise UserError(f"{where}: out: {out!r}, expected the name of a folder")
        cells = []
        for model, data, rule in product(*axes.values()):
            if not any(model in models and data in sets and rule in rules for models, sets, rules in excluded):
                flags = (shared, *(axes[axis][one] for axis, one in zip(AXES, (model, data, rule), strict=True)))
                row = model if len(axes["rules"]) == 1 else f"{model}, {rule}"
                cells.append(Cell(row, data, None, _ordered(flags)))
        if not cells:
            raise UserError(f"{where}: all combinations are excluded")
        _check_names(cells, where)
        return cls(Path(out), cells)


def _axis(given: Any, axis: str, where: str) -> dict[str, list[str]]:
    """Flags by name."""
    if given is None and axis != "models":
        return {axis: []}
    if not isinstance(given, dict) or not given or not all(isinstance(name, str) and slug(name) for name in given):
        found = "nothing" if given is None else repr(given)[:100]
        raise UserError(f"{where}: {axis}: {found}, expected names, of each the flags: {{name: {{config: x.yaml}}}}")
    return {name: _flags(flags, f"{axis}: {name}", where) for name, flags in given.items()}


def _flags(given: Any, what: str, where: str) -> list[str]:
    """``{classifier.draws: 50}`` as ``--classifier.draws=50``; a list is given once for each of its members."""
    if given is None:
        return []
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise UserError(f"{where}: {what}: {repr(given)[:100]}, expected flags by name, such as classifier.draws: 50")
    flags = []
    for name, value in given.items():
        if name in ("out", "part", "plan", "keep_errors"):
            hint = "keep-errors: true" if name == "keep_errors" else "nothing: the suite gives it"
            raise UserError(f"{where}: {what}: {name} is no flag of a cell, expected {hint}")
        several = isinstance(value, list) and name in ("config", "c")
        flags += [_flag(name, one) for one in (value if several else [value])]
    return [one for one in flags if one]


SWITCHES = ("keep-errors", "untrained", "trust-checkpoint")  # flags of `diffclf evaluate` that take no value


def _flag(name: str, value: Any) -> str:
    if name in SWITCHES and isinstance(value, bool):
        return f"--{name}" if value else ""
    return f"--{name}={value if isinstance(value, str) else json.dumps(value)}"


def _ordered(flags: Sequence[list[str]]) -> tuple[str, ...]:
    """Those of all, of models, data and rules: configurations first, and what comes later overrides."""
    every = [one for some in flags for one in some]
    return tuple(sorted(every, key=lambda one: not one.startswith(("--config=", "-c="))))  # stable


def _excluded(given: Any, axes: Mapping[str, Mapping[str, Any]], where: str) -> list[tuple[set[str], ...]]:
    """Combinations to leave out: names of models, data and rules, all where one says nothing."""
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, dict) and one for one in given):
        raise UserError(
            f"{where}: exclude: {repr(given)[:100]}, expected a list such as [{{model: CLIP, rule: Stages}}]"
        )
    found = []
    for one in given:
        for key in one:
            if key not in ONE_OF:
                raise UserError(f"{where}: exclude: {unknown('axis', str(key), ONE_OF)} (it has: {', '.join(ONE_OF)})")
        sets = []
        for key, axis in ONE_OF.items():
            named = one.get(key, list(axes[axis]))
            for name in named if isinstance(named, list) else [named]:
                if name not in axes[axis]:
                    raise UserError(f"{where}: exclude: {unknown(key, str(name), axes[axis])}")
            sets.append(set(named if isinstance(named, list) else [named]))
        found.append(tuple(sets))
    return found


def _check_names(cells: Sequence[Cell], where: str) -> None:
    seen: dict[Path, Cell] = {}
    for cell in cells:
        other = seen.setdefault(folder_of(Path(), RUNS, cell), cell)
        if other is not cell:
            raise UserError(
                f"{where}: {name_of(other)!r} and {name_of(cell)!r} would have the same folder, expected names that "
                "differ in letters or digits"
            )


def name_of(cell: Cell) -> str:
    """What a cell is called."""
    return f"{cell.row}, {cell.column}"


# --- parts -----------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """The images of a cell, or one of ``parts`` parts of them."""

    cell: str
    number: int = 1
    parts: int = 1


T = TypeVar("T", str, Piece)

FEWEST = 20  # images of a piece, about: parts are made by a hash of ids, and none may be empty


def pieces(plans: Mapping[str, Mapping[str, Any]], parts: int) -> dict[Piece, float]:
    """Cells with their planned network calls; those above half of a part's share in pieces that are not.

    Example:
        >>> pieces({"a": {"nfe": 90, "images": 500}, "b": {"nfe": 10, "images": 500}}, 2)
        {Piece(cell='a', number=1, parts=4): 22.5, ..., Piece(cell='b', number=1, parts=1): 10.0}
    """
    most = sum(plan["nfe"] for plan in plans.values()) / parts / 2
    found: dict[Piece, float] = {}
    for name, plan in plans.items():
        wanted = math.ceil(plan["nfe"] / most) if most and parts > 1 else 1
        count = max(1, min(wanted, plan["images"] // FEWEST))
        found |= {Piece(name, number, count): plan["nfe"] / count for number in range(1, count + 1)}
    return found


def divided(costs: Mapping[T, float], parts: int) -> list[list[T]]:
    """Names or pieces in ``parts`` lists of about equal cost: the dearest first, each where least is yet.

    No list costs more than 4/3 of the best division's dearest (Graham 1969). It depends on names and costs only.

    Example:
        >>> divided({"a": 5, "b": 3, "c": 3, "d": 1}, 2)
        [['a', 'd'], ['b', 'c']]
    """
    lists: list[list[T]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for name in sorted(costs, key=lambda one: (-costs[one], one)):
        least = min(range(parts), key=lambda i: (sums[i], len(lists[i]), i))
        lists[least].append(name)
        sums[least] += costs[name]
    return lists


def _part(suite: Suite, text: str, file: str) -> list[Piece]:
    """The pieces of one part."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"part: {text!r}, expected i/n with i in 1 … n, such as 3/8")
    plans = {}
    for cell in suite.cells:
        plan = planned(suite, cell)
        if plan is None:
            command = shlex.join(["diffclf", "suite", file, "--plan"])
            raise UserError(f"part: {name_of(cell)} has no plan, by which cells are divided; first run `{command}`")
        if plan["nfe"] is None:
            raise UserError(
                f"part: {name_of(cell)}: nobody knows how many images it has (tar shards, for one), so cells cannot be "
                "divided by cost; run the suite whole, or its cells as arrays of `diffclf evaluate --part`"
            )
        plans[name_of(cell)] = plan
    return divided(pieces(plans, int(count)), int(count))[int(number) - 1]


# --- plans -----------------------------------------------------------------------------------------------------------


def planned(suite: Suite, cell: Cell) -> dict[str, Any] | None:
    """What a cell will cost, as planned with the flags that it has now; None if it was not."""
    path = folder_of(suite.out, RUNS, cell) / PLAN
    if not path.is_file():
        return None
    found = read_json(path, "plan")
    return found["plan"] if found["flags"] == list(cell.flags) else None


def _measure(suite: Suite, cell: Cell, flags: list[str]) -> None:
    """Plan a cell, in a process of its own, and keep the plan in its folder."""
    folder = folder_of(suite.out, RUNS, cell)
    file = folder / f"{PLAN}.new"
    run_command(["evaluate", *cell.flags, *flags, "--plan", f"--classifier.plan_file={file}"], name_of(cell))
    write_json({"flags": list(cell.flags), "plan": read_json(file, "plan")}, folder / PLAN, 2, "plan")
    file.unlink()


# --- the command -----------------------------------------------------------------------------------------------------


def suite_command(given: Namespace) -> None:
    """``diffclf suite``."""
    suite = Suite.read(given.file)
    if given.out is not None:
        suite = Suite(Path(given.out), suite.cells)
    mine = [Piece(name_of(cell)) for cell in suite.cells]
    if given.part is not None:
        mine = _part(suite, given.part, given.file)
    cells = {name_of(cell): cell for cell in suite.cells}
    left = [piece for piece in mine if not _ended(suite, cells[piece.cell])]
    if given.plan:
        left = [piece for piece in mine if planned(suite, cells[piece.cell]) is None]
    work = {name: cells[name] for name in dict.fromkeys(piece.cell for piece in left)}
    failed: dict[str, str] = {}
    if not given.dry_run:
        _check(list(work.values()), given.flags)
        failed = _each(suite, [(cells[piece.cell], piece) for piece in left], given.flags, plans=given.plan)
    shown = [cells[name] for name in dict.fromkeys(piece.cell for piece in mine)]
    Console(soft_wrap=True).print(to_table(suite, shown, failed))
    if not (given.dry_run or given.plan or given.part):
        from lightning_diffclf.commands.results import show_boards

        boards = list(_boards(suite))
        if boards:
            show_boards(boards, suite.out)
    if failed:
        raise UserError("suite: " + "; ".join(failed.values()))


def _each(suite: Suite, work: Sequence[tuple[Cell, Piece]], flags: list[str], plans: bool) -> dict[str, str]:
    """Compute or plan cells; returns what went wrong, by name. One that fails does not stop the others."""
    failed = {}
    for cell, piece in work:
        folder = folder_of(suite.out, RUNS, cell)
        try:
            if plans:
                _measure(suite, cell, flags)
            elif piece.parts > 1:
                run_part(cell, folder, flags, piece.number, piece.parts)
            else:
                run_cell(cell, folder, flags)
        except UserError as error:
            failed[name_of(cell)] = str(error)
    return failed


def _check(cells: Sequence[Cell], flags: list[str]) -> None:
    """Raise UserError if the flags of a cell are not understood: before the first is computed, not hours later."""
    if not cells:
        return
    from lightning_diffclf.commands.arguments import evaluate
    from lightning_diffclf.commands.evaluate import check_evaluation  # takes seconds to import

    for cell in cells:
        try:
            check_evaluation(evaluate([*cell.flags, *flags]))
        except SystemExit as error:  # the parser has printed what is wrong
            raise UserError(f"suite: {name_of(cell)} cannot be evaluated, as said above") from error
        except UserError as error:
            raise UserError(f"suite: {name_of(cell)}: {error}") from error


def _boards(suite: Suite) -> Iterator[Board]:
    """A leaderboard for each data set, of the cells that are done."""
    for data in dict.fromkeys(cell.column for cell in suite.cells):
        title = "" if data == "data" else data  # the file says of no data
        folders = {c.row: folder_of(suite.out, RUNS, c) for c in suite.cells if c.column == data and _ended(suite, c)}
        if folders:
            yield board({row: Evaluation.read(folder / EVALUATION) for row, folder in folders.items()}, title)


def _ended(suite: Suite, cell: Cell) -> bool:
    return is_done(cell, folder_of(suite.out, RUNS, cell))


SHOWN = {"nfe_per_image": ",.1f", "nfe": ",.0f", "hours": ",.3g"}  # of a plan


def to_table(suite: Suite, cells: Sequence[Cell], failed: Mapping[str, str]) -> Table:
    """What there is of each cell, for the terminal."""
    table = Table(title=escape(str(suite.out)))
    for column in ("run", "data", "state", "images", "NFE / image", "NFE", "hours"):
        table.add_column(column)
    total = {"nfe": 0.0, "hours": 0.0}
    for cell in cells:
        folder, plan = folder_of(suite.out, RUNS, cell), planned(suite, cell)
        begun = (folder / EVALUATION).is_dir()
        state = "failed" if name_of(cell) in failed else "begun" if begun else "to do"
        numbers = ["–"] * 4
        if plan is not None:
            numbers = [
                _shown(plan["images"], ",d"),
                *(_shown(plan[n], how) for n, how in SHOWN.items()),
            ]
            total = {name: value + (plan[name] or 0) for name, value in total.items()}
        table.add_row(escape(cell.row), escape(cell.column), "done" if is_done(cell, folder) else state, *numbers)
    if total["nfe"]:
        table.add_row(
            "all that are planned", "", "", "", "", *(format(value, SHOWN[name]) for name, value in total.items())
        )
    return table


def _shown(value: float | None, how: str) -> str:
    return "unknown" if value is None else format(value, how)
