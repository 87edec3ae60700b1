"""The U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696), read from weights with the published names.

Its layers keep magnitudes: every weight is used at unit magnitude. What comes of that does not change after training,
so it is worked out once, when weights are read (:func:`edm2_of`), and convolutions are plain ones afterwards. Equation
numbers are the paper's, of its appendix B.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_diffclf.errors import UserError

EPS = 1e-4
HEAD_DIM = 64
RESIDUAL, ATTENTION = 0.3, 0.3  # shares of a block's residual branch and of its attention
CLIP = 256.0  # largest activation

FOURIER = "emb_fourier.freqs"  # by which weights are known, whatever their names begin with


def unit(x: Tensor, *axes: int) -> Tensor:
    """``x`` with a root mean square of one along axes."""
    return x / (EPS + x.float().square().mean(axes, keepdim=True).sqrt()).to(x.dtype)


def silu(x: Tensor) -> Tensor:
    """SiLU that keeps magnitudes (equation 81)."""
    return F.silu(x) / 0.596


def mix(a: Tensor, b: Tensor, share: float = 0.5) -> Tensor:
    """Weighted sum that keeps magnitudes (equation 88)."""
    total = math.hypot(1 - share, share)
    return a * ((1 - share) / total) + b * (share / total)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Channels of both, each with the same part in the magnitude (equation 103, t = 1/2)."""
    total = a.shape[1] + b.shape[1]
    return torch.cat([x * math.sqrt(total / (2 * x.shape[1])) for x in (a, b)], dim=1)


def conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size, without bias."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)


@dataclass(frozen=True)
class Sizes:
    """What a network is made of.

    Attributes:
        resolution: Height and width of its input.
        channels: Channels of its input.
        widths: Channels of its blocks, for each resolution from the highest, each half of the one before.
        blocks: Blocks at each resolution of the encoder; the decoder has one more.
        attention: At which of these resolutions blocks attend.
        embedding: Width of the embedding.
        noise: Width of the noise level's Fourier features.
        num_classes: Classes; 0 for a network without.
    """

    resolution: int
    channels: int
    widths: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    embedding: int
    noise: int
    num_classes: int

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Sizes:
        """As names and shapes of weights say; raises KeyError where one is missing."""
        levels = sorted({int(m[1]) for name in weights if (m := re.match(r"enc\.(\d+)x\1_", name))}, reverse=True)
        if not levels or levels != [levels[0] >> i for i in range(len(levels))]:
            raise KeyError(f"resolutions {levels}, each half of the one before")
        top = levels[0]
        count = len({name.split(".")[1] for name in weights if name.startswith(f"enc.{top}x{top}_block")})
        label = weights.get("emb_label.weight")
        return cls(
            resolution=top,
            channels=len(weights["out_conv.weight"]),
            widths=tuple(len(weights[f"enc.{side}x{side}_block0.conv_res1.weight"]) for side in levels),
            blocks=count,
            attention=tuple(s for s in levels if f"enc.{s}x{s}_block0.attn_qkv.weight" in weights),
            embedding=len(weights["emb_noise.weight"]),
            noise=len(weights[FOURIER]),
            num_classes=0 if label is None else label.shape[1],
        )


class Block(nn.Module):
    """Block of the encoder or the decoder (figure 21); ``resample`` is ``down``, ``up`` or nothing."""

    def __init__(
        self, inputs: int, outputs: int, embedding: int, decodes: bool, resample: str = "", attends: bool = False
    ) -> None:
        super().__init__()
        self.decodes, self.resample, self.heads = decodes, resample, outputs // HEAD_DIM
        self.conv_res0 = conv(inputs if decodes else outputs, outputs, 3)
        self.emb_linear = nn.Linear(embedding, outputs, bias=False)
        self.conv_res1 = conv(outputs, outputs, 3)
        self.conv_skip = conv(inputs, outputs, 1) if inputs != outputs else None
        self.attn_qkv = conv(outputs, 3 * outputs, 1) if attends else None
        self.attn_proj = conv(outputs, outputs, 1) if attends else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if self.resample:
            x = F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0)
        skipped = x if self.conv_skip is None else self.conv_skip(x)
        if not self.decodes:
            x = skipped = unit(skipped, 1)
        y = self.conv_res0(silu(x))
        y = silu(y * (self.emb_linear(embedding) + 1)[:, :, None, None])
        x = mix(skipped, self.conv_res1(y), RESIDUAL)
        if self.attn_qkv is not None and self.attn_proj is not None:
            heads = self.attn_qkv(x).flatten(2).unflatten(1, (self.heads, -1, 3))  # (N, heads, D, 3, L)
            q, k, v = unit(heads, 2).permute(3, 0, 1, 4, 2)  # (N, heads, L, D) each
            y = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
            x = mix(x, self.attn_proj(y), ATTENTION)
        return x.clamp(-CLIP, CLIP)


class EDM2(nn.Module):
    """The raw network F of a class-conditional EDM2: see :class:`~lightning_diffclf.schedule.EDMSchedule`.

    Args:
        sizes: What it is made of.

    Attributes:
        num_classes: Labels are 0 … num_classes - 1.
        null_label: None: the published networks were trained with a class always.
        in_channels: Channels of the input.
        input_size: (height, width).
    """

    null_label: None = None
    freqs: Tensor
    phases: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_classes, self.in_channels = sizes.num_classes, sizes.channels
        self.input_size = (sizes.resolution, sizes.resolution)
        self.register_buffer("freqs", torch.zeros(sizes.noise))
        self.register_buffer("phases", torch.zeros(sizes.noise))
        self.emb_noise = nn.Linear(sizes.noise, sizes.embedding, bias=False)
        self.y_embedder = nn.Embedding(sizes.num_classes, sizes.embedding)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(sizes.resolution >> i, width) for i, width in enumerate(sizes.widths)]
        now, skips = sizes.channels + 1, []
        for side, width in levels:
            if side == sizes.resolution:
                self.enc[f"{side}x{side}_conv"], now = conv(now, width, 3), width
            else:
                self.enc[f"{side}x{side}_down"] = Block(now, now, sizes.embedding, False, "down")
            skips.append(now)
            for i in range(sizes.blocks):
                attends = side in sizes.attention
                self.enc[f"{side}x{side}_block{i}"] = Block(now, width, sizes.embedding, False, attends=attends)
                now = width
                skips.append(now)
        for side, width in reversed(levels):
            if side == levels[-1][0]:
                self.dec[f"{side}x{side}_in0"] = Block(now, now, sizes.embedding, True, attends=True)
                self.dec[f"{side}x{side}_in1"] = Block(now, now, sizes.embedding, True)
            else:
                self.dec[f"{side}x{side}_up"] = Block(now, now, sizes.embedding, True, "up")
            for i in range(sizes.blocks + 1):
                attends, inputs = side in sizes.attention, now + skips.pop()
                self.dec[f"{side}x{side}_block{i}"] = Block(inputs, width, sizes.embedding, True, attends=attends)
                now = width
        self.out_conv = conv(now, sizes.channels, 3)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """F(x; t, y).

        Args:
            x: Scaled noisy inputs ``c_in * x_t`` (N, C, H, W).
            t: ``ln(sigma) / 4`` (N,).
            y: Labels (N,), int64; or embeddings in place of theirs (N, D), floating.

        Returns:
            (N, C, H, W).
        """
        waves = math.sqrt(2) * torch.cos(t.float()[:, None] * self.freqs.float() + self.phases.float())  # (N, noise)
        labels = y if y.is_floating_point() else self.y_embedder(y)
        embedding = silu(mix(self.emb_noise(waves.to(labels.dtype)), labels))  # (N, D)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for block in self.enc.values():
            x = block(x, embedding) if isinstance(block, Block) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(join(x, skips.pop()) if "block" in name else x, embedding)
        return self.out_conv(x)


def edm2_of(published: Mapping[str, Tensor], where: str) -> EDM2:
    """The network of weights with the published names, in evaluation mode.

    Args:
        published: Weights by name; what their names have in common before the published ones is left out.
        where: The file, for messages.

    Raises:
        ValueError: if weights are missing, of other shapes, or the network has no classes.
    """
    before = next(name.removesuffix(FOURIER) for name in published if name.endswith(FOURIER))
    weights = {name.removeprefix(before): one.float() for name, one in published.items() if name.startswith(before)}
    weights = {name: one for name, one in weights.items() if not name.startswith("logvar_")}
    try:
        sizes = Sizes.of(weights)
        if sizes.num_classes == 0:
            raise UserError(f"weights: {where!r} are of a network without classes, expected a class-conditional one")
        with torch.device("meta"):
            net = EDM2(sizes)
        net.load_state_dict(_used(weights), assign=True)
    except (KeyError, RuntimeError, IndexError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"weights: {where!r} are of no EDM2 network ({reason})") from error
    return net.requires_grad_(False).eval()


def _used(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are used: of unit magnitude, divided by the root of the fan-in (equation 47), times gains."""
    used: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in (FOURIER, "emb_fourier.phases"):
            used[name.removeprefix("emb_fourier.")] = value
        elif name == "emb_label.weight":  # of one-hot vectors of unit magnitude: its columns
            used["y_embedder.weight"] = unit(value, 1).T.contiguous()
        elif name.endswith(".weight"):
            gain = weights["out_gain"] if name == "out_conv.weight" else torch.ones(())
            if name.endswith(".emb_linear.weight"):
                gain = weights[name.removesuffix("emb_linear.weight") + "emb_gain"]
            used[name] = unit(value, *range(1, value.ndim)) * (gain / math.sqrt(value[0].numel()))
        elif name != "out_gain" and not name.endswith(".emb_gain"):
            raise KeyError(f"{name} is unknown")
    return used
