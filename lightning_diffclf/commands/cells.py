"""Cells of a table or a suite: evaluations in folders of their own, each computed in a process of its own."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_json, write_json
from lightning_diffclf.interruption import Left
from lightning_diffclf.results.paper import Cell
from lightning_diffclf.results.stored import files_of

EVALUATION = "evaluation"
PARTS = "part-*-of-*"  # in it: parts of its images, to be joined
CELL = "cell.json"  # beside it: what it was computed by

NOT_COMPUTED_BY = ("row", "column", "paper", "needs", "metric")  # of a cell

PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # what evaluations save themselves at


def folder_of(out: Path, table: str, cell: Cell) -> Path:
    """Where a cell's run is: ``OUT/TABLE/ROW/COLUMN``, in letters, digits and dashes."""
    return out.joinpath(*(slug(part) for part in (table, cell.row, cell.column)))


def slug(name: str) -> str:
    """A name in lower-case letters, digits and dashes.

    Example:
        >>> slug("OpenCLIP ViT-H/14")
        'openclip-vit-h-14'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commands_of(cell: Cell, folder: Path, flags: list[str]) -> list[list[str]]:
    """What computes a cell, as arguments of ``diffclf``; ``flags`` are for the evaluation."""
    commands = []
    if cell.drawing:
        commands.append(["sample", *cell.drawing, f"--out={folder / 'drawn'}"])
    if cell.training:
        training = [flag.replace("{folder}", str(folder)) for flag in cell.training]
        commands.append(["fit", *training, f"--run_dir={folder}"])
    column = slug(cell.network_of) or folder.name
    trained = folder.parent.parent / slug(cell.network) / column if cell.network else folder
    checkpoint = [f"--ckpt={trained / 'checkpoints' / 'last.ckpt'}"] if cell.training or cell.network else []
    return [*commands, ["evaluate", *checkpoint, *cell.flags, f"--out={folder / EVALUATION}", *flags]]


def is_done(cell: Cell, folder: Path) -> bool:
    """Whether a cell's evaluation has ended, by the flags that the cell has now, as far as the folder says by which.

    By others, it is computed again: the evaluation finds that its results are the same, or refuses the folder.
    """
    if not (folder / EVALUATION / "metrics.json").is_file():
        return False
    said = folder / CELL
    return not said.is_file() or read_json(said, "cell") == _said(cell)


def _said(cell: Cell) -> dict[str, Any]:
    """What computes a cell on any machine: without the flags of a command line."""
    values = {name: value for name, value in cell._asdict().items() if name not in NOT_COMPUTED_BY}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def run_cell(cell: Cell, folder: Path, flags: list[str]) -> None:
    """Compute a cell, each command in a process of its own; what was begun goes on, also in parts of its images.

    Raises:
        UserError: if a command fails.
        Left: if this process was told to end: the command was told so, and has saved what it had.
    """
    name = f"{cell.row}, {cell.column}"
    *before, evaluation = commands_of(cell, folder, flags)
    parts = [str(part) for part in sorted((folder / EVALUATION).glob(PARTS)) if files_of(part)]
    joins = [["merge", *parts, f"--out={folder / EVALUATION}"]] if parts else []
    for command in (*before, *joins, evaluation):
        run_command(command, name)
    write_json(_said(cell), folder / CELL, 2, "cell")


def run_part(cell: Cell, folder: Path, flags: list[str], number: int, count: int) -> None:
    """Evaluate one of ``count`` parts of a cell's images, beside the others; :func:`run_cell` joins them.

    Raises:
        UserError, Left: as :func:`run_cell`.
    """
    out = part_of(folder, number, count)
    if not (out / "metrics.json").is_file():
        command = ["evaluate", *cell.flags, f"--out={out}", f"--part={number}/{count}", *flags]
        run_command(command, f"{cell.row}, {cell.column}")


def part_of(folder: Path, number: int, count: int) -> Path:
    """Where a part of a cell's images is: as ``configs/slurm/evaluate_array.sbatch`` names it."""
    return folder / EVALUATION / f"part-{number}-of-{count}"


def run_command(command: list[str], name: str) -> None:
    """``diffclf COMMAND`` in a process of its own, for the cell ``name``.

    Raises:
        UserError: if it fails.
        Left: if this process was told to end, as :func:`run_cell`.
    """
    print(f"diffclf {shlex.join(command)}", flush=True)
    told: list[int] = []
    with subprocess.Popen([sys.executable, "-m", "lightning_diffclf", *command]) as process:

        def pass_on(number: int, _: Any) -> None:
            told.append(number)
            process.send_signal(number)  # a cluster tells all processes; to be told twice does no harm

        before = {number: signal.getsignal(number) for number in PASSED_ON}
        try:
            for number, handler in before.items():
                if handler != signal.SIG_IGN:  # under nohup
                    signal.signal(number, pass_on)
            status = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
    if told:
        raise Left(status if status >= 0 else 128 - status)
    if status:
        raise UserError(f"{name}: `diffclf {command[0]}` ended with status {status}")
