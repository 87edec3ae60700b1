r"""Does a classifier know that none of its classes fits? python benchmarks/bench_ood.py RUNS [--draws 25].

RUNS has the networks, trained with two digits left out, three times (2 minutes each on two idle cores):

    for pair in 0,1 4,7 8,9; do
        python train.py --config dit_digits.yaml --model.num_classes null --data.left_out "[$pair]" \
            --run_dir RUNS/without_${pair/,/}
    done

The test images of the other eight digits are the known ones; foreign are the first 120 scans of the two digits, or 120
patches of the two photographs that come with scikit-learn. "None of these", the null label, is a candidate beside the
eight, which gives the error without a condition.
"""

import argparse
import tempfile
from datetime import date
from pathlib import Path

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, TensorDataset

from lightning_diffclf import DiffusionClassifierCallback
from lightning_diffclf.candidates import NONE_OF_THESE
from lightning_diffclf.cli import read_checkpoint
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.modules.checkpoints import module_of
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.ood import compare_with_foreign

FOREIGN = 120


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


def evaluate(checkpoint: Path, left_out: list[int], draws: int, folder: Path) -> dict[str, Evaluation]:
    """Runs of known images, of the digits left out, and of patches."""
    saved = read_checkpoint(str(checkpoint))
    saved["hyper_parameters"]["none_of_these"] = True
    module, data = module_of(saved, checkpoint), DigitsDataModule(left_out=left_out)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    for name in ("known", "left out", "patches"):
        out = str(folder / name)
        callback = DiffusionClassifierCallback(draws=draws, output_dir=out, keep_errors=True, error_maps=0)
        trainer = L.Trainer(callbacks=[callback], limit_predict_batches=FOREIGN // 60, **quiet)
        if name == "known":
            trainer.test(module, data, verbose=False)
        elif name == "left out":
            trainer.predict(module, data)
        else:
            trainer.predict(module, patches())
    return {name: Evaluation.read(folder / name) for name in ("known", "left out", "patches")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--draws", type=int, default=25)
    args = parser.parse_args()
    print(f"{date.today()}, {args.draws} draws\n")
    print("| left out | foreign | number | AUROC | FPR95 | AUPR |\n| --- | --- | --- | --- | --- | --- |", flush=True)
    for run in sorted(args.runs.glob("without_*")):
        digits = run.name.removeprefix("without_")
        with tempfile.TemporaryDirectory() as folder:
            runs = evaluate(run / "checkpoints" / "last.ckpt", list(map(int, digits)), args.draws, Path(folder))
            print(f"<!-- without {digits}: {runs['known'].summary.accuracy} of the known ones are right -->")
            for foreign in ("left out", "patches"):
                for name, one in compare_with_foreign(runs["known"], runs[foreign], NONE_OF_THESE).items():
                    shares = " | ".join(f"{i.value:.3f} ({i.low:.3f} – {i.high:.3f})" for i in vars(one).values())
                    print(f"| {' '.join(digits)} | {foreign} | {name} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
