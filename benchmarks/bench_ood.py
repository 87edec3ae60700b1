r"""Does a classifier know that none of its classes fits? python benchmarks/bench_ood.py RUNS [--draws 25].

RUNS has the networks, trained with two digits left out, three times (2 minutes each on two idle cores):

    for pair in 0,1 4,7 8,9; do
        python train.py --config dit_digits.yaml --model.num_classes null --data.left_out "[$pair]" \
            --run_dir RUNS/without_${pair/,/}
    done

The test images of the other eight digits are the known ones; foreign are the first 120 scans of the two digits, or 120
patches of the two photographs that come with scikit-learn. "None of these", the null label, is a candidate beside the
eight, which gives the error without a condition.

`--separation 0.5` asks whether the separation loss helps: each network is trained on with it and, as the control, with
the denoising loss alone, anew for each `--seed`, until it has seen `--rows` images in training, those that classes are
compared for included: equal cost; or with `--equal steps`, for as many optimizer steps, which cost the separation loss
more. Weights are averaged, kept in RUNS, and used again. The table has the AUROC of the digits left out by both and its
paired difference, with DeLong's intervals; then, of each number, the mean difference over networks, with Student's
interval, in which networks of one split count as a group.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from bench_training_for_classification import LR, steps_of
from bench_training_for_search import fitted, row, table
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, TensorDataset

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifierCallback
from lightning_diffclf.candidates import NONE_OF_THESE
from lightning_diffclf.cli import read_checkpoint
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.modules.checkpoints import module_of
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.ood import compare_with_foreign, numbers_of, placements
from lightning_diffclf.results.statistics import Clusters

FOREIGN = 120
BATCH = 128


def patches() -> DataLoader:
    """Grey patches of photographs, 8 × 8 pixels, in [-1, 1]: every fourth pixel of 32 × 32."""
    rng, found = np.random.default_rng(0), []
    for image in load_sample_images().images:
        grey = image.mean(2) / 127.5 - 1
        for _ in range(FOREIGN // 2):
            top, left = rng.integers(grey.shape[0] - 32), rng.integers(grey.shape[1] - 32)
            found.append(grey[top : top + 32, left : left + 32].reshape(8, 4, 8, 4).mean((1, 3)))
    images = torch.tensor(np.stack(found), dtype=torch.float32)[:, None]
    return DataLoader(TensorDataset(images), batch_size=60)


def network(run: Path, settings: dict[str, Any]) -> ClassConditionalDiT:
    """The network of a run, with other settings of its training."""
    checkpoint = run / "checkpoints" / "last.ckpt"
    saved = read_checkpoint(str(checkpoint))
    saved["hyper_parameters"] |= settings | {"none_of_these": True}
    return module_of(saved, checkpoint)


def evaluate(
    module: ClassConditionalDiT, left_out: list[int], draws: int, folder: Path, names: Sequence[str]
) -> dict[str, Evaluation]:
    """Runs of ``known`` images, of the digits ``left out``, and of ``patches``."""
    data = DigitsDataModule(left_out=left_out)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for name in names:
        out = str(folder / name)
        callback = DiffusionClassifierCallback(draws=draws, output_dir=out, keep_errors=True, error_maps=0)
        trainer = L.Trainer(callbacks=[callback], limit_predict_batches=FOREIGN // 60, **quiet)
        if name == "known":
            trainer.test(module, data, verbose=False)
        elif name == "left out":
            trainer.predict(module, data)
        else:
            trainer.predict(module, patches())
    return {name: Evaluation.read(folder / name) for name in names}


def ask_separation(
    runs: Sequence[Path], weight: float, seeds: Sequence[int], rows: int, draws: int, equal: str
) -> None:
    """Print what the separation loss does to the AUROC of digits left out."""
    print(
        f"separation {weight:g}, {rows} rows in batches of {BATCH}, rate {LR:g}, equal {equal}; seeds {list(seeds)}\n"
    )
    table("left out", "seed", "steps", "known right", "number", "AUROC, control", "AUROC, separation", "difference")
    differences: dict[str, list[float]] = {}
    splits = []
    for seed in seeds:
        for run in runs:
            digits, found, steps, right = run.name.removeprefix("without_"), [], [], []
            for separation in (0.0, weight):
                settings = {"separation": separation, "seed": seed, "lr": LR, "warmup_steps": 20, "decay": "none"}
                costs = settings if equal == "rows" else settings | {"separation": weight}
                steps.append(steps_of(costs, BATCH, rows, 10 - len(digits)))
                data = DigitsDataModule(BATCH, left_out=list(map(int, digits)), seed=seed)
                name = f"separation-{separation:g}-seed-{seed}-rows-{rows}"
                module, _ = fitted(network(run, settings), data, steps[-1], seed, path_in(run, name))
                with tempfile.TemporaryDirectory() as folder:
                    stored = evaluate(module, list(map(int, digits)), draws, Path(folder), ("known", "left out"))
                    found.append(numbers_of(stored["known"], stored["left out"], NONE_OF_THESE))
                    right.append(f"{stored['known'].summary.accuracy.value:.1%}")
            splits.append(digits)
            for name in found[0][0]:
                pairs = [placements(known[name], foreign[name]) for known, foreign in found]
                means = [f"{pair[0].mean():.3f}" for pair in pairs]
                changes = [second - first for first, second in zip(*pairs, strict=True)]
                half = 1.96 * np.sqrt(sum(one.var(ddof=1) / len(one) for one in changes))
                change = changes[0].mean()
                differences.setdefault(name, []).append(change)
                cells = [f"{change:+.3f} ({change - half:+.3f} – {change + half:+.3f})"]
                row(" ".join(digits), seed, ", ".join(map(str, steps)), ", ".join(right), name, *means, *cells)
    table("number", "networks", "mean difference of AUROC")
    for name, values in differences.items():
        mean = Clusters.of(np.array(values), splits).interval()
        row(name, len(values), f"{mean.value:+.3f} ({mean.low:+.3f} – {mean.high:+.3f})")


def path_in(run: Path, name: str) -> Callable[[int], Path]:
    """Where weights after so many steps are kept."""
    return lambda step: run / f"{name}-step-{step}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--draws", type=int, default=25)
    parser.add_argument("--separation", type=float, help="weight of the separation loss: ask what it changes")
    parser.add_argument("--seed", type=int, action="append", help="of that; may be repeated (default: 0)")
    parser.add_argument("--rows", type=int, default=30_000, help="of that")
    parser.add_argument("--equal", choices=["rows", "steps"], default="rows", help="what both trainings have alike")
    args = parser.parse_args()
    runs = sorted(args.runs.glob("without_*"))
    print(f"{date.today()}, {args.draws} draws\n")
    if args.separation is not None:
        ask_separation(runs, args.separation, args.seed or [0], args.rows, args.draws, args.equal)
        return
    print("| left out | foreign | number | AUROC | FPR95 | AUPR |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for run in runs:
        digits = run.name.removeprefix("without_")
        with tempfile.TemporaryDirectory() as folder:
            names = ("known", "left out", "patches")
            stored = evaluate(network(run, {}), list(map(int, digits)), args.draws, Path(folder), names)
            print(f"<!-- without {digits}: {stored['known'].summary.accuracy} of the known ones are right -->")
            for foreign in ("left out", "patches"):
                for name, one in compare_with_foreign(stored["known"], stored[foreign], NONE_OF_THESE).items():
                    shares = " | ".join(f"{i.value:.3f} ({i.low:.3f} – {i.high:.3f})" for i in vars(one).values())
                    print(f"| {' '.join(digits)} | {foreign} | {name} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
