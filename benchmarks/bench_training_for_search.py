"""Training for the search: python benchmarks/bench_training_for_search.py [--variant ordinary] [--seed 0].

Digit pairs (100 classes), networks of `dit_digit_pairs.yaml` trained anew for equally many steps: an ordinary one, ones
that see sets of classes (`class_sets`), ones whose first blocks see no class (`class_blocks`); about 10 minutes each on
one core. Weights are kept in runs/training_for_search/ and used again.

The first table is about the networks: accuracy and calls of LikelihoodRatio(0.002) alone on all 500 test images,
agreement with all 64 draws of all candidates on the first ones (`--exhaustive`), the loss on test images without sets,
and how good samples are: the Fréchet distance between the pixels of 2,000 samples and those of 2,000 training images,
and the share of samples whose digits a support vector machine, trained on the single scans, reads as asked.

The second one is about GradientSearch before LikelihoodRatio(0.002), for several numbers of draws and tempers. "Kept"
is the share of images whose decision by LikelihoodRatio alone is among the candidates that the search keeps.
"""

import argparse
import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC
from tasks import DATA
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf import EMA, ClassConditionalDiT, DiffusionClassifier, Draws, GradientSearch, LikelihoodRatio
from lightning_diffclf.commands.configs import CONFIGS
from lightning_diffclf.data.digits import DigitPairsDataModule, DigitsDataModule
from lightning_diffclf.results.sample_quality import Reference, frechet_distance

RULE = LikelihoodRatio(0.002)
DRAWS, MICROBATCH, SAMPLES = 64, 256, 2000
SEARCHES = [(draws, temper) for draws in (2, 3, 4, 6) for temper in (0.03, 0.06, 0.12)]
EMA_DECAY = 0.995  # a short training has forgotten its beginning then
SHORT = {
    "lr": 2e-3,
    "warmup_steps": 100,
    "decay": "none",
}  # a shorter training begins a longer one
EVERY = 100  # steps after which weights are kept
VARIANTS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "class_sets 0.25": {"class_sets": 0.25},
    "class_blocks 2": {"class_blocks": 2},
    "class_blocks 1": {"class_blocks": 1},
    "class_sets 0.25, class_blocks 2": {"class_sets": 0.25, "class_blocks": 2},
    "small": {"hidden_size": 32, "depth": 2, "num_heads": 2},
    "shipped": {},
    "shipped, then ordinary": {"lr": 1e-3},
    "shipped, then class_blocks 2": {"class_blocks": 2, "lr": 1e-3},
    "shipped, then class_sets 0.5": {"class_sets": 0.5, "lr": 1e-3},
}


def trained(variant: str, steps: int, batch: int, seed: int, folder: Path) -> tuple[ClassConditionalDiT, float]:
    """The network with averaged weights, and the seconds that training took; from the folder if it is there."""
    config = yaml.safe_load((CONFIGS / "dit_digit_pairs.yaml").read_text())
    L.seed_everything(seed, verbose=False)
    module = ClassConditionalDiT(**config["model"]["init_args"] | SHORT | {"seed": seed} | VARIANTS[variant])
    if variant.startswith("shipped"):
        module.load_state_dict(load_file(DATA / "digit_pairs.safetensors"))
        if variant == "shipped":
            return module.eval(), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    ema, start = EMA(EMA_DECAY), time.process_time()

    def path_of(step: int) -> Path:
        return folder / f"{variant.replace(', ', '-').replace(' ', '_')}-{step}-{batch}-{seed}.safetensors"

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step % EVERY == 0:
                average = {name: value.clone() for name, value in ema._average.items()}
                spent = torch.tensor(time.process_time() - start)
                save_file(module.state_dict() | average | {"seconds": spent}, path_of(trainer.global_step))

    path = path_of(steps)
    if path.is_file():
        weights = load_file(path)
        seconds = float(weights.pop("seconds"))
        module.load_state_dict(weights)
        return module.eval(), seconds
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        callbacks=[ema, Keep()],
    )
    trainer.fit(module, DigitPairsDataModule(batch_size=batch, seed=seed))
    return trained(variant, steps, batch, seed, folder)


def validation_loss(module: ClassConditionalDiT) -> float:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(module, DigitPairsDataModule(eval_batch_size=250), verbose=False)[0]["val/loss"]


def sample_quality(module: ClassConditionalDiT, train: Tensor) -> tuple[float, float]:
    """Fréchet distance of pixels to training images, and the share of samples that show the digits asked for."""
    labels = torch.arange(SAMPLES) % 100
    parts = range(0, SAMPLES, 250)
    samples = torch.cat([module.sample(labels[i : i + 250], seed=i) for i in parts])
    digits = DigitsDataModule()
    digits.setup()
    scans = digits.train.parts
    reader = SVC(gamma=0.001 * 64).fit(scans["image"].flatten(1), scans["label"])
    read = [reader.predict(half.flatten(1)) for half in samples.chunk(2, dim=3)]
    right = (read[0] == (labels // 10).numpy()) & (read[1] == (labels % 10).numpy())
    pixels = [Reference.of(images.flatten(1)) for images in (samples, train)]
    return frechet_distance(*pixels), float(right.mean())


def run(module: ClassConditionalDiT, images: Tensor, ids: Sequence[int], **settings: Any) -> tuple[list[Any], float]:
    """Results, and FLOPs of one decision."""
    classifier = DiffusionClassifier(module, Draws(DRAWS), microbatch=MICROBATCH, **settings)
    classifier(images[:1], ids[:1])  # a search measures its cost first
    with FlopCounterMode(display=False) as counter:
        results = classifier(images, ids)
    return results, counter.get_total_flops() / len(images)


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=1200, help=f"a multiple of {EVERY}")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exhaustive", type=int, default=200, help="images with all draws of all candidates")
    parser.add_argument("--folder", type=Path, default=Path("runs/training_for_search"), help="for weights")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {args.steps} steps of {args.batch}, seed {args.seed}\n"
    )
    data = DigitPairsDataModule()
    data.setup()
    images, labels, ids = (data.test.parts[name] for name in ("image", "label", "id"))
    ids, truth, first = ids.tolist(), labels.numpy(), args.exhaustive
    names = args.variant or list(VARIANTS)
    rows_of: dict[str, list[list[object]]] = {}
    head = ["network", "accuracy", "NFE", "MFLOPs", f"agreement ({first})", "loss", "Fréchet distance", "read as asked"]
    row(*head, "training, s")
    row(*["---"] * (len(head) + 1))
    for name in names:
        module, seconds = trained(name, args.steps, args.batch, args.seed, args.folder)
        every, _ = run(module, images[:first], ids[:first])
        alone, flops = run(module, images, ids, elimination=RULE)
        reference, decided = (np.array([r.label for r in results]) for results in (every, alone))
        distance, right = sample_quality(module, data.train.parts["image"][:SAMPLES])
        row(
            name,
            f"{(decided == truth).mean():.1%}",
            f"{np.mean([r.nfe for r in alone]):.1f}",
            f"{flops / 1e6:.0f}",
            f"{(decided[:first] == reference).mean():.1%}",
            f"{validation_loss(module):.4f}",
            f"{distance:.2f}",
            f"{right:.1%}",
            f"{seconds:.0f}",
        )
        rows_of[name] = []
        for draws, temper in SEARCHES:
            search = GradientSearch(draws=draws, temper=temper)
            results, flops = run(module, images, ids, elimination=RULE, proposal=search)
            found = np.array([r.label for r in results])
            kept = np.mean([a.candidate in r.candidates_K for a, r in zip(alone, results, strict=True)])
            rows_of[name].append(
                [
                    name,
                    draws,
                    temper,
                    f"{kept:.1%}",
                    f"{np.mean([len(r.candidates_K) for r in results]):.1f}",
                    f"{np.mean([r.nfe for r in results]):.1f}",
                    f"{flops / 1e6:.0f}",
                    f"{(found == truth).mean():.1%}",
                    f"{(found[:first] == reference).mean():.1%}",
                    f"{(found == decided).mean():.1%}",
                ]
            )
    print()
    head = ["network", "draws", "temper", "kept", "candidates", "NFE", "MFLOPs", "accuracy", f"agreement ({first})"]
    row(*head, "as alone (500)")
    row(*["---"] * (len(head) + 1))
    for name in names:
        for cells in rows_of[name]:
            row(*cells)


if __name__ == "__main__":
    main()
