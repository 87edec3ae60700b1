"""Stable Diffusion 1.x, 2.x and XL: a UNet with cross-attention to one or two text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NETWORK = "unet"
TEXT = ("text_encoder", "text_encoder_2")
STEP = 1  # latents come in squares of this side
CROSS_ATTENTION = True


def is_xl(network: nn.Module) -> bool:
    """Whether the UNet wants pooled text and the size of the image besides the prompt."""
    return network.config.get("addition_embed_type") == "text_time"  # type: ignore[union-attr, operator]


def embed(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    device = pipeline.text_encoder.device
    given = {"prompt": prompts, "device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if not is_xl(pipeline.unet):
        return {"encoder_hidden_states": pipeline.encode_prompt(**given)[0]}
    text, _, pooled, _ = pipeline.encode_prompt(**given)
    return {"encoder_hidden_states": text, "text_embeds": pooled}


def vectors(network: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return conditions


def shared(pipeline: Any, x0: Tensor) -> dict[str, Tensor]:
    if not is_xl(pipeline.unet):
        return {}
    size = tuple(side * pipeline.vae_scale_factor for side in x0.shape[2:])
    # The image is whole and as large as it looks: original size, crop and target size as in sampling.
    return {"time_ids": torch.tensor([[*size, 0, 0, *size]], dtype=pipeline.unet.dtype)}


def predict(network: nn.Module, x_t: Tensor, t: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    added = {name: embeddings[name] for name in ("text_embeds", "time_ids") if name in embeddings}
    output: Tensor = network(
        x_t, t, encoder_hidden_states=embeddings["encoder_hidden_states"], added_cond_kwargs=added or None
    ).sample
    return output
