"""Whether alpha is kept among a thousand candidates: python benchmarks/bench_alpha.py [--images 1000] (half an hour).

On test triples that no setting was chosen on: further ones, of the same scans, than bench_elimination.py uses. All
64,000 errors of each would take hours. The reference is LikelihoodRatio(1e-5, inflation=3) among the forty candidates
that a patient search keeps: it decides the images whose errors are stored as all draws of all candidates do, which
is checked first. Each rule after CovarianceSearch() is compared with it, at the same draws, antithetic or independent.
The fit of the search measures the inflation that a rule without one has ("measured").
"""

import argparse

import numpy as np
import torch
from tasks import TASKS

from lightning_diffclf import CovarianceSearch, DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.classifier import Classification
from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.data.digits import DigitTriplesDataModule
from lightning_diffclf.results.statistics import wilson

TASK, TRIPLES = TASKS["digit_triples"], 2000
REFERENCE, PATIENT = LikelihoodRatio(1e-5, inflation=3.0), CovarianceSearch(temper=0.08, least=10)
RULES = [LikelihoodRatio(alpha, inflation=c) for c in (1.0, None) for alpha in (0.002, 0.005, 0.01)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="images to decide, at most 1,000 (default: all)")
    count = parser.parse_args().images
    network = TASK.network()
    search = CovarianceSearch().fit(network, [(TASK.unlabelled(), None)])
    PATIENT.load_state_dict(search.state_dict())

    def decided(
        images: torch.Tensor, ids: list[int], antithetic: bool, rule: LikelihoodRatio, by: CovarianceSearch
    ) -> list[Classification]:
        draws = Draws(TASK.draws, antithetic=antithetic)
        return DiffusionClassifier(network, draws, elimination=rule, proposal=by)(images, ids)

    def means(results: list[Classification]) -> tuple[np.ndarray, float, float]:
        """Whom each image is decided for; network calls and candidates for an image."""
        nfe, kept = np.mean([(one.nfe, len(one.candidates_K)) for one in results], 0)
        return np.array([one.candidate for one in results]), nfe, kept

    exhaustive = TASK.errors()[0].mean(2).argmin(1)
    images, _, ids = TASK.test()
    some = min(count, len(exhaustive))
    found, nfe, _ = means(decided(images[:some], ids[:some], False, REFERENCE, PATIENT))
    print(f"{REFERENCE}: {(found == exhaustive[:some]).sum()} of {some} as all draws, {nfe:.0f} calls an image")

    data = DigitTriplesDataModule(train_triples=1, test_triples=TRIPLES)
    data.setup()
    others = nested_order(TRIPLES)[TRIPLES // 2 :][:count]  # settings were chosen on the first half
    images, labels = data.test.parts["image"][others], data.test.parts["label"][others].numpy()
    ids = data.test.parts["id"][others].tolist()
    print(f"{len(images)} other images; measured inflation {search.inflation:.2f}\n")
    print(
        "| draws | alpha | inflation | decided otherwise | left out | kept | NFE / image | accuracy |\n|" + " --- |" * 8
    )
    for antithetic, name in ((True, "antithetic"), (False, "independent")):
        reference, nfe, kept = means(decided(images, ids, antithetic, REFERENCE, PATIENT))
        right = np.mean(reference == labels)
        print(f"| {name} | reference | | | | {kept:.1f} | {nfe:.1f} | {right:.2%} |", flush=True)
        for rule in RULES:
            results = decided(images, ids, antithetic, rule, search)
            found, nfe, kept = means(results)
            otherwise = int((found != reference).sum())
            left_out = sum(one not in result.candidates_K for one, result in zip(reference, results, strict=True))
            inflation = "measured" if rule.inflation is None else rule.inflation
            share = f"{wilson(otherwise, len(images))} ({otherwise})"
            row = f"| {name} | {rule.alpha} | {inflation} | {share} | {left_out} | {kept:.1f} | {nfe:.1f} |"
            print(f"{row} {np.mean(found == labels):.2%} |", flush=True)


if __name__ == "__main__":
    main()
