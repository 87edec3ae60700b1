"""Kill evaluations at random moments, then let one end: evaluate_killed.py IMAGES KILLS FLUSH_EVERY FOLDER.

Forks, so that imports are paid once. Writes how many images were finished after each kill to left.json.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning as L

from lightning_diffclf import DiffusionClassifierCallback, LikelihoodRatio
from lightning_diffclf.files import LOCK
from lightning_diffclf.results.stored import read_table
from tests.gaussians import Gaussians, loader


class Slow(Gaussians):
    seconds = 0.0

    def predict(self, x_t, t, candidate):
        time.sleep(self.seconds)
        return super().predict(x_t, t, candidate)


def evaluate(out: Path, devices: int, seconds: float) -> None:
    callback = DiffusionClassifierCallback(
        draws=12,
        microbatch=16,
        elimination=LikelihoodRatio(0.2),
        output_dir=str(out),
        flush_every=FLUSH_EVERY,
        keep_errors=True,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp_fork" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    module = Slow()
    module.seconds = seconds
    trainer.test(module, loader(IMAGES, batch_size=2), verbose=False)


def fork(out: Path, devices: int, seconds: float) -> int:
    child = os.fork()
    if child == 0:
        os.setsid()  # so that all its processes can be killed together
        try:
            evaluate(out, devices, seconds)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def holder(out: Path) -> str:
    """Which process writes to the folder, or was killed while it did."""
    return (out / LOCK).read_text() if (out / LOCK).is_file() else ""


if __name__ == "__main__":
    IMAGES, KILLS, FLUSH_EVERY, folder = *map(int, sys.argv[1:4]), Path(sys.argv[4])
    out, rng, left = folder / "killed", random.Random(0), []
    for number in range(KILLS):
        before = holder(out)
        child = fork(out, 1 + number % 2, seconds=0.03)
        while holder(out) in ("", before):  # it has begun, however long that took
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 1.2))
        assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended before kill {number}: take more images"
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left.append(read_table(out).num_rows)  # readable after each
    (folder / "left.json").write_text(json.dumps(left))
    for run in (out, folder / "undisturbed"):
        _, status = os.waitpid(fork(run, 2 if run == out else 1, seconds=0), 0)
        assert status == 0, status
