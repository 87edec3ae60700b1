"""Make what bench_elimination.py replays: python benchmarks/make_errors.py [--task digits] (pairs: 15 minutes).

Takes the averaged weights that `python train.py --config dit_digits.yaml` and so on leave in runs/, rounds them to
float16, and evaluates every candidate of the test images at every draw. benchmarks/data/ then has, for each task,
TASK.safetensors (the rounded weights; the captions' are in assets/) and TASK.npz (errors, labels and timesteps).
"""

import argparse

import numpy as np
import torch
from safetensors.torch import save_file
from tasks import DATA, TASKS, Task, compress

from lightning_diffclf import DiffusionClassifier, Draws
from lightning_diffclf.cli import read_checkpoint


def make(task: Task) -> None:
    DATA.mkdir(exist_ok=True)
    if not task.pipeline:
        weights = read_checkpoint(f"runs/dit_{task.name}/checkpoints/last.ckpt")["state_dict"]
        half = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        save_file(half, DATA / f"{task.name}.safetensors")
    images, labels, ids = task.test()
    classifier = DiffusionClassifier(task.network(), Draws(task.draws), keep_errors=True, microbatch=256)
    errors: list[np.ndarray] = []
    run = classifier.run()
    for first in range(0, task.exhaustive, 4):  # some at a time: all noise of all images is gigabytes
        part = slice(first, min(first + 4, task.exhaustive))
        run.add(images[part], ids[part])
        for result in run.work():
            errors.append(result.errors_KS.numpy())
            print(f"\r{task.name}: {len(errors)} of {task.exhaustive} images", end="", flush=True)
    errors += [result.errors_KS.numpy() for result in run.finish()]
    errors_BKS, truth = np.stack(errors), labels[: task.exhaustive].numpy()
    np.savez_compressed(
        DATA / f"{task.name}.npz", **compress(errors_BKS), labels=truth, timesteps=classifier.timesteps_S.numpy()
    )
    winner = errors_BKS.astype(np.float64).mean(2).argmin(1)
    kept = task.errors()[0].mean(2).argmin(1)
    size = sum(file.stat().st_size for file in DATA.glob(f"{task.name}.*"))
    print(f": accuracy {(winner == truth).mean():.4f}, decisions kept {(winner == kept).mean():.4f}, {size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (default: all)")
    for name in parser.parse_args().task or TASKS:
        make(TASKS[name])


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
