"""Do antithetic draws, or weights, decide with fewer calls? python benchmarks/bench_antithetic.py [--seeds 3].

Digits, all errors of all test images with 100 draws: independent ones at 100 timesteps, antithetic ones at 50, twice
each. The first table says how often the first draws are right, of all candidates; the second what rules
take and how often they decide as all draws of the same kind and weights do, replayed on the stored errors.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tasks import TASKS

from lightning_diffclf import DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors
from lightning_diffclf.results.replay import replay

DRAWS = 100
FIRST = (2, 4, 6, 8, 10, 12, 16, 20)
RULES = [("uniform", alpha) for alpha in (0.002, 0.01, 0.02, 0.05)] + [
    (weights, alpha) for weights in ("clark_jaini", "velocity") for alpha in (0.02, 0.05)
]


def stored(path: Path, images: int | None, **draws: object) -> StoredErrors:
    """All errors and distances of the test images, as a run keeps them."""
    task = TASKS["digits"]
    some, labels, ids = (part[:images] for part in task.test())
    settings = {"keep_errors": True, "keep_distances": True, "microbatch": 250}
    classifier = DiffusionClassifier(task.network(), Draws(DRAWS, **draws), **settings)
    writer = ErrorsWriter(path, ErrorsInfo.of(classifier), distances=True)
    run = classifier.run()
    run.add(some, ids)
    for result, label in zip(run.finish(), labels.tolist(), strict=True):
        writer.add(result, label)
    writer.close()
    return StoredErrors(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of the noise: 0, 1, …")
    parser.add_argument("--images", type=int, help="test images (default: all)")
    args = parser.parse_args()
    kinds = {"independent": False, "antithetic": True}
    with tempfile.TemporaryDirectory() as folder:
        files = {
            kind: [
                stored(Path(folder) / f"{kind}{seed}.parquet", args.images, seed=seed, antithetic=antithetic)
                for seed in range(args.seeds)
            ]
            for kind, antithetic in kinds.items()
        }
        print("| draws | independent | antithetic |\n| --- | --- | --- |")
        for first in FIRST:
            right = {
                kind: np.mean(
                    [one.errors_SK[:first].mean(0).argmin() == one.label for errors in some for one in errors.images()]
                )
                for kind, some in files.items()
            }
            print(f"| {first} | {' | '.join(f'{share:.2%}' for share in right.values())} |", flush=True)
        print("\n| draws | weights | alpha | NFE / image | decided otherwise | accuracy |\n|" + " --- |" * 6)
        for kind, some in files.items():
            for weights, alpha in RULES:
                found = [replay(errors, LikelihoodRatio(alpha), weights) for errors in some]
                nfe, other, accuracy = np.mean(
                    [(one.nfe_per_image, 1 - one.agreement, one.accuracy) for one in found], 0
                )
                print(f"| {kind} | {weights} | {alpha} | {nfe:.2f} | {other:.2%} | {accuracy:.2%} |", flush=True)


if __name__ == "__main__":
    main()
