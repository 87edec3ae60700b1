"""What elimination rules save: python benchmarks/bench_elimination.py [--task digits].

Two real tasks, with networks trained by `dit_digits.yaml` and `dit_digit_pairs.yaml`, whose weights and errors are in
benchmarks/data/ (`make_errors.py` made them). Rules that look at errors only are replayed on the stored errors of all
test images; those that look at predictions run the network on all of them.

Agreement is with all draws of all candidates (the stored errors). Seconds and rows a second are measured with the
network, on all images or on the first ones (``--timed-rows``). Overhead is the time of the engine over that of the bare
network on the very same micro-batches, in alternating repetitions: the median of the ratios.
"""

import argparse
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from make_errors import DATA, TASKS, load_errors, network
from safetensors.torch import load_file

from lightning_diffclf import (
    ClassConditionalDiT,
    Classification,
    DiffusionClassifier,
    Draws,
    Exhaustive,
    GradientSearch,
    LikelihoodRatio,
    LinearProbe,
    PairedTest,
    Stages,
)
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors
from lightning_diffclf.results.replay import replay

ALPHAS = (0.05, 0.01, 0.002)
PAPER = {"digits": Stages((10, 100), (5, 1)), "digit_pairs": Stages((2, 6, 12, 64), (20, 10, 5, 1))}
MICROBATCH = 256


def stored(task: str, classifier: DiffusionClassifier, ids: list[int], folder: Path) -> StoredErrors:
    """The committed errors as a file that replays."""
    errors_BKS, labels, timesteps = load_errors(task)
    np.testing.assert_allclose(timesteps, classifier.timesteps_S, rtol=1e-6)  # stored in float64
    path = folder / f"{task}.parquet"
    writer = ErrorsWriter(path, ErrorsInfo.of(classifier))
    for image_id, errors_KS, label in zip(ids, errors_BKS, labels, strict=True):
        candidates, draws = errors_KS.shape
        scores = torch.from_numpy(errors_KS.mean(1))
        kept = torch.from_numpy(errors_KS.astype(np.float32))
        every = torch.full((candidates,), draws)
        unused = {"label": 0, "candidate": 0, "margin": 0.0, "abstained": False}
        writer.add(
            Classification(
                image_id=image_id,
                candidates_K=torch.arange(candidates),
                scores_K=scores,
                differences_K=scores - scores.min(),
                draws_K=every,
                nfe=candidates * draws,
                dims=128 if task == "digit_pairs" else 64,
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
    predict = module.predict
    module.predict = lambda *rows: calls.append(rows) or predict(*rows)
    results = list(classifier(images, ids))
    module.predict = predict
    engine, bare = [], []
    for _ in range(repetitions):
        start = time.perf_counter()
        list(classifier(images, ids))
        engine.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            for rows in calls:
                predict(*rows)
        bare.append(time.perf_counter() - start)
    nfe = sum(r.nfe for r in results)
    return {
        "seconds": statistics.median(engine) / len(images),
        "rate": nfe / statistics.median(engine),
        "bare": nfe / statistics.median(bare),
        "overhead": statistics.median(e / b for e, b in zip(engine, bare, strict=True)),
        "labels": [r.label for r in results],
        "nfe": nfe / len(images),
    }


def probe(module: ClassConditionalDiT, data: DigitsDataModule, top: int) -> LinearProbe:
    """Fitted to the images that the network was trained on."""
    train = data.train.parts
    batches = zip(train["image"][:20_000].split(500), train["label"][:20_000].split(500), strict=True)
    return LinearProbe("net.blocks.2", timestep=0.2, top=top).fit(module, batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="may be repeated (default: all)")
    parser.add_argument("--timed-rows", type=int, default=30_000, help="rows of a timing, where all images have more")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
    for task in args.task or TASKS:
        run_task(task, args.timed_rows)


def run_task(task: str, timed_rows: int) -> None:
    data_module, draws = TASKS[task]
    data = data_module()
    data.setup()
    module = network(task)
    module.load_state_dict(load_file(DATA / f"{task}.safetensors"))
    images, labels, ids = (data.test.parts[name] for name in ("image", "label", "id"))
    everything = DiffusionClassifier(module, Draws(draws))
    with tempfile.TemporaryDirectory() as folder:
        errors = stored(task, everything, ids.tolist(), Path(folder))
        exhaustive = replay(errors, Exhaustive())
        replays = {rule: replay(errors, rule) for rule in (PAPER[task], *(PairedTest(alpha) for alpha in ALPHAS))}
    reference = np.array([r.label for r in exhaustive.results])
    stages_nfe = replays[PAPER[task]].nfe_per_image
    small = probe(module, data, top=3 if task == "digits" else 20)
    recall = small.recall(module, images, labels.tolist())
    agreeing = small.recall(module, images, reference.tolist())
    print(
        f"\n{task}: {len(images)} images, {len(module.candidates)} candidates, {draws} draws. The linear probe's top "
        f"{small.top} hold the right class of {recall:.2%}, the class that all draws decide for of {agreeing:.2%}.\n"
    )
    print(
        "| rule | accuracy | agreement | NFE / image | fewer than exhaustive | fewer than stages | s / image | "
        "rows / s | overhead |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rules = [(Exhaustive(), None), *((rule, None) for rule in replays)]
    rules += [(LikelihoodRatio(alpha), None) for alpha in ALPHAS]
    rules += [(LikelihoodRatio(alpha), small) for alpha in ALPHAS]
    rules += [(LikelihoodRatio(alpha), GradientSearch()) for alpha in ALPHAS]
    full = []  # rows a second of the bare network on full micro-batches
    for rule, proposal in rules:
        known = exhaustive if isinstance(rule, Exhaustive) else replays.get(rule)
        count = len(images) if known is None else min(len(images), max(4, int(timed_rows / known.nfe_per_image)))
        classifier = DiffusionClassifier(
            module, Draws(draws), elimination=rule, microbatch=MICROBATCH, proposal=proposal
        )
        time_ = timed(classifier, images[:count], ids[:count].tolist(), repetitions=3)
        if isinstance(rule, Exhaustive):
            full.append(time_["bare"])
        if known is None:
            decided = np.array(time_["labels"])
            accuracy, agreement, nfe = (decided == labels.numpy()).mean(), (decided == reference).mean(), time_["nfe"]
        else:
            accuracy, agreement, nfe = known.accuracy, known.agreement, known.nfe_per_image
        after = "" if proposal is None else f" after the {'probe' if proposal is small else 'search'}"
        name = f"{rule}".replace(", growth=1.2", "").replace(", inflation=1.0", "")
        print(
            f"| {name}{after} | {accuracy:.2%} | {agreement:.2%} | {nfe:.1f} | "
            f"{exhaustive.nfe_per_image / nfe:.1f} | {stages_nfe / nfe:.1f} | {time_['seconds']:.4f} | "
            f"{time_['rate']:.0f} | {time_['overhead']:.2f} |",
            flush=True,
        )
    print(f"\nBare network on full micro-batches: {full[0]:.0f} rows / s.")


if __name__ == "__main__":
    main()
