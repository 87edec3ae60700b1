"""Training for the search: python benchmarks/bench_training_for_search.py [--task digit_triples] [--variant ordinary].

Networks of `dit_digit_pairs.yaml` (100 classes) or `dit_digit_triples.yaml` (1,000), trained for equally many steps,
anew or from the shipped weights on: ordinary ones, and ones that see sets of classes (`class_sets`). Weights are
averaged, kept in runs/training_for_search/ every 100 steps, and used again.

The first table is about the networks: accuracy and calls of LikelihoodRatio(0.002) alone on the first test images, and
accuracy of all candidates with a few draws (`--exhaustive`, 0 for none), the loss on all test images without sets, and
how good samples are: the Fréchet distance between the pixels of samples and those of training images, and the
share of samples whose digits a support vector machine, trained on the single scans, reads as asked.

The second one is about searches before LikelihoodRatio(0.002). "Kept" is the share of images whose decision by
LikelihoodRatio alone is among the candidates that the search keeps.
"""

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC
from tasks import DATA, TASKS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf import (
    EMA,
    ClassConditionalDiT,
    CovarianceSearch,
    DiffusionClassifier,
    Draws,
    GradientSearch,
    LikelihoodRatio,
)
from lightning_diffclf.classifier.search import Search
from lightning_diffclf.commands.configs import CONFIGS
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.results.sample_quality import Reference, frechet_distance

RULE = LikelihoodRatio(0.002)
DRAWS, MICROBATCH = 64, 256
SEARCHES: dict[str, list[dict[str, Any]]] = {  # GradientSearches
    "digit_pairs": [{"draws": draws, "temper": temper} for draws in (3, 6) for temper in (0.03, 0.06)],
    "digit_triples": [
        {"draws": 16, "temper": temper, "timesteps": times}
        for temper in (0.03, 0.06)
        for times in ((0.2, 0.6), (0.3, 0.7))
    ],
}
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
    "shipped": {},
    "shipped, then ordinary": {"lr": 1e-3},
    "shipped, then class_sets 0.5": {"class_sets": 0.5, "lr": 1e-3},
}


def trained(
    variant: str,
    steps: int,
    batch: int,
    seed: int,
    folder: Path,
    task: str = "digit_pairs",
    settings: dict[str, Any] | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> tuple[ClassConditionalDiT, float]:
    """The network with averaged weights, and the seconds that training took; from the folder if it is there.

    ``settings`` are those of the variant, if it is none of :data:`VARIANTS`; ``callbacks`` are of its training.
    """
    config = yaml.safe_load((CONFIGS / f"dit_{task}.yaml").read_text())
    changes = VARIANTS[variant] if settings is None else settings
    L.seed_everything(seed, verbose=False)
    module = ClassConditionalDiT(**config["model"]["init_args"] | SHORT | {"seed": seed} | changes)
    if variant.startswith("shipped"):
        module.load_state_dict(load_file(DATA / f"{task}.safetensors"))
        if variant == "shipped":
            return module.eval(), 0.0
    name = variant.replace(", ", "-").replace(" ", "_")
    data = TASKS[task].data(**config["data"]["init_args"] | {"batch_size": batch, "seed": seed})
    return fitted(
        module, data, steps, seed, lambda step: folder / f"{name}-{step}-{batch}-{seed}.safetensors", callbacks
    )


def fitted(
    module: ClassConditionalDiT,
    data: L.LightningDataModule,
    steps: int,
    seed: int,
    path_of: Callable[[int], Path],
    callbacks: Sequence[L.Callback] = (),
) -> tuple[ClassConditionalDiT, float]:
    """A network with averaged weights, and the CPU seconds of its training; from ``path_of(steps)`` if it is there."""
    path = path_of(steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    ema, start = EMA(EMA_DECAY), time.process_time()

    class Keep(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step % EVERY == 0 or trainer.global_step == steps:
                average = {name: value.clone() for name, value in ema._average.items()}
                spent = torch.tensor(time.process_time() - start)
                save_file(module.state_dict() | average | {"seconds": spent}, path_of(trainer.global_step))

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
        callbacks=[ema, Keep(), *callbacks],
    )
    trainer.fit(module, data)
    return fitted(module, data, steps, seed, path_of)


def validation_loss(module: ClassConditionalDiT, task: str) -> float:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    return trainer.validate(module, TASKS[task].data(eval_batch_size=250), verbose=False)[0]["val/loss"]


def sample_quality(module: ClassConditionalDiT, train: Tensor, count: int) -> tuple[float, float]:
    """Fréchet distance of pixels to training images, and the share of samples that show the digits asked for."""
    classes = module.hparams["num_classes"]
    labels = torch.arange(count) % classes
    samples = torch.cat([module.sample(labels[i : i + 250], seed=i) for i in range(0, count, 250)])
    digits = DigitsDataModule()
    digits.setup()
    scans = digits.train.parts
    reader = SVC(gamma=0.001 * 64).fit(scans["image"].flatten(1), scans["label"])
    read = sum(  # the number that the digits make
        10**place * reader.predict(digit.flatten(1)) for place, digit in enumerate(reversed(samples.split(8, dim=3)))
    )
    right = read == labels.numpy()
    pixels = [Reference.of(images.flatten(1)) for images in (samples, train)]
    return frechet_distance(*pixels), float(right.mean())


def run(module: ClassConditionalDiT, images: Tensor, ids: Sequence[int], **settings: Any) -> tuple[list[Any], float]:
    """Results, and FLOPs of one decision."""
    settings = {"draws": Draws(DRAWS), "elimination": RULE} | settings
    classifier = DiffusionClassifier(module, microbatch=MICROBATCH, **settings)
    classifier(images[:1], ids[:1])  # a search measures its cost first
    with FlopCounterMode(display=False) as counter:
        results = classifier(images, ids)
    return results, counter.get_total_flops() / len(images)


def labels_of(results: Sequence[Any]) -> np.ndarray:
    return np.array([result.prediction for result in results])


def after_proposal(
    module: ClassConditionalDiT,
    images: Tensor,
    ids: Sequence[int],
    truth: np.ndarray,
    alone: Sequence[Any],
    proposal: Search,
) -> list[str]:
    """Cells about a proposal before the rule, beside the rule alone."""
    results, flops = run(module, images, ids, proposal=proposal)
    kept = np.mean([a.candidate in r.candidates_K for a, r in zip(alone, results, strict=True)])
    return [
        f"{kept:.1%}",
        f"{np.mean([len(r.candidates_K) for r in results]):.1f}",
        f"{np.mean([r.nfe for r in results]):.1f}",
        f"{flops / 1e6:.0f}",
        f"{(labels_of(results) == truth).mean():.1%}",
        f"{(labels_of(results) == labels_of(alone)).mean():.1%}",
    ]


AFTER = ["kept", "candidates", "NFE", "MFLOPs", "accuracy", "as alone"]


def table(*head: str) -> None:
    print()
    row(*head)
    row(*["---"] * len(head))


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(SEARCHES), default="digit_pairs")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=1200, help=f"a multiple of {EVERY}")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=500, help="test images to classify, at most")
    parser.add_argument("--exhaustive", type=int, default=16, help="draws of all candidates")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=Path("runs/training_for_search"), help="for weights")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {args.task}, {args.steps} steps of {args.batch}, seed {args.seed}; "
        f"{args.images} images"
    )
    task = TASKS[args.task]
    data = task.data()
    data.setup()
    images, labels, ids = (part[: args.images] for part in task.test())
    truth, train = labels.numpy(), data.train.parts["image"][:2000]
    names = args.variant or list(VARIANTS)
    modules, decided = {}, {}
    exhaustive = f"accuracy, {args.exhaustive} draws of all"
    table(
        "network", "accuracy", exhaustive, "NFE", "MFLOPs", "loss", "Fréchet distance", "read as asked", "training, s"
    )
    for name in names:
        modules[name], seconds = trained(name, args.steps, args.batch, args.seed, args.folder / args.task, args.task)
        decided[name], flops = run(modules[name], images, ids)
        every = "–"
        if args.exhaustive:
            results, _ = run(modules[name], images, ids, draws=Draws(args.exhaustive), elimination=None)
            every = f"{(labels_of(results) == truth).mean():.1%}"
        distance, right = sample_quality(modules[name], train, args.samples)
        row(
            name,
            f"{(labels_of(decided[name]) == truth).mean():.1%}",
            every,
            f"{np.mean([r.nfe for r in decided[name]]):.1f}",
            f"{flops / 1e6:.0f}",
            f"{validation_loss(modules[name], args.task):.4f}",
            f"{distance:.2f}",
            f"{right:.1%}",
            f"{seconds:.0f}",
        )
    table("network", "search", *AFTER)
    for name in names:
        searches: dict[str, Search] = {}
        for settings in SEARCHES[args.task]:
            text = ", ".join(f"{key}={value}" for key, value in settings.items())
            searches[f"GradientSearch({text})"] = GradientSearch(**settings)
        searches["CovarianceSearch()"] = CovarianceSearch().fit(modules[name], [(task.unlabelled(), None)])
        for text, search in searches.items():
            row(name, text, *after_proposal(modules[name], images, ids, truth, decided[name], search))


if __name__ == "__main__":
    main()
