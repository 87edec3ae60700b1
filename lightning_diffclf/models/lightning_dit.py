"""The transformer of LightningDiT: DiT with rotary positions, RMSNorm and SwiGLU (Yao et al. 2025, arXiv 2501.01423).

Each of these is a switch of its own, as in the published files, whose tensors show which are on. REPA and REPA-E train
DiT's block with normalised queries and keys, or none of the switches (Leng et al. 2025, arXiv 2504.10483).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_diffclf.models.dit import DiT, FinalLayer, modulate

EPS = 1e-6  # of RMSNorm, and of LayerNorm over tokens


@dataclass(frozen=True)
class Switches:
    """In what a block differs from DiT's.

    Attributes:
        rms_norm: RMSNorm with a learned scale (Zhang & Sennrich 2019), also before the output.
        swiglu: SwiGLU (Shazeer 2020) of two thirds of the MLP's width.
        rope: Rotary positions (Su et al. 2021) beside the fixed codes: half of each head turns by a token's row, the
            other half by its column.
        qk_norm: Queries and keys of each head are normalised.
        shift: Whether the condition sets shifts beside scales and gates.
    """

    rms_norm: bool = False
    swiglu: bool = False
    rope: bool = False
    qk_norm: bool = False
    shift: bool = True

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Switches:
        """Which are on, by the names and shapes of published weights."""
        modulated, width = weights["blocks.0.adaLN_modulation.1.bias"], weights["x_embedder.proj.bias"]
        return cls(
            rms_norm="blocks.0.norm1.weight" in weights,
            swiglu="blocks.0.mlp.w12.weight" in weights,
            rope="feat_rope.freqs_cos" in weights,
            qk_norm="blocks.0.attn.q_norm.weight" in weights,
            shift=len(modulated) != 4 * len(width),
        )


def lightning_dit(switches: Switches, **sizes: Any) -> DiT:
    """A transformer whose state dict has the published names; ``sizes`` as for :class:`~.dit.DiT`.

    Raises:
        ValueError: if the sizes do not divide.
    """
    size, patch_size = sizes["input_size"], sizes["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    grid = (height // patch_size, width // patch_size) if switches.rope else None

    def last(hidden_size: int, patch_values: int) -> FinalLayer:
        return FinalLayer(hidden_size, patch_values, token_norm(switches, hidden_size))

    return DiT(**sizes, block=partial(Block, switches=switches, grid=grid), last=last)


def rotations(height: int, width: int, head_dim: int) -> Tensor:
    """Angles by which pairs of a head's values turn, for each token of a grid, row by row: (L, head_dim / 2), float32.

    The first half of the pairs turns by the token's row, the second by its column.
    """
    count = head_dim // 4
    speed = 10000.0 ** -(torch.arange(count, dtype=torch.float32) / count)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([rows.flatten()[:, None] * speed, columns.flatten()[:, None] * speed], dim=1)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring values of ``x`` (..., L, D), as pairs, by ``turns`` (L, D / 2, 2): cosine and sine."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns.to(x.dtype).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class RMSNorm(nn.RMSNorm):
    """Computed in the type of its weights: also under autocast, as LayerNorm is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


def token_norm(switches: Switches, width: int) -> nn.Module:
    """Of tokens, before the condition's scale and shift."""
    if switches.rms_norm:
        return RMSNorm(width, eps=EPS)
    return nn.LayerNorm(width, elementwise_affine=False, eps=EPS)


class Attention(nn.Module):
    """Self-attention; ``grid`` is (rows, columns) of tokens where positions are rotary."""

    turns: Tensor | None

    def __init__(self, width: int, num_heads: int, switches: Switches, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads, head_dim = num_heads, width // num_heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        norm = partial(RMSNorm, eps=EPS) if switches.rms_norm else nn.LayerNorm
        self.q_norm = norm(head_dim) if switches.qk_norm else nn.Identity()
        self.k_norm = norm(head_dim) if switches.qk_norm else nn.Identity()
        angles = None if grid is None else rotations(*grid, head_dim)
        turns = None if angles is None else torch.stack([angles.cos(), angles.sin()], dim=-1)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, L, D / heads)
        q, k, v = heads.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.turns is not None:
            q, k = rotate(q, self.turns), rotate(k, self.turns)
        mixed = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # (N, L, D)


class SwiGLU(nn.Module):
    """Two layers, the first gated by itself."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class Block(nn.Module):
    """As :class:`~.dit.DiTBlock`, with switches."""

    def __init__(
        self, width: int, num_heads: int, mlp_ratio: float, switches: Switches, grid: tuple[int, int] | None
    ) -> None:
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1, self.norm2 = token_norm(switches, width), token_norm(switches, width)
        self.attn = Attention(width, num_heads, switches, grid)
        self.mlp: nn.Module = Mlp(width, hidden, act_layer=partial(nn.GELU, approximate="tanh"))
        if switches.swiglu:
            self.mlp = SwiGLU(width, 2 * hidden // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, (6 if switches.shift else 4) * width))
        self.shift = switches.shift

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None]  # (N, 1, 6D or 4D)
        if self.shift:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, D) each
        else:
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=-1)
            shift1 = shift2 = torch.zeros_like(scale1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, L, D)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, L, D)
