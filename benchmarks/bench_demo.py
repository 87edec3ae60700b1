"""The demo's two commands, timed: python benchmarks/bench_demo.py. Trains into a temporary folder."""

import json
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - start


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def main() -> None:
    print(f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    row("command", "seconds", "accuracy", "mean per class", "NFE / image", "images / s")
    row(*["---"] * 6)
    stages = ["Stages", "--classifier.elimination.samples=[10,100]", "--classifier.elimination.keep=[5,1]"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        row("train.py", seconds("train.py", "--config=dit_digits.yaml", f"--run_dir={run}"), *[""] * 4)
        for name, flags in (
            ("evaluate.py, all 100 draws", []),
            ("evaluate.py, Stages (10, 100), keep (5, 1)", ["--classifier.elimination", *stages]),
        ):
            out = f"{folder}/{len(flags)}"
            took = seconds("evaluate.py", f"--ckpt={run}/checkpoints/last.ckpt", f"--out={out}", *flags)
            m = json.loads((Path(out) / "metrics.json").read_text())["metrics"]
            row(name, took, m["accuracy"], m["mean_per_class"], m["nfe_per_image"], m["images_per_second"])


if __name__ == "__main__":
    main()
