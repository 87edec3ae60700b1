"""Whether alpha is kept among a thousand candidates: python benchmarks/bench_alpha.py [--images 725] (an hour).

On test triples that no setting was chosen on: those that bench_elimination.py does not use. All 64,000 errors of each
would take hours; LikelihoodRatio(1e-6, inflation=3) takes some five thousand and decides the images whose errors are
stored as all draws do, which is checked first. Each rule after CovarianceSearch() is compared with it, at the same
draws, antithetic or independent. The fit of the search measures the inflation that a rule without one has ("measured").
"""

import argparse

import numpy as np
import torch
from tasks import TASKS

from lightning_diffclf import CovarianceSearch, DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.classifier.search import Search
from lightning_diffclf.results.statistics import wilson

TASK = TASKS["digit_triples"]
REFERENCE = LikelihoodRatio(1e-6, inflation=3.0)
RULES = [LikelihoodRatio(alpha, inflation=c) for c in (1.0, None) for alpha in (0.002, 0.005, 0.01)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=725, help="images to decide (default: 725, all that are left)")
    count = parser.parse_args().images
    network = TASK.network()

    def decided(
        images: torch.Tensor, ids: list[int], antithetic: bool, rule: LikelihoodRatio, search: Search | None = None
    ) -> tuple[np.ndarray, float]:
        """Whom each image is decided for, and network calls for an image."""
        draws = Draws(TASK.draws, antithetic=antithetic)
        results = DiffusionClassifier(network, draws, elimination=rule, proposal=search)(images, ids)
        return np.array([one.candidate for one in results]), float(np.mean([one.nfe for one in results]))

    exhaustive = TASK.errors()[0].mean(2).argmin(1)
    images, _, ids = TASK.test()
    some = min(count, len(exhaustive))
    found, nfe = decided(images[:some], ids[:some], False, REFERENCE)
    print(f"{REFERENCE}: {(found == exhaustive[:some]).sum()} of {some} as all draws, {nfe:.0f} calls an image")

    search = CovarianceSearch().fit(network, [(TASK.unlabelled(), None)])
    data = TASK.data()
    data.setup()
    others = nested_order(len(data.test))[TASK.images :][:count]
    images, ids = data.test.parts["image"][others], data.test.parts["id"][others].tolist()
    labels = data.test.parts["label"][others].numpy()
    print(f"{len(images)} other images; measured inflation {search.inflation:.2f}\n")
    print("| draws | alpha | inflation | decided otherwise | NFE / image | accuracy |\n" + "| --- " * 6 + "|")
    for antithetic, name in ((True, "antithetic"), (False, "independent")):
        reference, nfe = decided(images, ids, antithetic, REFERENCE)
        print(f"| {name} | all candidates | | | {nfe:.1f} | {np.mean(reference == labels):.2%} |", flush=True)
        for rule in RULES:
            found, nfe = decided(images, ids, antithetic, rule, search)
            otherwise = (found != reference).tolist()
            inflation = "measured" if rule.inflation is None else rule.inflation
            share = f"{wilson(otherwise.count(True), len(otherwise))} ({otherwise.count(True)})"
            row = f"| {name} | {rule.alpha} | {inflation} | {share} | {nfe:.1f} | {np.mean(found == labels):.2%} |"
            print(row, flush=True)


if __name__ == "__main__":
    main()
