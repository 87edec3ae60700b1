"""How long do resume, finish, report, compare and merge take on large runs? python benchmarks/bench_load.py.

Each is a process of its own, on runs that ``load_runs.py`` makes up: 20,000 images under 1,000 candidates and 1,281,167
images of which each has 10 of 1,000 classes as candidates, in 2,000 parts as eight ranks leave them. "resume" counts
what was decided before as one rank of one, so that all of it is its own, and as one rank of eight; "finish" is what
follows the last image: one file of all parts, calibration, metrics.json and pictures. The rest are commands of
``diffclf``.

"over the imports" is what a process took on top of one that only imports what it imports: PyTorch and Lightning take
seconds and most of a gigabyte. On a machine with other work, CPU seconds say more than seconds.
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

WORK = Path(__file__).with_name("load_runs.py")

# What a process imports, by the first of its arguments
IMPORTED: dict[object, str] = {
    "-m": "lightning_diffclf.cli",
    WORK: "lightning_diffclf.callbacks.rank_evaluation",
}


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
    diffclf, resume = ["-m", "lightning_diffclf"], [WORK, "resume", a]
    yield "report", [*diffclf, "report", a]
    yield "resume", resume
    yield "resume, one rank of eight", [*resume, "--ranks", 8]
    yield "compare", [*diffclf, "compare", a, b]
    yield "merge two halves", [*diffclf, "merge", *halves, "--out", folder / "whole"]
    yield "resume and finish", [*resume, "--finish"]
    yield "report of one file", [*diffclf, "report", a]
    yield "resume from one file, one rank of eight", [*resume, "--ranks", 8]


def measure(folder: Path, images: int, candidates: int, classes: int, parts: int) -> None:
    """Print the table of one size."""
    sizes = {"--images": images, "--candidates": candidates, "--classes": classes, "--parts": parts}
    cost(WORK, "make", folder, *(value for size in sizes.items() for value in size))
    print(f"\n{images:,} images, {candidates:,} of {classes:,} candidates each, {parts:,} parts\n")
    print("| what | s | CPU, s | peak, MB | CPU s over the imports | MB over the imports |\n" + "| --- " * 6 + "|")
    imports = {module: cost("-c", f"import {module}") for module in IMPORTED.values()}
    for module, found in imports.items():
        print_row(f"import {module}", found, found)
    for what, arguments in steps(folder):
        print_row(what, cost(*arguments), imports[IMPORTED[arguments[0]]])


def print_row(what: str, found: Cost, imports: Cost) -> None:
    over = f"{found.cpu - imports.cpu:.1f} | {found.megabytes - imports.megabytes:.0f}"
    print(f"| {what} | {found.seconds:.1f} | {found.cpu:.1f} | {found.megabytes:.0f} | {over} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[20_000, 1_281_167])
    parser.add_argument("--candidates", type=int, nargs="+", default=[1000, 10])
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 1000])
    parser.add_argument("--parts", type=int, nargs="+", default=[2000, 2000])
    parser.add_argument("--folder", type=Path, help="for the runs, some 2 GB; a temporary one if omitted")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "pyarrow"))
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, {versions}")
    print(f"{os.cpu_count()} cores, on which {os.getloadavg()[0]:.0f} processes ran when it began")
    for sizes in zip(given.images, given.candidates, given.classes, given.parts, strict=True):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            measure(Path(folder), *sizes)


if __name__ == "__main__":
    main()
