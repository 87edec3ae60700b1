"""Whether alpha is kept among a thousand candidates: python benchmarks/bench_alpha.py [--images 725] (an hour).

On test triples that no setting was chosen on: those that bench_elimination.py does not use. All 64,000 errors of each
would take hours; LikelihoodRatio(1e-6, inflation=3) takes some two thousand and decides the images whose errors are
stored as all draws do, which is checked first. Each rule is compared with it, alone and after CovarianceSearch(), whose
fit measures the inflation that a rule without one has ("measured").
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
RULES = [LikelihoodRatio(alpha, inflation=c) for c in (1.0, 1.5, 2.0, None) for alpha in (0.002, 0.005, 0.01)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=725, help="images to decide (default: 725, all that are left)")
    count = parser.parse_args().images
    network = TASK.network()

    def decided(
        images: torch.Tensor, ids: list[int], rule: LikelihoodRatio, search: Search | None = None
    ) -> tuple[np.ndarray, float]:
        """Whom each image is decided for, and network calls for an image."""
        classifier = DiffusionClassifier(network, Draws(TASK.draws), elimination=rule, proposal=search)
        results = classifier(images, ids)
        return np.array([one.candidate for one in results]), float(np.mean([one.nfe for one in results]))

    exhaustive = TASK.errors()[0].mean(2).argmin(1)
    images, _, ids = TASK.test()
    some = min(count, len(exhaustive))
    found, nfe = decided(images[:some], ids[:some], REFERENCE)
    print(f"{REFERENCE}: {(found == exhaustive[:some]).sum()} of {some} as all draws, {nfe:.0f} calls an image\n")

    data = TASK.data()
    data.setup()
    others = nested_order(len(data.test))[TASK.images :][:count]
    images, ids = data.test.parts["image"][others], data.test.parts["id"][others].tolist()
    reference, _ = decided(images, ids, REFERENCE)
    search = CovarianceSearch().fit(network, [(TASK.unlabelled(), None)])
    print(f"{len(images)} other images; measured inflation {search.inflation}\n")
    print("| candidates | alpha | inflation | decided otherwise | NFE / image |\n| --- | --- | --- | --- | --- |")
    for name, proposal in (("all", None), ("those of the search", search)):
        for rule in RULES:
            if proposal is None and rule.inflation is None:  # nothing measures it
                continue
            found, nfe = decided(images, ids, rule, proposal)
            otherwise = (found != reference).tolist()
            inflation = "none given" if rule.inflation is None else rule.inflation
            share = f"{wilson(otherwise.count(True), len(otherwise))} ({otherwise.count(True)})"
            print(f"| {name} | {rule.alpha} | {inflation} | {share} | {nfe:.1f} |", flush=True)


if __name__ == "__main__":
    main()
