"""FLUX.1: a rectified flow over packed latents, with CLIP's pooled text and T5; guidance may be an input.

Shape suffixes: N rows, C channels, H height, W width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NETWORK = "transformer"
TEXT = ("text_encoder", "text_encoder_2")
STEP = 2  # latents come in squares of this side
CROSS_ATTENTION = False

GUIDANCE = 1.0  # of the guidance-distilled network: the plain conditional prediction, as the classifier wants it


def embed(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    text, pooled, _ = pipeline.encode_prompt(
        prompt=prompts, prompt_2=prompts, device=pipeline.text_encoder.device, max_sequence_length=length(pipeline)
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def length(pipeline: Any) -> int:
    """Tokens of T5: 512, or what its tokenizer takes (256 for FLUX.1-schnell)."""
    return min(512, int(pipeline.tokenizer_2.model_max_length))


def vectors(network: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return conditions


def shared(pipeline: Any, x0: Tensor) -> dict[str, Tensor]:
    return {}


def pack(x_NCHW: Tensor) -> Tensor:
    """Latents (N, C, h, w) to tokens of 2 × 2 positions (N, h/2 · w/2, 4C)."""
    n, channels, height, width = x_NCHW.shape
    patches = x_NCHW.view(n, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo :func:`pack`: (N, C, height, width)."""
    n, _, size = tokens.shape
    patches = tokens.view(n, height // 2, width // 2, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(n, size // 4, height, width)


def predict(network: nn.Module, x_t: Tensor, t: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    height, width = x_t.shape[2:]
    text = embeddings["encoder_hidden_states"]
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3).to(x_t)
    guidance = x_t.new_full((len(x_t),), GUIDANCE) if network.config.guidance_embeds else None  # type: ignore[union-attr]
    output: Tensor = network(
        hidden_states=pack(x_t),
        encoder_hidden_states=text,
        pooled_projections=embeddings["pooled_projections"],
        timestep=(t / 1000).to(x_t.dtype),  # multiplied by 1000 inside
        img_ids=image_ids,
        txt_ids=x_t.new_zeros(text.shape[1], 3),
        guidance=guidance,
    ).sample
    return unpack(output, height, width)
