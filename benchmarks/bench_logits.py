"""Does the memory of differentiable logits grow with the draws? python benchmarks/bench_logits.py.

Gradients of the logits of 16 digits by a trained DiT (tasks.py), in one process: first with few draws, then with more.
The peak of resident memory can only rise, so that it shows what more draws add. Then the same is done under PyTorch's
profiler, which counts what is allocated for tensors. Last, all activations of 10 draws are kept, as without
recomputation.
"""

import resource
import time
from collections.abc import Callable
from datetime import date

import torch
from tasks import TASKS
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lightning_diffclf import DiffusionClassifier
from lightning_diffclf.classifier import logits

IMAGES, DRAWS = 16, (10, 50, 100)


def peak() -> float:
    """MiB of resident memory at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def tensors(work: Callable[[], object]) -> float:
    """MiB of all tensors that are alive at the same time, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def main() -> None:
    task = TASKS["digits"]
    network, images = task.network().requires_grad_(False), task.test()[0][:IMAGES]
    gradient(network, images, 1)  # what the first call allocates for good
    before = peak()
    measured = [(draws, gradient(network, images, draws), peak() - before) for draws in DRAWS]
    seconds, kept = plain(network, images, 10), peak() - before
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print("| draws | seconds | tensors, MiB | resident, MiB above that of 1 draw |\n| --- | --- | --- | --- |")
    print(f"| 1 | – | {tensors(lambda: gradient(network, images, 1)):.3f} | 0 |")
    for draws, took, resident in measured:
        alive = tensors(lambda draws=draws: gradient(network, images, draws))
        print(f"| {draws} | {took:.1f} | {alive:.3f} | {resident:.1f} |", flush=True)
    alive = tensors(lambda: plain(network, images, 10))
    print(f"| 10, all activations kept | {seconds:.1f} | {alive:.3f} | {kept:.1f} |")


def plain(network: torch.nn.Module, images: Tensor, draws: int) -> float:
    """The same without the function that goes through the draws again."""
    start, c = time.perf_counter(), DiffusionClassifier(network, draws=draws)
    asked, count = images.clone().requires_grad_(), len(network.candidates)
    rows = torch.arange(IMAGES).repeat_interleave(count), torch.arange(count).repeat(IMAGES)
    torch.stack([logits._errors(c, asked, draw, *rows) for draw in range(draws)]).sum().backward()
    return time.perf_counter() - start


def gradient(network: torch.nn.Module, images: Tensor, draws: int) -> float:
    """Seconds that logits and their gradient take."""
    start = time.perf_counter()
    asked = images.clone().requires_grad_()
    DiffusionClassifier(network, draws=draws).logits(asked).amax(1).sum().backward()
    assert asked.grad is not None
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
