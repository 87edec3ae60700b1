"""What several benchmarks measure with; needs torch, lightning and timm only."""

import time
from collections.abc import Callable

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf import DiT


def synchronize(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Floating point operations in a second of a product of matrices of ``size`` x ``size``, the best of 5."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(6):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        synchronize(device)
        rates.append(3 * 2 * size**3 / (time.perf_counter() - start))
    return max(rates[1:])


def forward_flops(make: Callable[[], DiT]) -> int:
    """Of the network on one image, counted without computing anything; a training step takes three times as many."""
    with torch.device("meta"):
        net = make().eval()
        row = torch.zeros(1, net.in_channels, *net.input_size), torch.zeros(1), torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            net(*row)
    return counter.get_total_flops()


def randomised(module: torch.nn.Module, std: float = 0.02) -> torch.nn.Module:
    """Zero weights, which every DiT begins with, would compute faster than trained ones."""
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module


class Stopwatch(L.Callback):
    """Seconds from the end of one step to the end of another, the first ones left out."""

    def __init__(self, device: str, warmup: int) -> None:
        self.device, self.warmup = device, warmup

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.warmup:
            synchronize(self.device)
            self.start = time.perf_counter()
        if trainer.global_step == trainer.max_steps:
            synchronize(self.device)
            self.seconds = (time.perf_counter() - self.start) / (trainer.max_steps - self.warmup)
