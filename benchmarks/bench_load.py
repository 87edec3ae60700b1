"""How long do resume, finish, report, compare and merge take on large runs? python benchmarks/bench_load.py.

Each is a process of its own, on runs that `make_runs.py` makes up: 20,000 images under 1,000 candidates and 1,281,167
images of which each has 10 of 1,000 classes as candidates, in 2,000 parts as eight ranks leave them. "resume" counts
what was decided before as one rank of one, so that all of it is its own, and as one rank of eight; "finish" is what
follows the last image: one file of all parts, calibration, metrics.json and pictures. The rest are commands of
``diffclf``.

"over the imports" is what a process took on top of one that only imports what it imports: PyTorch and Lightning take
seconds and about a gigabyte.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

HERE = Path(__file__).parent


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    cpu: float
    megabytes: float


def cost(*arguments: object) -> Cost:
    """Of a Python process; this one imports little, because Linux counts its memory as that of its children."""
    begin = perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    return Cost(perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def steps(folder: Path) -> Iterator[tuple[str, list[object]]]:
    """What is measured, in an order in which each leaves what the next needs."""
    a, b, halves = folder / "a", folder / "b", [folder / "first", folder / "second"]
    diffclf, resume = ["-m", "lightning_diffclf"], [HERE / "resume_run.py"]
    yield "report, in parts", [*diffclf, "report", a]
    yield "compare, in parts", [*diffclf, "compare", a, b]
    yield "merge two halves", [*diffclf, "merge", *halves, "--out", folder / "whole"]
    yield "resume, in parts", [*resume, a]
    yield "resume, in parts, one rank of eight", [*resume, a, "--ranks", 8]
    yield "resume, nothing left, and finish", [*resume, a, "--finish"]
    yield "report, ended", [*diffclf, "report", a]
    yield "compare, one ended", [*diffclf, "compare", a, b]
    yield "resume, ended", [*resume, a]
    yield "resume, ended, one rank of eight", [*resume, a, "--ranks", 8]


def measure(folder: Path, images: int, candidates: int, classes: int, parts: int) -> None:
    """Print the table of one size."""
    sizes = {"--images": images, "--candidates": candidates, "--classes": classes, "--parts": parts}
    cost(HERE / "make_runs.py", folder, *(value for size in sizes.items() for value in size))
    print(f"\n{images:,} images, {candidates:,} of {classes:,} candidates each, {parts:,} parts\n")
    print("| what | s | CPU, s | peak, MB | s over the imports | MB over the imports |\n" + "| --- " * 6 + "|")
    modules = {"-m": "lightning_diffclf.cli", "resume": "lightning_diffclf.callbacks.rank_evaluation"}
    imports = {module: cost("-c", f"import {module}") for module in modules.values()}
    rows = [(f"import {module}", found, found) for module, found in imports.items()]
    for row in rows:
        print_row(*row)
    for what, arguments in steps(folder):
        print_row(what, cost(*arguments), imports[modules["-m" if arguments[0] == "-m" else "resume"]])


def print_row(what: str, found: Cost, imports: Cost) -> None:
    over = f"{found.seconds - imports.seconds:.1f} | {found.megabytes - imports.megabytes:.0f}"
    print(f"| {what} | {found.seconds:.1f} | {found.cpu:.1f} | {found.megabytes:.0f} | {over} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 1_281_167])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1000, 10])
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 1000])
    parser.add_argument("--parts", type=int, nargs="+", default=[2000, 2000])
    parser.add_argument("--folder", type=Path, help="for the runs, some 8 GB; a temporary one if omitted")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "pyarrow"))
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, {versions}")
    for sizes in zip(given.images, given.candidates, given.classes, given.parts, strict=True):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            measure(Path(folder), *sizes)


if __name__ == "__main__":
    main()
