"""Engine overhead and memory: python benchmarks/bench_engine.py [--device cuda].

Overhead: seconds of a classification over seconds of bare network calls on the very same micro-batches, in alternating
repetitions of one process: the median of the ratios, and the ratio of the fastest repetitions. "Engine alone" is the
time of a micro-batch with a network that returns zeros.
Elimination: what a rule adds at 1000 candidates and 4 x 32 x 32 latents, with a network that returns zeros (so that no
candidate ever falls, the worst case), as a share of the time that the smallest published DiT needs for the same rows.
Memory: peak of what the engine allocates (tracemalloc for numpy, the allocator's peak on a GPU) as draws and
candidates grow.
"""

import argparse
import platform
import statistics
import time
import tracemalloc
from datetime import date

import torch
from measuring import randomised, synchronize

from lightning_diffclf import (
    Candidates,
    ClassConditionalDiT,
    DiffusionClassifier,
    DiT,
    Draws,
    Exhaustive,
    LikelihoodRatio,
    NoiseSchedule,
    PairedTest,
    Stages,
)


def network(num_classes: int, device: str, hidden_size: int = 64, depth: int = 4) -> ClassConditionalDiT:
    """The demo's DiT, with random weights (zero weights would compute faster than trained ones)."""
    module = ClassConditionalDiT(
        input_size=8,
        in_channels=1,
        num_classes=num_classes,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=4,
        latents=False,
        learn_sigma=False,
    )
    return randomised(module, std=0.05).eval().to(device)


def record(module: ClassConditionalDiT, classify) -> list[tuple[torch.Tensor, ...]]:
    """The rows of every network call of a classification."""
    calls, predict = [], module.predict
    module.predict = lambda *rows: calls.append(rows) or predict(*rows)
    classify()
    module.predict = predict
    return calls


@torch.no_grad()
def bare_seconds(module: ClassConditionalDiT, calls: list[tuple[torch.Tensor, ...]], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for rows in calls:
        module.predict(*rows)
    synchronize(device)
    return time.perf_counter() - start


def overhead(
    module: ClassConditionalDiT, images: torch.Tensor, rule, draws: int, microbatch: int, repetitions: int
) -> dict[str, float]:
    classifier = DiffusionClassifier(module, Draws(draws), elimination=rule, microbatch=microbatch)
    device = images.device.type
    calls = record(module, lambda: list(classifier(images)))
    engine, bare = [], []
    for _ in range(repetitions):
        start = time.perf_counter()
        rows = sum(result.nfe for result in classifier(images))
        engine.append(time.perf_counter() - start)
        bare.append(bare_seconds(module, calls, device))
    ratios = [e / b for e, b in zip(engine, bare, strict=True)]
    return {
        "rows": rows,
        "seconds": statistics.median(engine),
        "ratio": statistics.median(ratios),
        "best": min(engine) / min(bare),
    }


def own_milliseconds(rule, draws: int, microbatch: int, images: int, device: str, repetitions: int) -> float:
    """What the engine itself takes for a full micro-batch: with a network that returns zeros at once."""
    module = network(10, device)
    module.predict = lambda x_t, t, candidate: torch.zeros_like(x_t)
    pixels = torch.rand(images, 1, 8, 8, device=device) * 2 - 1
    classifier = DiffusionClassifier(module, Draws(draws), elimination=rule, microbatch=microbatch)
    took = []
    for _ in range(repetitions):
        start = time.perf_counter()
        rows = sum(result.nfe for result in classifier(pixels))
        took.append((time.perf_counter() - start) / rows * microbatch * 1000)
    return statistics.median(took)


class Latents:
    """1000 classes of 4 x 32 x 32 latents; the network returns zeros."""

    def __init__(self) -> None:
        self.schedule = NoiseSchedule.linear()
        self.candidates = Candidates([str(k) for k in range(1000)])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x_t)


def seconds_per_draw(rule, device: str, draws: int = 4, repetitions: int = 5) -> float:
    latents = torch.randn(1, 4, 32, 32, device=device)
    classifier = DiffusionClassifier(Latents(), Draws(draws), elimination=rule, microbatch=256)
    took = []
    for _ in range(repetitions):
        synchronize(device)
        start = time.perf_counter()
        list(classifier(latents))
        took.append((time.perf_counter() - start) / draws)
    return statistics.median(took)


@torch.no_grad()
def network_seconds_per_draw(device: str, rows: int = 32) -> float:
    dit = DiT.from_name("DiT-S/2", input_size=32).eval().to(device)
    x, t, y = torch.randn(rows, 4, 32, 32, device=device), torch.full((rows,), 500.0), torch.arange(rows)
    t, y = t.to(device), y.to(device)
    dit(x, t, y)
    synchronize(device)
    start = time.perf_counter()
    for _ in range(3):
        dit(x, t, y)
    synchronize(device)
    return (time.perf_counter() - start) / 3 / rows * 1000


def peak_bytes(draws: int, candidates: int, device: str) -> int:
    module = network(candidates, device, hidden_size=16, depth=1)
    classifier = DiffusionClassifier(module, Draws(draws), microbatch=256)
    pixels = torch.rand(4, 1, 8, 8, device=device) * 2 - 1
    list(classifier(pixels[:1], candidates=[0]))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        list(classifier(pixels))
        return torch.cuda.max_memory_allocated() - before
    tracemalloc.start()
    list(classifier(pixels))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"{date.today()}, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
          f"{platform.python_version()}\n")  # fmt: skip
    print("| rule | draws | micro-batch | rows | seconds | engine / bare | fastest / fastest | engine alone, ms |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for rule, draws, microbatch in (
        (Exhaustive(), 100, 256),
        (Exhaustive(), 100, 64),
        (Stages((10, 100), (5, 1)), 100, 256),
        (Stages((2, 4, 8, 16), (8, 4, 2, 1)), 16, 256),
    ):
        pixels = torch.rand(args.images, 1, 8, 8, device=args.device) * 2 - 1
        r = overhead(network(10, args.device), pixels, rule, draws, microbatch, args.repetitions)
        own = own_milliseconds(rule, draws, microbatch, args.images, args.device, args.repetitions)
        numbers = f"{r['rows']} | {r['seconds']:.2f} | {r['ratio']:.3f} | {r['best']:.3f} | {own:.2f}"
        print(f"| {rule} | {draws} | {microbatch} | {numbers} |", flush=True)
    network_time = network_seconds_per_draw(args.device)
    bare = seconds_per_draw(Exhaustive(), args.device)
    print(f"\nA draw of 1000 candidates takes DiT-S/2 {network_time:.2f} s, the engine alone {bare:.3f} s.\n")
    print("| rule | seconds it adds to a draw | share of the network's time |\n| --- | --- | --- |")
    for rule in (PairedTest(growth=1), LikelihoodRatio(growth=1)):
        added = seconds_per_draw(rule, args.device) - bare
        print(f"| {rule} | {added:.3f} | {added / network_time:.2%} |", flush=True)
    print("\n| draws | candidates | peak of the engine, MB |\n| --- | --- | --- |")
    for draws, candidates in ((10, 10), (100, 10), (1000, 10), (10, 1000), (100, 1000)):
        print(f"| {draws} | {candidates} | {peak_bytes(draws, candidates, args.device) / 1e6:.2f} |")


if __name__ == "__main__":
    main()
