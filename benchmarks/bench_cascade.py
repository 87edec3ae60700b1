"""A smaller network proposes: python benchmarks/bench_cascade.py [--network "patches of 4, half the depth"].

Digit pairs (100 classes). Smaller networks are trained (`--steps`; weights are kept in runs/cascade/ and used again),
and each proposes to the shipped network by `Cascade`, before LikelihoodRatio(0.002).

The first table is about the smaller networks: FLOPs of a call beside the shipped one's, and accuracy with one draw, and
two antithetic ones, of all candidates. The second one is about the decisions of the shipped network after each
proposal; calls of the smaller network count as those of the shipped one that have as many FLOPs. "Kept" and agreement
are with all draws of all candidates (the stored errors in data/), as in bench_elimination.py, which has the shipped
network's own searches.
"""

import argparse
import platform
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training_for_search import MICROBATCH, RULE, labels_of, row, table, trained
from tasks import TASKS

from lightning_diffclf import Cascade, DiffusionClassifier, Draws, Recipe
from lightning_diffclf.classifier.search import flops_of
from lightning_diffclf.results.statistics import wilson

NETWORKS: dict[str, dict[str, Any]] = {  # the shipped one has 4 blocks of width 64 and patches of 2 x 2
    "patches of 4, half the depth": {"patch_size": 4, "depth": 2},
    "patches of 4, half the depth and width": {"patch_size": 4, "depth": 2, "hidden_size": 32, "num_heads": 2},
}
RECIPES = {"1 draw": Recipe(draws=1), "2 antithetic draws": Recipe(draws=2, antithetic=True)}  # of all candidates
MISSES = (0.1, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/cascade"), help="for weights")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}; {args.steps} steps of {args.batch}, seed {args.seed}"
    )
    task = TASKS["digit_pairs"]
    images, labels, ids = task.test()
    errors_BKS, _, _ = task.errors()
    truth, decided = labels.numpy(), errors_BKS.mean(2).argmin(1)
    shipped = task.network()

    table("smaller network", "FLOPs", "training, s", *(f"accuracy, {recipe}" for recipe in RECIPES))
    networks = {}
    folder = args.folder / str(args.steps)  # weights in between are those of a longer decay
    for name in args.network or NETWORKS:
        settings = {"lr": 3e-3, "decay": "cosine"} | NETWORKS[name]
        networks[name], seconds = trained(name, args.steps, args.batch, args.seed, folder, task.name, settings)
        share = flops_of(networks[name], images[:1]) / flops_of(shipped, images[:1])
        right = [
            labels_of(DiffusionClassifier(networks[name], recipe)(images, ids)) == truth for recipe in RECIPES.values()
        ]
        row(name, f"{share:.1%}", f"{seconds:.0f}", *(wilson(int(one.sum()), len(one)) for one in right))

    table("smaller network", "its draws", "miss", "not kept", "candidates", "its NFE", "NFE", "accuracy", "agreement")
    for name, small in networks.items():
        for text, recipe in RECIPES.items():
            for miss in MISSES:
                classifier = DiffusionClassifier(
                    shipped,
                    Draws(task.draws),
                    elimination=RULE,
                    microbatch=MICROBATCH,
                    proposal=Cascade(small, recipe, miss=miss),
                )
                results = classifier(images, ids)
                lost = [k not in r.candidates_K for k, r in zip(decided, results, strict=True)]
                same = labels_of(results) == decided
                row(
                    name,
                    text,
                    miss,
                    sum(lost),
                    f"{np.mean([len(r.candidates_K) for r in results]):.1f}",
                    f"{np.mean([r.search_nfe for r in results]):.1f}",
                    f"{np.mean([r.nfe for r in results]):.1f}",
                    f"{(labels_of(results) == truth).mean():.1%}",
                    wilson(int(same.sum()), len(same)),
                )


if __name__ == "__main__":
    main()
