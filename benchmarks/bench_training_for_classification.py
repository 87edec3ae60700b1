"""Training for classification: python benchmarks/bench_training_for_classification.py [--task digits] [--seed 0].

The shipped network of a task is trained on, anew for each seed, for as many network rows (`--rows`) as the control,
which goes on with the denoising loss alone: the classification loss on 12 or 10 classes, contrastive flow matching, or
the separation loss. Rows are what training costs: an image of a batch is one, and so is a class that it is compared
under. Those called "anew" are trained from scratch (`--control "anew, ordinary"`); "late", half of the rows are those
of ordinary training, before the loss begins. Weights are averaged, kept in runs/training_for_classification/, and used
again, as is what each network decides about the images: a run that was interrupted goes on.

The table: accuracy on the test images with 1, 5 and 25 draws of all candidates (of pairs, 25 and 100 draws of
LikelihoodRatio(0.002), with its network calls), with Wilson's interval, each network's images also compared with the
control's by McNemar's exact test (images that only it, and only the control, gets right); the denoising loss on the
test images; and sample quality as in bench_training_for_search.py. `--validate` takes training images in place of the
test images: to choose weights by.

With several seeds, a second table puts them together: images that only one of the networks gets right, summed over the
seeds, with McNemar's exact test as if all were independent; and as the same images come once for each seed, the mean
difference of the accuracies with an interval and a t-test over images (`Clusters`: an image with all seeds is a group).
"""

import argparse
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from bench_training_for_search import MICROBATCH, RULE, labels_of, row, sample_quality, table, trained
from tasks import TASKS

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.files import replacing
from lightning_diffclf.modules.objectives import Objectives
from lightning_diffclf.results.statistics import Clusters, mcnemar, wilson

LR = 1e-3
CONTROL = "shipped, then ordinary"
VARIANTS: dict[str, dict[str, Any]] = {
    "shipped": {},
    CONTROL: {},
    "shipped, then classification": {"classification": 1.0, "compared_classes": 12},
    "shipped, then contrastive": {"contrastive": 0.05},
    "shipped, then separation": {"separation": 0.5, "compared_classes": 12},
    "anew, ordinary": {"lr": 2e-3},
    "anew, classification": {"lr": 2e-3, "classification": 1.0, "compared_classes": 12},
    "anew, classification late": {"lr": 2e-3, "classification": 1.0, "compared_classes": 12, "late": 0.5},
}
DRAWS = {"digits": (1, 5, 25), "digit_pairs": (1, 5)}  # of all candidates
RULES = {"digits": (), "digit_pairs": (25, 100)}  # of LikelihoodRatio


class Late(L.Callback):
    """What is beside the denoising loss begins after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.objectives, module.objectives = module.objectives, Objectives()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            module.objectives = self.objectives


def steps_of(settings: dict[str, Any], batch: int, rows: int, num_classes: int) -> int:
    """Optimizer steps in which the network sees so many rows."""
    of = Objectives.of(settings)
    asked = min(of.compared_classes, num_classes) + (of.separation > 0)
    return rows // (batch + (int(np.ceil(of.compared_share * batch)) * asked if of.compares else 0))


def validation_loss(module: ClassConditionalDiT, task: str) -> float:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(module, TASKS[task].data(eval_batch_size=120), verbose=False)[0]["val/loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(DRAWS), default="digit_pairs")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated (default: all)")
    parser.add_argument("--control", choices=list(VARIANTS), default=CONTROL, help="what the others are compared with")
    parser.add_argument("--rows", type=int, default=120_000, help="that the network sees in training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, action="append", help="may be repeated (default: 0)")
    parser.add_argument("--images", type=int, default=500, help="test images to classify")
    parser.add_argument("--draws", type=int, nargs="*", help=f"of all candidates (default: {DRAWS})")
    parser.add_argument("--ruled", type=int, nargs="*", help=f"most draws of LikelihoodRatio (default: {RULES})")
    parser.add_argument("--samples", type=int, default=500, help="to look at; 0 for none")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="changes all variants")
    parser.add_argument("--validate", action="store_true", help="training images in place of the test images")
    parser.add_argument("--folder", type=Path, default=Path("runs/training_for_classification"), help="for weights")
    args = parser.parse_args()
    task, changes = args.task, {name: float(value) for name, value in (one.split("=") for one in args.set)}
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {task}, {args.rows} rows in batches of {args.batch}; {changes or ''}"
    )
    exhaustive = DRAWS[task] if args.draws is None else args.draws
    ruled = RULES[task] if args.ruled is None else args.ruled
    data = TASKS[task].data()
    data.setup()
    source = (data.train if args.validate else data.test).parts
    images, labels, ids = (source[name][: args.images] for name in ("image", "label", "id"))
    ids, truth, train = ids.tolist(), labels.numpy(), data.train.parts["image"][:2000]
    every = [f"{draws} draw{'s' * (draws > 1)}" for draws in exhaustive]
    rules = [f"≤ {draws} draws, rule" for draws in ruled]
    table("network", "seed", "steps", "CPU s", *every, *rules, "NFE", "loss", "Fréchet", "read as asked", "McNemar p")

    def right(
        module: ClassConditionalDiT, network: Path, draws: int, rule: LikelihoodRatio | None
    ) -> tuple[np.ndarray, float]:
        which = f"{'train' if args.validate else 'test'}-{args.images}-{draws}{'-rule' * (rule is not None)}"
        path = network.with_name(f"{network.name}-{which}.npz")
        if not path.is_file():
            settings = {"draws": Draws(draws), "elimination": rule, "microbatch": MICROBATCH}
            results = DiffusionClassifier(module, **settings)(images, ids)
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.savez(file, right=labels_of(results) == truth, nfe=np.mean([one.nfe for one in results]))
        with np.load(path) as kept:
            return kept["right"], float(kept["nfe"])

    def of_variant(name: str, seed: int, control: Sequence[np.ndarray] | None) -> list[np.ndarray]:
        settings = {"lr": LR} | VARIANTS[name]
        settings |= {key: value for key, value in changes.items() if key == "lr" or VARIANTS[name].get(key)}
        first = int(settings.pop("late", 0) * args.rows) // args.batch  # steps before the loss begins
        steps = first + steps_of(settings, args.batch, args.rows - first * args.batch, data.num_classes)
        tag = "".join(f"-{key}-{value:g}" for key, value in settings.items()) + f"-late-{first}" * (first > 0)
        folder = args.folder / (task + tag)
        module, seconds = trained(name, steps, args.batch, seed, folder, task, settings, [Late(first)] if first else [])
        network = f"{name}-{steps}-{args.batch}-{seed}".replace(", ", "-").replace(" ", "_")
        found = [right(module, folder / network, draws, None)[0] for draws in exhaustive]
        found_rules = [right(module, folder / network, draws, RULE) for draws in ruled]
        found += [one for one, _ in found_rules]
        quality = ["–", "–"]
        if args.samples:
            distance, share = sample_quality(module, train, args.samples)
            quality = [f"{distance:.2f}", f"{share:.1%}"]
        p = "–"
        if control is not None:
            differences = np.stack(found).astype(int) - np.stack(control)
            p = ", ".join(map(disputed, differences))
            pooled.setdefault(name, []).append(differences)
        row(
            name,
            "–" if name == "shipped" else seed,
            "–" if name == "shipped" else steps,
            f"{seconds:.0f}",
            *(wilson(int(one.sum()), len(one)) for one in found),
            ", ".join(f"{nfe:.1f}" for _, nfe in found_rules) or "–",
            f"{validation_loss(module, task):.4f}",
            *quality,
            p,
        )
        return found

    names, pooled = args.variant or list(VARIANTS), dict[str, list[np.ndarray]]()
    for seed in args.seed or [0]:
        control = None
        for name in [args.control, *names] if args.control not in names and len(names) > 1 else names:
            found = of_variant(name, seed, control)
            control = found if name == args.control else control
    table("network", "seeds", "draws", "McNemar p, all independent", "difference, by image", "p, by image")
    for name, of_seeds in pooled.items():
        for column, one in zip([*every, *rules], np.stack(of_seeds, 1), strict=True):
            means = Clusters.of(one.mean(0))
            low, high = means.interval()[1:]
            about = f"{means.mean:+.1%} ({low:+.1%} – {high:+.1%})"
            row(name, len(of_seeds), column, disputed(one), about, f"{means.p_value:.2g}")


def disputed(differences: np.ndarray) -> str:
    """McNemar's p of differences -1, 0 and 1, with the images that only the one and only the other gets right."""
    counts = int((differences > 0).sum()), int((differences < 0).sum())
    return f"{mcnemar(*counts):.2g} ({counts[0]} : {counts[1]})"


if __name__ == "__main__":
    main()
