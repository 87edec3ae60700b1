"""``diffclf demo``: from nothing to a classifier of handwritten digits, and what dropping candidates early saves."""

from __future__ import annotations

import shlex
import subprocess
import sys

from jsonargparse import Namespace


def demo_commands(run_dir: str, flags: list[str]) -> list[list[str]]:
    """What the demo runs, as arguments of ``diffclf``; ``flags`` are for training, which the evaluations take over."""
    ckpt, everything, flagship = f"{run_dir}/checkpoints/last.ckpt", f"{run_dir}/all_draws", f"{run_dir}/evaluation"
    return [
        ["fit", "--config=dit_digits.yaml", f"--run_dir={run_dir}", *flags],
        ["evaluate", f"--ckpt={ckpt}", f"--out={everything}"],
        ["evaluate", f"--ckpt={ckpt}", f"--out={flagship}", "--classifier.elimination=LikelihoodRatio"],
        ["compare", flagship, everything],
        ["report", flagship],
    ]


def demo_command(given: Namespace) -> None:
    """``diffclf demo``: each command in a process of its own, as when it is typed."""
    for command in demo_commands(given.run_dir, given.flags):
        print(f"\n$ diffclf {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "lightning_diffclf", *command]).returncode
        if status:
            raise SystemExit(status)
    run_dir = shlex.quote(given.run_dir)
    print(f"""
What next:
  look at every decision    open {run_dir}/evaluation/report.html in a browser
  your own images           diffclf fit --config images.yaml --data.root FOLDER    (a sub-folder for each class)
  photos, without training  diffclf classify PHOTO.jpg --labels "cat,dog,horse"    (downloads Stable Diffusion)""")
