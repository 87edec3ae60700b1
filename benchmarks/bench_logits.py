"""Does the memory of differentiable logits grow with the draws? python benchmarks/bench_logits.py.

Gradients of the logits of 16 digits by a trained DiT (tasks.py), in one process: first with few draws, then with more.
The peak of resident memory can only rise, so that it shows what more draws add. Last, all activations of 10 draws are
kept, as without recomputation.
"""

import resource
import time
from datetime import date

import torch
from tasks import TASKS
from torch import Tensor

from lightning_diffclf import DiffusionClassifier
from lightning_diffclf.classifier import logits

IMAGES = 16


def peak() -> float:
    """MiB of resident memory at most, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    task = TASKS["digits"]
    network, images = task.network().requires_grad_(False), task.test()[0][:IMAGES]
    gradient(network, images, 1)  # what the first call allocates for good
    before = peak()
    print(f"{date.today()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print("| draws | seconds | peak, MiB above that of 1 draw |\n| --- | --- | --- |")
    for draws in (10, 50, 100):
        print(f"| {draws} | {gradient(network, images, draws):.1f} | {peak() - before:.1f} |", flush=True)
    print(f"| 10, all activations kept | {plain(network, images, 10):.1f} | {peak() - before:.1f} |")


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
