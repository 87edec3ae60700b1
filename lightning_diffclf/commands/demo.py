"""``diffclf demo``: from nothing to a classifier of handwritten digits."""

from __future__ import annotations

import shlex
import subprocess
import sys

from jsonargparse import Namespace


def demo_commands(run_dir: str, flags: list[str]) -> list[list[str]]:
    """What the demo runs, as arguments of ``diffclf``; ``flags`` are for training, which the evaluation takes over."""
    return [
        ["fit", "--config=dit_digits.yaml", f"--run_dir={run_dir}", *flags],
        ["evaluate", f"--ckpt={run_dir}/checkpoints/last.ckpt"],
    ]


def demo_command(given: Namespace) -> None:
    """``diffclf demo``: each command in a process of its own, as when it is typed."""
    for command in demo_commands(given.run_dir, given.flags):
        print(f"diffclf {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "lightning_diffclf", *command]).returncode
        if status:
            raise SystemExit(status)
    print(f"generated digits: {given.run_dir}/samples.png; results: {given.run_dir}/evaluation*")
    print(f"to look at them: diffclf report {shlex.quote(given.run_dir)}/evaluation")
