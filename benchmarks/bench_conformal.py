"""Do conformal sets contain the right class as often as they say? python benchmarks/bench_conformal.py.

Images are classified once: with all draws by the stored errors (see bench_elimination.py), and under LikelihoodRatio by
the network. Then 100 random halves calibrate, and the other halves are judged. "Inside" is the share of the 100 whose
number of covered images lies in the 95 % interval of the law that the number must have (beta-binomial: Vovk 2012); the
mean coverage is beside what that law expects. Splits of the same images depend on each other: the 95 % are an
expectation, not a bound.
"""

import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from bench_elimination import stored
from scipy.stats import betabinom
from tasks import TASKS, Task

from lightning_diffclf import Classification, Conformal, DiffusionClassifier, Draws, Exhaustive, LikelihoodRatio
from lightning_diffclf.classifier.conformal import least_images, nonconformity, order_of_elimination, rank_of
from lightning_diffclf.results.replay import replay

COVERAGES = (0.9, 0.98)
SPLITS = 100


def decisions(task: Task, alpha: float | None) -> tuple[list[Classification], np.ndarray]:
    """Decisions on the images whose errors are stored, and their labels."""
    everything = DiffusionClassifier(task.network(), Draws(task.draws))
    if alpha is None:
        with tempfile.TemporaryDirectory() as folder:
            found = replay(stored(task, everything, Path(folder)), Exhaustive())
        return found.results, np.array(found.labels)
    images, labels, ids = (part[: task.exhaustive] for part in task.test())
    rule = LikelihoodRatio(alpha, inflation=task.inflation)
    classifier = DiffusionClassifier(everything.denoiser, everything.draws, elimination=rule)
    return classifier(images, ids), labels.numpy()


def scores(results: list[Classification]) -> dict[str, np.ndarray]:
    """Nonconformity of every class of every image (B, C); a class is a candidate here."""
    differences_BC = torch.stack([one.differences_K for one in results])
    draws_BC = torch.stack([one.draws_K for one in results])
    total = len(results[0].timesteps_S)
    return {
        "difference": nonconformity(differences_BC).numpy(),
        "order of elimination": order_of_elimination(differences_BC, draws_BC, total).numpy(),
    }


def split_many(scores_BC: np.ndarray, label_B: np.ndarray, coverage: float, by_class: bool) -> dict[str, float]:
    rng, rows = np.random.default_rng(0), []
    right_B = scores_BC[np.arange(len(label_B)), label_B]
    names = [str(c) for c in range(scores_BC.shape[1])] if by_class else None
    for _ in range(SPLITS):
        order = rng.permutation(len(label_B))
        calibrate, judge = order[: len(order) // 2], order[len(order) // 2 :]
        found = Conformal.fit(right_B[calibrate], label_B[calibrate], coverage, names)
        member = found(torch.from_numpy(scores_BC[judge])).numpy()
        covered = member[np.arange(len(judge)), label_B[judge]]
        rank = rank_of(coverage, len(calibrate))
        law = betabinom(len(judge), rank, len(calibrate) + 1 - rank)
        inside = law.ppf(0.025) <= covered.sum() <= law.ppf(0.975)
        worst = min(covered[label_B[judge] == c].mean() for c in np.unique(label_B[judge]))
        rows.append(
            (covered.mean(), law.mean() / len(judge), inside, member.sum(1).mean(), (~member.any(1)).mean(), worst)
        )
    names_ = ("coverage", "expected", "inside", "size", "empty", "worst")
    return dict(zip(names_, np.mean(rows, axis=0).tolist(), strict=True))


def main() -> None:
    print(f"{date.today()}\n")
    print("| task | rule | score | asked for | coverage | expected | inside | size | empty | worst class |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for task in (TASKS["digits"], TASKS["digit_pairs"]):
        for alpha in (None, 0.01):
            results, label_B = decisions(task, alpha)
            accuracy = np.mean([one.prediction == label for one, label in zip(results, label_B, strict=True)])
            rule = f"{Exhaustive() if alpha is None else LikelihoodRatio(alpha)}, {accuracy:.2%} right"
            for name, scores_BC in scores(results).items():
                for coverage in COVERAGES:
                    report(f"{task.name} | {rule} | {name}", split_many(scores_BC, label_B, coverage, False), coverage)
                if np.bincount(label_B).min() // 2 > 1.5 * least_images(0.8):
                    report(f"{task.name} | {rule} | {name}, by class", split_many(scores_BC, label_B, 0.8, True), 0.8)


def report(what: str, n: dict[str, float], coverage: float) -> None:
    inside = "" if "by class" in what else f"{n['inside']:.0%}"  # one law for all images
    expected = "" if "by class" in what else f"{n['expected']:.2%}"
    print(
        f"| {what} | {coverage:.0%} | {n['coverage']:.2%} | {expected} | {inside} | {n['size']:.3f} | {n['empty']:.1%} "
        f"| {n['worst']:.1%} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
