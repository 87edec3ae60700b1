"""What elimination rules save: python benchmarks/bench_elimination.py [--task digits].

Real tasks (tasks.py), with networks trained by `dit_digits.yaml` and so on, whose weights and errors are in
benchmarks/data/ (`make_errors.py` made them). Rules that look at errors only are replayed on the stored errors; those
that look at predictions run the network on all test images.

Agreement is with all draws of all candidates, on the images whose errors are stored. "As alone" is how many of all test
images are decided as without the proposal. Seconds and rows a second are measured with the network, on the first images
(``--timed-rows``). Overhead is the time of the engine over that of the bare network on the very same micro-batches, in
alternating repetitions: the median of the ratios.

With ``--lost 1000``, something else: of at least so many decisions of LikelihoodRatio(0.002) alone, how many a search
does not keep, and how many come out otherwise after it. All test images are decided with seed 0, then 1, and so on;
after each there is a row of all decisions so far.
"""

import argparse
import math
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from tasks import TASKS, Task

from lightning_diffclf import (
    Classification,
    DiffusionClassifier,
    Draws,
    Exhaustive,
    LikelihoodRatio,
    LinearProbe,
    PairedTest,
)
from lightning_diffclf.classifier import CovarianceSearch
from lightning_diffclf.classifier.search import Search
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors
from lightning_diffclf.results.replay import replay
from lightning_diffclf.results.statistics import wilson

ALPHAS = (0.05, 0.01, 0.002)
MICROBATCH = 256
LOST = ("task", "search", "decisions", "not kept", "decided otherwise", "accuracy", "kept", "NFE / image")


def stored(task: Task, classifier: DiffusionClassifier, folder: Path) -> StoredErrors:
    """The committed errors as a file that replays."""
    images, _, ids = task.test()
    dims = classifier.denoiser.encode(images[:1])[0].numel()
    errors_BKS, labels, timesteps = task.errors()
    np.testing.assert_allclose(timesteps, classifier.timesteps_S, rtol=1e-6)  # stored in float64
    path = folder / f"{task.name}.parquet"
    writer = ErrorsWriter(path, ErrorsInfo.of(classifier))
    for image_id, errors_KS, label in zip(ids[: len(labels)], errors_BKS, labels, strict=True):
        candidates, draws = errors_KS.shape
        scores = torch.from_numpy(errors_KS.mean(1))
        kept = torch.from_numpy(errors_KS.astype(np.float32))
        every = torch.full((candidates,), draws)
        unused = {"prediction": 0, "candidate": 0, "margin": 0.0, "abstained": False}
        named = classifier.denoiser.candidates
        writer.add(
            Classification(
                image_id=image_id,
                candidates=named,
                candidates_K=torch.arange(candidates),
                scores_K=scores,
                differences_K=scores - scores.min(),
                draws_K=every,
                nfe=candidates * draws,
                dims=dims,
                timesteps_S=classifier.timesteps_S,
                errors_KS=kept,
                **unused,
            ),
            int(label),
        )
    writer.close()
    return StoredErrors(path)


def timed(classifier: DiffusionClassifier, images: torch.Tensor, ids: list[int], repetitions: int) -> dict[str, float]:
    """Medians over repetitions that alternate between the engine and the bare network on the same micro-batches."""
    module, calls = classifier.denoiser, []
    name = "predict_shared" if hasattr(module, "predict_shared") else "predict"
    predict = getattr(module, name)
    setattr(module, name, lambda *rows: calls.append(rows) or predict(*rows))
    nfe = sum(result.nfe for result in classifier(images, ids))
    setattr(module, name, predict)
    engine, bare = [], []
    for _ in range(repetitions):
        start = time.perf_counter()
        classifier(images, ids)
        engine.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            for rows in calls:
                predict(*rows)
        bare.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(engine) / len(images),
        "rate": nfe / statistics.median(engine),
        "bare": nfe / statistics.median(bare),
        "overhead": statistics.median(e / b for e, b in zip(engine, bare, strict=True)),
    }


def probe(task: Task, classifier: DiffusionClassifier) -> LinearProbe:
    """Fitted to the images that the network was trained on."""
    data = task.data()
    data.setup()
    train = data.train.parts
    batches = zip(train["image"][:20_000].split(500), train["label"][:20_000].split(500), strict=True)
    return LinearProbe("net.blocks.2", timestep=0.2, top=task.top).fit(classifier.denoiser, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (default: all)")
    parser.add_argument("--timed-rows", type=int, default=30_000, help="rows of a timing, where all images have more")
    parser.add_argument("--lost", type=int, metavar="DECISIONS", help="count what the search loses instead")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    if args.lost:
        print(f"\n| {' | '.join(LOST)} |\n|{' --- |' * len(LOST)}")
    for name in args.task or TASKS:
        if args.lost:
            count_lost(TASKS[name], args.lost)
        else:
            run_task(TASKS[name], args.timed_rows)


def count_lost(task: Task, least: int) -> None:
    images, labels, ids = task.test()
    network, rule = task.network(), LikelihoodRatio(ALPHAS[-1], inflation=task.inflation)
    searches: dict[str, Search | None] = {"none": None, repr(task.search): task.search}
    if task.learns:
        learnt = CovarianceSearch().fit(network, [(task.unlabelled(), None)])
        searches[f"CovarianceSearch(), fitted to {task.learns} images"] = learnt
    found: dict[str, list[Classification]] = {name: [] for name in searches}
    for seed in range(math.ceil(least / len(images))):
        settings = {"draws": Draws(task.draws, seed=seed), "elimination": rule, "microbatch": MICROBATCH}
        for name, search in searches.items():
            found[name] += DiffusionClassifier(network, **settings, proposal=search)(images, ids)
        for name, results in found.items():
            pairs = list(zip(found["none"], results, strict=True))
            kept = [alone.candidate in after.candidates_K for alone, after in pairs]
            same = [alone.prediction == after.prediction for alone, after in pairs]
            lost = [f"{wilson(some.count(False), len(pairs))} ({some.count(False)})" for some in (kept, same)]
            right = np.mean([after.prediction for _, after in pairs] == np.tile(labels, seed + 1))
            count, nfe = np.mean([(len(after.candidates_K), after.nfe) for _, after in pairs], axis=0)
            numbers = f"{lost[0]} | {lost[1]} | {right:.2%} | {count:.1f} | {nfe:.1f}"
            print(f"| {task.name} | {name} | {len(pairs)} | {numbers} |", flush=True)


def run_task(task: Task, timed_rows: int) -> None:
    images, labels, ids = task.test()
    everything = DiffusionClassifier(task.network(), Draws(task.draws))
    with tempfile.TemporaryDirectory() as folder:
        errors = stored(task, everything, Path(folder))
        exhaustive = replay(errors, Exhaustive())
        replays = {rule: replay(errors, rule) for rule in (task.stages, *(PairedTest(alpha) for alpha in ALPHAS))}
    reference = np.array([result.prediction for result in exhaustive.results])
    print(
        f"\n## {task.name}\n\n{len(images)} images, {len(everything.denoiser.candidates)} candidates, {task.draws} "
        f"draws; all errors of {len(reference)} images. The search is {task.search}."
    )
    proposals: dict[str, Search | None] = {"": None}
    if task.top:
        small = proposals["probe"] = probe(task, everything)
        denoiser = everything.denoiser
        recall, agreeing = (small.recall(denoiser, images, of.tolist()) for of in (labels, reference))
        print(
            f"The linear probe's top {small.top} hold the right class of {recall:.2%}, the class that all draws decide "
            f"for of {agreeing:.2%}."
        )
    proposals["search"] = task.search
    if task.learns:
        proposals["covariance search"] = CovarianceSearch().fit(everything.denoiser, [(task.unlabelled(), None)])
    print(
        "\n| rule | accuracy | agreement | as alone | NFE / image | fewer than exhaustive | fewer than stages | "
        "s / image | rows / s | overhead |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    rules = [(rule, "") for rule in (Exhaustive(), *replays)]
    rules += [(LikelihoodRatio(alpha, inflation=task.inflation), name) for name in proposals for alpha in ALPHAS]
    full = []  # rows a second of the bare network on full micro-batches
    alone: dict[object, np.ndarray] = {}
    for rule, name in rules:
        known = exhaustive if isinstance(rule, Exhaustive) else replays.get(rule)
        classifier = DiffusionClassifier(
            everything.denoiser, everything.draws, elimination=rule, microbatch=MICROBATCH, proposal=proposals[name]
        )
        same = ""
        if known is None:
            results = classifier(images, ids)
            decided = np.array([result.prediction for result in results])
            accuracy, nfe = (decided == labels.numpy()).mean(), np.mean([result.nfe for result in results])
            agreement = (decided[: len(reference)] == reference).mean()
            same = f"{(decided == alone.setdefault(rule, decided)).mean():.2%}"  # the first time, it is alone
        else:
            accuracy, agreement, nfe = known.accuracy, known.agreement, known.nfe_per_image
        count = min(len(images), max(1, int(timed_rows / nfe)))
        time_ = timed(classifier, images[:count], ids[:count], repetitions=3)
        if isinstance(rule, Exhaustive):
            full.append(time_["bare"])
        text = f"{rule}".replace(", growth=1.2", "").replace(", inflation=1.0", "") + (
            f" after the {name}" if name else ""
        )
        fewer = [other.nfe_per_image / nfe for other in (exhaustive, replays[task.stages])]
        print(
            f"| {text} | {accuracy:.2%} | {agreement:.2%} | {same} | {nfe:.1f} | {fewer[0]:.1f} | {fewer[1]:.1f} | "
            f"{time_['seconds']:.4f} | {time_['rate']:.0f} | {time_['overhead']:.2f} |",
            flush=True,
        )
    print(f"\nBare network on full micro-batches: {full[0]:.0f} rows / s.")


if __name__ == "__main__":
    main()
