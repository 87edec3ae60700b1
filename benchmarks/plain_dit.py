"""A DiT and its training as one writes them with nothing but torch: what bench_gpu.py compares with."""

import math
from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, mse_loss, scaled_dot_product_attention, silu


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class PlainBlock(nn.Module):
    """Attention and MLP, with norms and gates set by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(silu(condition))[:, None].chunk(6, -1)
        q, k, v = self.qkv(modulated(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.project(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.down(gelu(self.up(modulated(x, shift2, scale2)), approximate="tanh"))


class PlainDiT(nn.Module):
    """DiT (Peebles & Xie 2023) with patches of 2 on latents of 4 channels and 1,000 classes, which predicts noise."""

    def __init__(self, side: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, stride=2)
        self.register_buffer("positions", torch.randn(1, (side // 2) ** 2, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(1001, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads) for _ in range(depth))
        self.out, self.modulation = nn.Linear(width, 16), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], 1)) + self.label(y)
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens, condition)
        tokens = self.out(modulated(tokens, *self.modulation(silu(condition))[:, None].chunk(2, -1)))
        n, _, height, width = x.shape
        return tokens.view(n, height // 2, width // 2, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def plain_training(net: PlainDiT, batch: dict[str, Tensor], device: str) -> Iterator[float]:
    """Endless training steps on one batch in bfloat16 autocast: AdamW, an average of the weights; yields nothing."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, device=device)).cumprod(0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    average = deepcopy(net)
    while True:
        x0, y = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
        t, noise = torch.randint(1000, (len(x0),), device=device), torch.randn_like(x0)
        y = torch.where(torch.rand(len(y), device=device) < 0.1, 1000, y)
        signal = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast(device, torch.bfloat16):
            output = net(signal.sqrt() * x0 + (1 - signal).sqrt() * noise, t, y)
        mse_loss(output.float(), noise).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), net.parameters(), strict=True):
                mean.lerp_(weight, 1e-4)
        yield
