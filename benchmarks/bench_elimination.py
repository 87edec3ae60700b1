"""What elimination rules save: python benchmarks/bench_elimination.py [digits|digit_pairs].

Two real tasks, with networks trained by `dit_digits.yaml` and `dit_digit_pairs.yaml`, whose weights and errors are in
benchmarks/data/ (`make_errors.py` made them). Rules that look at errors only are replayed on the stored errors of all test
images; those that look at predictions run the network on all of them.

Agreement is with all draws of all candidates (the stored errors). Seconds and rows a second are measured with the network, on
all images or on the first ones (``--timed-rows``). Overhead is seconds an image over NFE / (rows a second of the bare network),
which is timed on micro-batches of the same size before, between and after.
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
    LikelihoodRatio,
    PairedTest,
    Stages,
)
from lightning_diffclf.classifier import LinearProbe
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors
from lightning_diffclf.results.replay import replay

ALPHAS = (0.05, 0.01, 0.002)
PAPER = {"digits": Stages((10, 100), (5, 1)), "digit_pairs": Stages((2, 6, 12, 64), (20, 10, 5, 1))}
MICROBATCH = 256


def stored(task: str, classifier: DiffusionClassifier, ids: list[int], folder: Path) -> StoredErrors:
    """The committed errors as a file that replays."""
    errors_BKS, labels, timesteps = load_errors(task)
    assert timesteps.tolist() == classifier.timesteps_S.tolist()
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


@torch.no_grad()
def bare_rows_per_second(module: ClassConditionalDiT, images: torch.Tensor, seconds: float) -> float:
    rows = torch.arange(MICROBATCH)
    x, candidate = images[rows % len(images)], rows % len(module.candidates)
    time_values = torch.linspace(0.01, 0.99, MICROBATCH)
    module.predict(x, time_values, candidate)
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        module.predict(x, time_values, candidate)
        calls += 1
    return calls * MICROBATCH / (time.perf_counter() - start)


def probe(module: ClassConditionalDiT, data: DigitsDataModule, top: int) -> LinearProbe:
    """Fitted to the images that the network was trained on."""
    train = data.train.parts
    batches = zip(train["image"][:20_000].split(500), train["label"][:20_000].split(500), strict=True)
    return LinearProbe(module, "net.blocks.2", timestep=0.2, top=top).fit(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--timed-rows", type=int, default=60_000, help="rows of a timing, where all images have more")
    args = parser.parse_args()
    print(
        f"{date.today()}, {platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
        f"{platform.python_version()}"
    )
    for task in args.tasks:
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
    recall = small.recall(images, labels.tolist())
    agreeing = small.recall(images, reference.tolist())
    print(f"\n{task}: {len(images)} images, {len(module.candidates)} candidates, {draws} draws; linear probe: top {small.top} have the "
          f"right class of {recall:.2%}, the class that all draws decide for of {agreeing:.2%}\n")  # fmt: skip
    print(
        "| rule | accuracy | agreement | NFE / image | fewer than exhaustive | fewer than stages | s / image | rows / s | overhead |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rules = [(Exhaustive(), None), *((rule, None) for rule in replays)]
    rules += [(LikelihoodRatio(alpha), None) for alpha in ALPHAS]
    rules += [(LikelihoodRatio(alpha), small) for alpha in ALPHAS]
    bare = [bare_rows_per_second(module, images, 3)]
    for rule, proposal in rules:
        known = exhaustive if isinstance(rule, Exhaustive) else replays.get(rule)
        count = len(images) if known is None else min(len(images), max(4, int(timed_rows / known.nfe_per_image)))
        classifier = DiffusionClassifier(
            module, Draws(draws), elimination=rule, microbatch=MICROBATCH, proposal=proposal
        )
        start = time.perf_counter()
        results = list(classifier(images[:count], ids[:count].tolist()))
        seconds = (time.perf_counter() - start) / count
        bare.append(bare_rows_per_second(module, images, 3))
        timed_nfe = sum(r.nfe for r in results) / count
        if known is None:
            decided = np.array([r.label for r in results])
            accuracy, agreement, nfe = (decided == labels.numpy()).mean(), (decided == reference).mean(), timed_nfe
        else:
            accuracy, agreement, nfe = known.accuracy, known.agreement, known.nfe_per_image
        overhead = seconds / (timed_nfe / statistics.mean(bare[-2:]))
        name = f"{rule}".replace(", growth=1.2", "").replace(", inflation=1.0", "") + " after the probe" * (
            proposal is not None
        )
        print(
            f"| {name} | {accuracy:.2%} | {agreement:.2%} | {nfe:.1f} | {exhaustive.nfe_per_image / nfe:.1f} | "
            f"{stages_nfe / nfe:.1f} | {seconds:.4f} | {timed_nfe / seconds:.0f} | {overhead:.2f} |",
            flush=True,
        )
    print(f"\nBare network: {statistics.median(bare):.0f} rows / s ({min(bare):.0f} … {max(bare):.0f}).")


if __name__ == "__main__":
    main()
