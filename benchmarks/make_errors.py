"""Make what bench_elimination.py replays: python benchmarks/make_errors.py [--task digits] (pairs: 15 minutes).

Takes the averaged weights that `python train.py --config dit_digits.yaml` and `--config dit_digit_pairs.yaml` leave in
runs/, rounds them to float16, and evaluates every candidate of every test image at every draw. benchmarks/data/ then
has, for each task, TASK.safetensors (the rounded weights) and TASK.npz (errors, labels and timesteps).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws
from lightning_diffclf.cli import read_checkpoint
from lightning_diffclf.commands.configs import CONFIGS
from lightning_diffclf.data.digits import DigitPairsDataModule, DigitsDataModule

DATA = Path(__file__).parent / "data"
TASKS = {"digits": (DigitsDataModule, 100), "digit_pairs": (DigitPairsDataModule, 64)}


def compress(errors_BKS: np.ndarray) -> dict[str, np.ndarray]:
    """One byte for an error: 255 · sqrt((e - least) / range) of each (image, draw). Close calls keep their digits.

    What matters is which candidates are best and by how much; the errors of hopeless ones may be off by a percent.
    """
    least_BS, range_BS = errors_BKS.min(1), np.ptp(errors_BKS, 1)
    codes = np.rint(255 * np.sqrt((errors_BKS - least_BS[:, None]) / range_BS[:, None]))
    return {"codes": codes.astype(np.uint8), "least": least_BS.astype(np.float32), "range": range_BS.astype(np.float32)}


def load_errors(task: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors (B, K, S), labels (B,) and timesteps (S,) of a task."""
    with np.load(DATA / f"{task}.npz") as file:
        codes, least, spread = file["codes"].astype(np.float64), file["least"], file["range"]
        return least[:, None] + spread[:, None] * (codes / 255) ** 2, file["labels"], file["timesteps"]


def network(task: str) -> ClassConditionalDiT:
    """The configured network, without weights of its own."""
    config = yaml.safe_load((CONFIGS / f"dit_{task}.yaml").read_text())
    return ClassConditionalDiT(**config["model"]["init_args"]).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (default: all)")
    for task in parser.parse_args().task or TASKS:
        data_module, draws = TASKS[task]
        weights = read_checkpoint(f"runs/dit_{task}/checkpoints/last.ckpt")["state_dict"]
        weights = {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}
        module = network(task)
        module.load_state_dict(weights)  # in float32 again
        data = data_module()
        data.setup()
        parts = data.test.parts
        classifier = DiffusionClassifier(module, Draws(draws), keep_errors=True)
        errors = []
        for result in classifier(parts["image"], parts["id"]):
            errors.append(result.errors_KS.numpy())
            print(f"\r{task}: {len(errors)} of {len(data.test)} images", end="", flush=True)
        errors_BKS, labels = np.stack(errors), parts["label"].numpy()
        DATA.mkdir(exist_ok=True)
        save_file(weights, DATA / f"{task}.safetensors")
        np.savez_compressed(
            DATA / f"{task}.npz", **compress(errors_BKS), labels=labels, timesteps=classifier.timesteps_S.numpy()
        )
        winner = errors_BKS.astype(np.float64).mean(2).argmin(1)
        kept = load_errors(task)[0].mean(2).argmin(1)
        size = sum((DATA / f"{task}.{kind}").stat().st_size for kind in ("safetensors", "npz"))
        print(f": accuracy {(winner == labels).mean():.4f}, decisions kept {(winner == kept).mean():.4f}, {size} bytes")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
