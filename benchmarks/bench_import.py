"""CPU seconds of imports and help, beside `import torch` in the same rounds: python benchmarks/bench_import.py."""

import os
import platform
import statistics
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from lightning_diffclf.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3
TORCH = "import torch"
IMPORTS = (
    "pass",
    TORCH,
    "import lightning_diffclf",
    "import lightning_diffclf.classifier, lightning_diffclf.models.dit",
    "from lightning_diffclf import DiffusionClassifier, Draws, LikelihoodRatio, NoiseSchedule",
    "from lightning_diffclf import DiT",
    "from lightning_diffclf import *",
)


def cpu_seconds(*args: str) -> float:
    """User and system time of a Python process."""
    before = os.times()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *args], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def main() -> None:
    helps = ["", *(name for name, command in COMMANDS.items() if command.module is not None), "fit"]
    asked = {f"`{code}`": ("-c", code) for code in IMPORTS}
    asked |= {
        f"`diffclf {name}{' ' * bool(name)}--help`": ("-m", "lightning_diffclf", *name.split(), "--help")
        for name in helps
    }
    took: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(ROUNDS):
        for name, args in asked.items():
            took[name].append(cpu_seconds(*args))
    torch = statistics.median(took[f"`{TORCH}`"])
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, torch {version('torch')}.")
    print(f"Medians of {ROUNDS} rounds, each of all rows.\n")
    print("| what | CPU seconds | of `import torch` |\n| --- | --- | --- |")
    for name, seconds in took.items():
        median = statistics.median(seconds)
        print(f"| {name} | {median:.2f} | {median / torch:.2f} |")


if __name__ == "__main__":
    main()
