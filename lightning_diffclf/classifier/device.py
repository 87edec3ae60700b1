"""Where the engine meets the device: copies that do not wait, and the compiled network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.denoiser import ConditionalDenoiser


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """``array`` on ``device``; the copy to a GPU goes on in the background."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def download(tensor: Tensor) -> Tensor:
    """``tensor`` in the CPU's memory; from a GPU, it is there once an event recorded after this call has happened."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class CompiledPredict:
    """``denoiser.predict``, compiled for batches of one size.

    Args:
        denoiser: The network.
        size: Rows of every compiled call; shorter batches are padded with copies of their last row.
    """

    def __init__(self, denoiser: ConditionalDenoiser, size: int) -> None:
        self.size = size
        # "reduce-overhead" records CUDA graphs on a GPU and changes nothing on a CPU.
        self._predict = torch.compile(denoiser.predict, dynamic=False, mode="reduce-overhead")

    def __call__(self, x_in: Tensor, time: Tensor, candidate: Tensor) -> Tensor:
        rows = torch.arange(self.size, device=x_in.device).clamp_max(len(x_in) - 1)
        torch.compiler.cudagraph_mark_step_begin()
        output = self._predict(x_in[rows], time[rows], candidate[rows])
        return output[: len(x_in)].clone()  # a CUDA graph writes the next result to the same place
