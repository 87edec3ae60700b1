"""Diffusion transformer with adaLN-Zero blocks (Peebles & Xie 2023, arXiv 2212.09748)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_diffclf.errors import UserError, check_at_least

FREQUENCY_SIZE = 256  # width of the sinusoidal timestep embedding

# (hidden_size, depth, num_heads) of the published sizes (table 1; B to XL are those of ViT)
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
NAMES = tuple(f"DiT-{size}/{patch_size}" for size in SIZES for patch_size in (2, 4, 8))


def frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """Geometric series from 1 towards 1/10000 (Vaswani et al. 2017, section 3.5): (count,), float32."""
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device=device) / count)


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """Fixed position codes of a grid of tokens, row by row: (height * width, dim), float32; ``dim`` divides by 4.

    A code is the sines and cosines of the token's column, then those of its row.
    """
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places_2L1 = torch.stack([columns.flatten(), rows.flatten()])[..., None]
    column, row = places_2L1 * frequencies(dim // 4)
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm: the condition sets the shift and scale (N, 1, D) of normalised tokens (N, L, D)."""
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of the timestep, then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCY_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        # In float32 whatever the network's dtype: bfloat16 has 8 significant bits and cannot tell 999 from 1000
        angles = t.float()[:, None] * frequencies(FREQUENCY_SIZE // 2, t.device)  # (N, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 256)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Embedding of the class; the last row stands for no class, where the network has one."""

    def __init__(self, num_rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)  # (N, D)


class DiTBlock(nn.Module):
    """Transformer block whose norms and residual gates are set by the condition (section 3.2, adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None]  # (N, 1, 6D)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)  # (N, 1, D) each
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))  # (N, L, D)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (N, L, D)


class FinalLayer(nn.Module):
    """From tokens to the pixels of their patches; ``norm`` takes the place of DiT's."""

    def __init__(self, hidden_size: int, patch_values: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_final = norm or nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)  # (N, 1, D) each
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, L, p * p * 2C)


class DiT(nn.Module):
    """Class-conditional diffusion transformer; the keys of its state dict are those of the published checkpoints.

    Args:
        input_size: Height and width of the input; an int for a square.
        patch_size: Side of the square patches; divides both.
        in_channels: Channels C of the input.
        hidden_size: Width D of the tokens, a multiple of 4 and of ``num_heads``.
        depth: Number of blocks.
        num_heads: Attention heads per block.
        mlp_ratio: Hidden width of the MLPs in units of ``hidden_size``.
        class_dropout_prob: Probability that training replaces a label by the null label, in [0, 1]. The embedding table
            has a row for the null label only if this is above 0.
        num_classes: Labels are 0 … num_classes - 1.
        learn_sigma: Whether to predict a variance next to the noise.
        block: Makes a block of (hidden_size, num_heads, mlp_ratio), which takes tokens (N, L, D) and conditions (N, D);
            see :mod:`~lightning_diffclf.models.lightning_dit` for others.
        last: Makes what turns tokens into patches, of (hidden_size, values in a patch).

    Attributes:
        input_size: (height, width); patch_size, in_channels, num_classes and class_dropout_prob are as given.
        checkpointing: Whether to compute the blocks' activations again in the backward pass rather than keep them: less
            memory, about a third more time. False at first.
        out_channels: 2C if ``learn_sigma``, else C.

    Raises:
        ValueError: if the sizes do not divide or the probability is none.

    Example:
        >>> dit = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=10)
        >>> dit(torch.zeros(3, 4, 8, 8), torch.tensor([0, 1, 999]), torch.tensor([0, 9, dit.null_label])).shape
        torch.Size([3, 8, 8, 8])
    """

    pos_embed: Tensor

    def __init__(
        self,
        input_size: int | tuple[int, int],
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        block: Callable[[int, int, float], nn.Module] = DiTBlock,
        last: Callable[[int, int], nn.Module] = FinalLayer,
    ) -> None:
        super().__init__()
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        check_at_least(1, input_size=min(height, width), patch_size=patch_size, in_channels=in_channels)
        check_at_least(1, hidden_size=hidden_size, num_heads=num_heads, num_classes=num_classes, depth=depth)
        if height % patch_size or width % patch_size:
            raise UserError(f"input_size: {height} x {width}, expected multiples of the patch size {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise UserError(f"hidden_size: {hidden_size}, expected a multiple of 4 and of the {num_heads} heads")
        if not 0 <= class_dropout_prob <= 1:
            raise UserError(f"class_dropout_prob: {class_dropout_prob}, expected a probability in [0, 1]")
        self.input_size, self.patch_size = (height, width), patch_size
        self.in_channels, self.out_channels = in_channels, 2 * in_channels if learn_sigma else in_channels
        self.num_classes, self.class_dropout_prob = num_classes, class_dropout_prob
        self.checkpointing = False

        self.x_embedder = PatchEmbed(self.input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes + (self.null_label is not None), hidden_size)
        positions_LD = positions_2d(height // patch_size, width // patch_size, hidden_size)
        self.register_buffer("pos_embed", positions_LD[None])
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = last(hidden_size, patch_size**2 * self.out_channels)
        self.initialize()

    @classmethod
    def from_name(cls, name: str, input_size: int | tuple[int, int] = 32, **overrides: Any) -> DiT:
        """Make a published size; the defaults are for 256 x 256 images in the latent space of Stable Diffusion.

        Args:
            name: Size S, B, L or XL and patch size 2, 4 or 8, as in ``DiT-XL/2``.
            input_size: As for :class:`DiT`.
            **overrides: Any other argument of :class:`DiT`; ``in_channels`` is 4 unless given.

        Raises:
            ValueError: if the name is none of :data:`NAMES`.
        """
        if name not in NAMES:
            raise UserError(f"name: {name!r}, expected one of {', '.join(NAMES)}")
        size, patch_size = name.removeprefix("DiT-").split("/")
        hidden_size, depth, num_heads = SIZES[size]
        published = {"in_channels": 4, "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads}
        return cls(input_size, **{"patch_size": int(patch_size), **published, **overrides})

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, or None if the network has none."""
        return self.num_classes if self.class_dropout_prob > 0 else None

    def initialize(self) -> None:
        """Draw new weights as published: every block starts as the identity, and the output as zero (section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))  # as if linear
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in ("0", "2"):
            nn.init.normal_(self.t_embedder.mlp.get_parameter(f"{layer}.weight"), std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(part.get_parameter("adaLN_modulation.1.weight"))
        nn.init.zeros_(self.final_layer.get_parameter("linear.weight"))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """Predict the noise in ``x`` and, with ``learn_sigma``, where its variance lies in the allowed range.

        Args:
            x: Noisy inputs (N, C, H, W), floating.
            t: Timesteps (N,), int or float.
            y: Labels (N,), int64 in 0 … num_classes - 1, or :attr:`null_label`; or embeddings in place of theirs
                (N, D), floating; or sets of classes (N, num_classes), bool, none empty, whose mean embedding stands
                for them.
            drop: Which labels to replace by the null label (N,), bool. If omitted, a random draw from the global
                generator in training mode, none in eval mode.

        Returns:
            (N, 2C, H, W): epsilon, then the variance; or (N, C, H, W) without ``learn_sigma``.

        Raises:
            ValueError: if a shape or dtype differs, ``drop`` is given to a network without null label or, on the CPU
                and outside torch.compile, a label is out of range.
        """
        self._check_input(x, t)
        self._check_classes(y, len(x), drop)
        if drop is None and self.training and self.class_dropout_prob > 0:
            drop = torch.rand(len(y), device=y.device) < self.class_dropout_prob  # (N,)
        condition = self.t_embedder(t) + self._embedding(y, drop)  # (N, D)
        tokens = self.x_embedder(x) + self.pos_embed  # (N, L, D)
        for block in self.blocks:
            if self.checkpointing and self.training:
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        patches = self.final_layer(tokens, condition)  # (N, L, p * p * 2C)
        h, p = self.input_size[0] // self.patch_size, self.patch_size
        return rearrange(patches, "n (h w) (p q c) -> n c (h p) (w q)", h=h, p=p, q=p)  # (N, 2C, H, W)

    def _embedding(self, y: Tensor, drop: Tensor | None) -> Tensor:
        """Embeddings (N, D) of labels, of sets of classes, or as given; see :meth:`forward`."""
        if y.dtype == torch.int64:
            return self.y_embedder(y if drop is None else y.masked_fill(drop, self.num_classes))
        table = self.y_embedder.embedding_table.weight
        if y.dtype == torch.bool:
            with torch.autocast(y.device.type, enabled=False):  # the embedding of a set of one is that of its class
                y = y.to(table.dtype) @ table[: self.num_classes] / y.sum(1, keepdim=True)
        return y if drop is None else torch.where(drop[:, None], table[-1], y)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, guidance_scale: float, guided_channels: int | None = None
    ) -> Tensor:
        """Predict with classifier-free guidance, ``null + scale * (conditional - null)`` (Ho & Salimans 2022).

        Labels are not dropped, whatever the mode.

        Args:
            x: Noisy inputs (N, C, H, W); the network runs on a batch of 2N.
            t: Timesteps (N,).
            y: Labels (N,), int64.
            guidance_scale: 1 is the conditional prediction, 0 that without class.
            guided_channels: How many of the C channels of epsilon to guide, the first ones; all if omitted. The
                published samples have 3 guided of 4. The other channels are the conditional prediction.

        Returns:
            (N, 2C, H, W) or (N, C, H, W), as :meth:`forward`.

        Raises:
            ValueError: if the network has no null label, or ``guided_channels`` is not in 1 … C.
        """
        guided = self.in_channels if guided_channels is None else guided_channels
        if self.null_label is None:
            raise UserError("guidance needs a null label: class_dropout_prob is 0, expected above 0")
        if not 1 <= guided <= self.in_channels:
            raise UserError(f"guided_channels: {guided}, expected 1 … {self.in_channels}")
        labels = torch.cat([y, torch.full_like(y, self.null_label)])  # (2N,)
        keep = torch.zeros_like(labels, dtype=torch.bool)  # (2N,)
        output = self(torch.cat([x, x]), torch.cat([t, t]), labels, drop=keep)  # (2N, 2C, H, W)
        conditional, null = output.chunk(2)  # (N, 2C, H, W) each
        epsilon = null[:, :guided].lerp(conditional[:, :guided], guidance_scale)  # (N, guided, H, W)
        return torch.cat([epsilon, conditional[:, guided:]], dim=1)  # (N, 2C, H, W)

    def _check_input(self, x: Tensor, t: Tensor) -> None:
        if x.shape[1:] != (self.in_channels, *self.input_size):
            c, (h, w) = self.in_channels, self.input_size
            raise UserError(f"x: shape {tuple(x.shape)}, expected (N, {c}, {h}, {w})")
        if t.shape != x.shape[:1]:
            raise UserError(f"t: shape {tuple(t.shape)}, expected ({len(x)},)")

    def _check_classes(self, y: Tensor, rows: int, drop: Tensor | None) -> None:
        kind, width = (y.dtype, tuple(y.shape)), self.y_embedder.embedding_table.embedding_dim
        labels, sets = kind == (torch.int64, (rows,)), kind == (torch.bool, (rows, self.num_classes))
        if not labels and not sets and not (y.is_floating_point() and y.shape == (rows, width)):
            others = f"or embeddings ({rows}, {width}), or torch.bool ({rows}, {self.num_classes})"
            raise UserError(f"y: {y.dtype} {tuple(y.shape)}, expected torch.int64 ({rows},), {others}")
        if drop is not None and self.null_label is None:
            raise UserError("drop: given, but there is no null label: class_dropout_prob is 0, expected above 0")
        if drop is not None and (drop.shape != (rows,) or drop.dtype != torch.bool):
            raise UserError(f"drop: {drop.dtype} {tuple(drop.shape)}, expected torch.bool ({rows},)")
        if labels and y.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to be waited for
            highest = self.y_embedder.embedding_table.num_embeddings - 1
            if bool(((y < 0) | (y > highest)).any()):
                raise UserError(f"y: labels {int(y.min())} … {int(y.max())}, expected 0 … {highest}")
