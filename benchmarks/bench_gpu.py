"""What one GPU makes of the networks, in at most eight minutes: make gpu, or python benchmarks/bench_gpu.py.

Needs torch, lightning, timm, einops, torchmetrics, scipy, numpy and pytest, nothing else, and no network. On a machine
without a GPU the same is done at toy size, which measures nothing but shows that it works.

* GPU tests: tests/test_gpu.py.
* DiT-XL/2 and DiT-S/2 as a classifier calls them, with weights in bf16: rows of a network call in a second, by size of
  the micro-batch; at the fastest also with autocast, channels-last, as a CUDA graph, compiled, and compiled with CUDA
  graphs, which is ``DiffusionClassifier(compile=True)``. Utilisation is the share of the matmul rate measured in the
  same process that the network's floating point operations come to.
* Training in bf16-mixed: ClassConditionalDiT under a Trainer with EMA, eager and compiled, beside a plain loop over a
  DiT written with nothing but torch: same size, batch, loss, AdamW and average.
* Engine: seconds of a classification over those of the bare network calls.

Each part runs in a process of its own, which is ended when its time is over: a part that fails or hangs is a line of
the result, and the others are measured. The result is written after each line, to gpu_<device>_<date>.md.
"""

import argparse
import logging
import os
import platform
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import timm
import torch
import torch._dynamo  # here, so that no part has to
from apart import lines_of
from bench_engine import network, overhead
from measuring import Stopwatch, forward_flops, matmul_rate, randomised, synchronize
from plain_dit import PlainDiT, plain_training
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_diffclf import EMA, ClassConditionalDiT, DiT, Exhaustive, LikelihoodRatio
from lightning_diffclf.classifier.device import CompiledPredict
from lightning_diffclf.errors import first_line
from lightning_diffclf.files import write_text
from lightning_diffclf.models.dit import SIZES

HERE = Path(__file__).resolve().parent
BF16 = torch.bfloat16
WARMUP = 3  # training steps before those that are timed


class Sizes(NamedTuple):
    """What is measured on a device.

    Attributes:
        networks: Arguments of each network.
        batches: Images of a training step of each.
        microbatches: Rows of a network call that are tried.
        matmul: Side of the matrices that the device's rate is measured with.
        seconds: That a call is measured for.
        steps: Training steps that are timed.
        digits: Images that the engine classifies with the demo's network.
        latents: And with DiT-S/2.
        draws: Of each.
    """

    networks: dict[str, dict[str, Any]]
    batches: dict[str, int]
    microbatches: tuple[int, ...]
    matmul: int
    seconds: float
    steps: int
    digits: int
    latents: int
    draws: int


def arguments(hidden_size: int, depth: int, num_heads: int, side: int) -> dict[str, Any]:
    """Of a DiT with patches of 2 on latents."""
    shape = {"input_size": side, "patch_size": 2, "in_channels": 4, "learn_sigma": False}
    return shape | {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}


ON_GPU = Sizes(
    networks={f"DiT-{size}/2": arguments(*SIZES[size], side=32) for size in ("XL", "S")},
    batches={"DiT-XL/2": 64, "DiT-S/2": 256},
    microbatches=(8, 32, 64, 128, 256, 512, 1024),
    matmul=8192,
    seconds=1.0,
    steps=20,
    digits=128,
    latents=4,
    draws=4,
)
ON_CPU = Sizes(
    networks={"DiT-S/2": arguments(16, 1, 2, side=8)},
    batches={"DiT-S/2": 4},
    microbatches=(4, 8),
    matmul=128,
    seconds=0.01,
    steps=2,
    digits=4,
    latents=1,
    draws=2,
)


class Place(NamedTuple):
    """Where a part runs.

    Attributes:
        device: cuda or cpu.
        end: When its time is over, by ``time.monotonic()``.
    """

    device: str
    end: float

    @property
    def sizes(self) -> Sizes:
        return ON_GPU if self.device == "cuda" else ON_CPU

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


class Measured(NamedTuple):
    """Seconds of what was measured and the peak of the GPU's memory in GiB, or why there are none."""

    seconds: float
    peak: str = "–"
    why: str | None = None


def measured(work: Callable[[], float], place: Place, needs: float = 0.0) -> Measured:
    """What ``work`` returns, if ``needs`` seconds are left; that memory does not suffice, or a failure, is a result."""
    if place.left < needs:
        return Measured(0.0, why="left out: no time")
    if place.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds = work()
    except torch.OutOfMemoryError:
        return Measured(0.0, why="out of memory")
    except Exception as error:
        traceback.print_exc()
        return Measured(0.0, why=f"failed: {type(error).__name__}: {first_line(error)}")
    return Measured(seconds, f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if place.device == "cuda" else "–")


def seconds_of(make_call: Callable[[], Callable[[], object]], place: Place) -> float:
    """Median seconds of a call over three rounds, in each of which calls do not wait for one another."""
    call = make_call()
    for _ in range(2):
        call()
    synchronize(place.device)
    start = time.perf_counter()
    call()
    synchronize(place.device)
    count = max(1, round(place.sizes.seconds / 3 / (time.perf_counter() - start)))
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(place.device)
        rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def header(*names: str) -> Iterator[str]:
    yield row(*names)
    yield row(*["---"] * len(names))


# --- parts: generators of lines ------------------------------------------------------------------------------------


def machine(place: Place) -> Iterator[str]:
    """The first line names the device."""
    cpu = f"{platform.machine()} CPU"
    if place.device == "cuda":
        about = torch.cuda.get_device_properties(0)
        yield f"# One GPU, {about.name}, {date.today()}"
        yield f"\n{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} multiprocessors;"
        yield f"{os.cpu_count()} cores of the {cpu};"
    else:
        yield f"# At toy size, {cpu}, {date.today()}"
        yield "\nNo GPU: nothing is compiled, and speeds mean nothing;"
    yield f"torch {torch.__version__}, CUDA {torch.version.cuda}, lightning {L.__version__}, timm {timm.__version__},"
    yield f"Python {platform.python_version()}; `python benchmarks/bench_gpu.py`."


class Outcomes:
    """A plugin of pytest that counts."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # a fixture that fails, a test that is skipped
            self.counts[report.outcome] += 1
            if report.failed:
                self.failures.append(f"* failed: {report.nodeid}: {report.longreprtext.splitlines()[-1]}")


def gpu_tests(place: Place) -> Iterator[str]:
    outcomes = Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers --import-mode=importlib"]
    status = pytest.main([str(HERE.parent / "tests" / "test_gpu.py"), *options], plugins=[outcomes])
    yield ", ".join(f"{count} {outcome}" for outcome, count in outcomes.counts.items()) + f"; status {int(status)}."
    yield from outcomes.failures


def rows_of_a_call(rows: int, name: str, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, times and classes, as a micro-batch has them."""
    side = place.sizes.networks[name]["input_size"]
    x = torch.randn(rows, 4, side, side, device=place.device, dtype=BF16)
    return x, torch.full((rows,), 500.0, device=place.device), torch.arange(rows, device=place.device) % 1000


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """Replays a call, which was recorded after it had been warmed up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return lambda inputs=call: graph.replay()  # which reads them where they were


def as_classifier(place: Place, name: str) -> Iterator[str]:
    """Rows a second of a network."""
    torch.set_grad_enabled(False)
    settings = place.sizes.networks[name]
    flops, rate = forward_flops(lambda: DiT(**settings)), matmul_rate(place.device, BF16, place.sizes.matmul)
    yield f"Matmul: {rate / 1e12:.2f} TFLOP/s; a row: {flops / 1e9:.4g} GFLOP.\n"
    with torch.device(place.device):
        float32 = randomised(DiT(**settings)).eval()
    half = deepcopy(float32).to(BF16)

    def eager(rows: int) -> Callable[[], object]:
        return partial(half, *rows_of_a_call(rows, name, place))

    def autocast(rows: int) -> Callable[[], object]:
        x, t, y = rows_of_a_call(rows, name, place)

        def call() -> object:
            with torch.autocast(place.device, BF16):
                return float32(x.float(), t, y)

        return call

    def channels_last(rows: int) -> Callable[[], object]:
        x, t, y = rows_of_a_call(rows, name, place)
        net = deepcopy(half).to(memory_format=torch.channels_last)
        return partial(net, x.to(memory_format=torch.channels_last), t, y)

    def compiled(rows: int) -> Callable[[], object]:
        return partial(torch.compile(half, dynamic=False), *rows_of_a_call(rows, name, place))

    def compiled_graphs(rows: int) -> Callable[[], object]:
        return partial(CompiledPredict(SimpleNamespace(predict=half), rows), *rows_of_a_call(rows, name, place))

    def line(how: str, rows: int, make: Callable[[int], Callable[[], object]], needs: float = 0.0) -> tuple[str, float]:
        found = measured(lambda: seconds_of(lambda: make(rows), place), place, needs)
        if found.why:
            return row(how, rows, found.why, "", ""), 0.0
        speed = rows / found.seconds
        return row(how, rows, f"{speed:,.1f}", f"{speed * flops / rate:.1%}", found.peak), speed

    yield from header("how", "rows", "rows/s", "utilisation", "peak memory, GiB")
    fastest, best = 0, 0.0
    for rows in place.sizes.microbatches:
        text, speed = line("eager", rows, eager, needs=8 * rows / best if best else 0)
        yield text
        if speed > best:
            fastest, best = rows, speed
        if speed == 0:
            break  # larger ones do not fit either
    if fastest == 0:
        return
    yield line("eager, autocast", fastest, autocast)[0]
    yield line("eager, channels-last", fastest, channels_last)[0]
    if place.device == "cuda":
        for rows in sorted({place.sizes.microbatches[0], fastest}):
            yield line("CUDA graph", rows, lambda rows: graph_of(eager(rows)))[0]
    before = time.monotonic()
    yield line("compiled, CUDA graphs", fastest, compiled_graphs)[0]
    took = time.monotonic() - before
    yield line("compiled", fastest, compiled, needs=took)[0]
    yield f"\nCompiling and measuring took {took:.0f} s."


def under_trainer(place: Place, name: str, compile: bool) -> float:
    """Seconds of a step as train.py makes it, without what only looks on."""
    module = ClassConditionalDiT(**place.sizes.networks[name], compile=compile)
    randomised(module.to(place.device))
    watch, steps = Stopwatch(place.device, WARMUP), WARMUP + place.sizes.steps
    trainer = L.Trainer(
        accelerator="gpu" if place.device == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(), watch],
    )
    trainer.fit(module, DataLoader([batch_of(place, name)] * steps, batch_size=None))
    return watch.seconds


def batch_of(place: Place, name: str) -> dict[str, Tensor]:
    count, side = place.sizes.batches[name], place.sizes.networks[name]["input_size"]
    return {"image": torch.randn(count, 4, side, side), "label": torch.arange(count) % 1000}


def plainly(place: Place, name: str) -> float:
    """Seconds of a step of the plain loop."""
    settings = place.sizes.networks[name]
    with torch.device(place.device):
        net = PlainDiT(*(settings[key] for key in ("input_size", "hidden_size", "depth", "num_heads")))
    steps = plain_training(randomised(net), batch_of(place, name), place.device)
    for _ in range(WARMUP):
        next(steps)
    synchronize(place.device)
    start = time.perf_counter()
    for _ in range(place.sizes.steps):
        next(steps)
    synchronize(place.device)
    return (time.perf_counter() - start) / place.sizes.steps


def training(place: Place, name: str) -> Iterator[str]:
    """Images a second of training steps."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings, batch = place.sizes.networks[name], place.sizes.batches[name]
    flops, rate = 3 * forward_flops(lambda: DiT(**settings)), matmul_rate(place.device, BF16, place.sizes.matmul)
    yield f"Matmul: {rate / 1e12:.2f} TFLOP/s; a training step of one image: {flops / 1e9:.4g} GFLOP; batch {batch}.\n"
    yield from header("step", "images/s", "utilisation", "peak memory, GiB", "of the plain loop's speed")
    plain = measured(lambda: plainly(place, name), place)
    for how, found in (
        ("plain loop, plain DiT", lambda: plain),
        ("Trainer, EMA", lambda: measured(lambda: under_trainer(place, name, compile=False), place)),
        ("the same, compiled", lambda: measured(lambda: under_trainer(place, name, compile=True), place)),
    ):
        step = found()
        if step.why:
            yield row(how, step.why, "", "", "")
        else:
            speed = batch / step.seconds
            ratio = f"{plain.seconds / step.seconds:.2f}" if plain.why is None else "–"
            yield row(how, f"{speed:,.1f}", f"{speed * flops / rate:.1%}", step.peak, ratio)


def engine(place: Place) -> Iterator[str]:
    """What the engine costs on top of the network: of one that takes no time, and of DiT-S/2 with 1,000 classes."""
    sizes, device = place.sizes, place.device
    small = network(10, device), torch.rand(sizes.digits, 1, 8, 8, device=device) * 2 - 1
    side = sizes.networks["DiT-S/2"]["input_size"]
    module = ClassConditionalDiT(**sizes.networks["DiT-S/2"]).to(device)
    large = randomised(module).eval(), torch.randn(sizes.latents, 4, side, side, device=device)
    yield from header("network", "rule", "rows", "seconds", "engine / bare", "fastest / fastest", "peak memory, GiB")
    for name, (denoiser, images), rule in (
        ("the demo's, 10 classes", small, Exhaustive()),
        ("DiT-S/2, 1,000 classes", large, Exhaustive()),
        ("DiT-S/2, 1,000 classes", large, LikelihoodRatio()),
    ):
        found: dict[str, float] = {}

        def work(denoiser=denoiser, images=images, rule=rule, found=found) -> float:
            with torch.autocast(device, BF16):
                found |= overhead(denoiser, images, rule, sizes.draws, 256, 3)
            return found["seconds"]

        done = measured(work, place, needs=1.0)
        if done.why:
            yield row(name, rule, done.why, *[""] * 4)
        else:
            ratios = f"{found['ratio']:.3f}", f"{found['best']:.3f}"
            yield row(name, rule, f"{found['rows']:.0f}", f"{found['seconds']:.3f}", *ratios, done.peak)


PARTS: dict[str, tuple[float, Callable[[Place], Iterator[str]]]] = {
    "": (10, machine),
    "GPU tests": (45, gpu_tests),
    "DiT-XL/2 as classifier": (140, partial(as_classifier, name="DiT-XL/2")),
    "DiT-S/2 as classifier": (70, partial(as_classifier, name="DiT-S/2")),
    "Training DiT-S/2": (65, partial(training, name="DiT-S/2")),
    "Training DiT-XL/2": (110, partial(training, name="DiT-XL/2")),
    "Engine": (35, engine),
}  # seconds of eight minutes, for which most is bounded; what one leaves is for those after it


def on_this_machine(part: Callable[[Place], Iterator[str]], end: float) -> Iterator[str]:
    """A part on the GPU, or at toy size without one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    place = Place(device, end)
    if device == "cpu":
        torch.compiler.set_stance("force_eager")
        if getattr(part, "keywords", {}).get("name") not in (None, *place.sizes.networks):
            return iter(["Left out at toy size."])
    return part(place)


def cannot_fork(end: float) -> Iterator[str]:
    """Whether an import has asked for a GPU already, which forbids a forked process to."""
    yield str(torch.cuda._is_in_bad_fork())


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the file (default: gpu_<device>_<date>.md here; none without a GPU)")
    parser.add_argument("--seconds", type=float, default=475, help="for everything, at most")
    given = parser.parse_args(args)
    start, out, lines = time.monotonic(), given.out, list[str]()

    def tell(line: str) -> None:
        nonlocal out
        print(line, flush=True)
        lines.append(line)
        if out is None and (found := re.match("# One GPU, (.*), ", lines[0])):
            out = HERE / f"gpu_{re.sub('[^a-z0-9]+', '-', found[1].lower())}_{date.today()}.md"
        if out is not None:
            write_text("\n".join([*lines, ""]), out, "benchmark")

    method = "spawn" if "True" in lines_of(cannot_fork, 60, "fork") else "fork"
    shares = [share for share, _ in PARTS.values()]
    for number, (title, (share, part)) in enumerate(PARTS.items()):
        if title:
            tell(f"\n## {title}\n")
        left = given.seconds - (time.monotonic() - start)
        for line in lines_of(partial(on_this_machine, part), left * share / sum(shares[number:]), method):
            tell(line)
    tell(f"\nAll of it took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
