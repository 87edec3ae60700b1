"""A smaller network proposes: python benchmarks/bench_cascade.py [--network "patches of 4, half the depth"].

Digit pairs (100 classes). Smaller networks are trained (`--steps`; weights are kept in runs/cascade/ and used again),
and each proposes to the shipped network by `Cascade`, before LikelihoodRatio(0.002).

The first table is about the smaller networks: FLOPs of a call beside the shipped one's, accuracy with one draw of all
candidates and by LikelihoodRatio(0.002). The second one is about the decisions of the shipped network after each
proposal, beside its own searches. Calls of the smaller network count as those of the shipped one that have as many
FLOPs. "Kept" and agreement are with all draws of all candidates (the stored errors in data/).
"""

import argparse
import platform
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_training_for_search import RULE, labels_of, row, run, table, trained
from tasks import TASKS

from lightning_diffclf import (
    Cascade,
    CovarianceSearch,
    Draws,
    Recipe,
)
from lightning_diffclf.classifier.search import Search, flops_of
from lightning_diffclf.results.statistics import wilson

NETWORKS: dict[str, dict[str, Any]] = {  # the shipped one has 4 blocks of width 64 and patches of 2 x 2
    "half the width and depth": {"hidden_size": 32, "depth": 2, "num_heads": 2},
    "patches of 4, half the depth": {"patch_size": 4, "depth": 2},
    "patches of 4, half the width and depth": {"patch_size": 4, "hidden_size": 32, "depth": 2, "num_heads": 2},
}
RECIPES = {  # how the smaller one decides
    "1 draw": Recipe(draws=1),
    "2 antithetic draws": Recipe(draws=2, antithetic=True),
    "LikelihoodRatio(0.002)": Recipe(draws=64, elimination=RULE),
}


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

    table("smaller network", "FLOPs", "training, s", "accuracy, 1 draw of all", "LikelihoodRatio(0.002)", "its NFE")
    networks = {}
    folder = args.folder / str(args.steps)  # weights in between are those of a longer decay
    for name in args.network or NETWORKS:
        settings = {"lr": 3e-3, "decay": "cosine"} | NETWORKS[name]
        small, seconds = trained(name, args.steps, args.batch, args.seed, folder, task.name, settings)
        networks[name] = small
        ratio = flops_of(small, images[:1]) / flops_of(shipped, images[:1])
        one, _ = run(small, images, ids, draws=Draws(1), elimination=None)
        ruled, _ = run(small, images, ids)
        accuracies = [wilson(int((labels_of(results) == truth).sum()), len(truth)) for results in (one, ruled)]
        row(name, f"{ratio:.1%}", f"{seconds:.0f}", *accuracies, f"{np.mean([r.nfe for r in ruled]):.1f}")

    table("proposal", "kept", "candidates", "NFE", "of them its own", "MFLOPs", "accuracy", "agreement")
    proposals: dict[str, Search | None] = {"none": None, "GradientSearch()": task.search}
    proposals["CovarianceSearch()"] = CovarianceSearch().fit(shipped, [(task.unlabelled(), None)])
    for name, small in networks.items():
        proposals |= {f"{name}: {text}": Cascade(small, recipe) for text, recipe in RECIPES.items()}
    for text, proposal in proposals.items():
        results, flops = run(shipped, images, ids, proposal=proposal)
        kept = np.mean([k in r.candidates_K for k, r in zip(decided, results, strict=True)])
        row(
            text,
            f"{kept:.1%}",
            f"{np.mean([len(r.candidates_K) for r in results]):.1f}",
            f"{np.mean([r.nfe for r in results]):.1f}",
            f"{np.mean([r.search_nfe for r in results]):.1f}",
            f"{flops / 1e6:.0f}",
            f"{(labels_of(results) == truth).mean():.1%}",
            f"{(labels_of(results) == decided).mean():.1%}",
        )


if __name__ == "__main__":
    main()
