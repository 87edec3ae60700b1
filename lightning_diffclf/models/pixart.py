"""PixArt-alpha and -sigma: a DiT with cross-attention to T5, which predicts a variance as well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NETWORK = "transformer"
TEXT = ("text_encoder",)
STEP = 2  # latents come in squares of this side
CROSS_ATTENTION = True


def embed(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    text, mask, *_ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, device=pipeline.text_encoder.device
    )
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def vectors(network: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    text = conditions["encoder_hidden_states"]
    return conditions | {"encoder_attention_mask": conditions["encoder_attention_mask"].to(text.dtype)}


def shared(pipeline: Any, x0: Tensor) -> dict[str, Tensor]:
    if not getattr(pipeline.transformer, "use_additional_conditions", False):
        return {}
    height, width = (side * pipeline.vae_scale_factor for side in x0.shape[2:])
    dtype = pipeline.transformer.dtype
    return {
        "resolution": torch.tensor([[height, width]], dtype=dtype),
        "aspect_ratio": torch.tensor([[height / width]], dtype=dtype),
    }


def predict(network: nn.Module, x_t: Tensor, t: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    added = {name: embeddings.get(name) for name in ("resolution", "aspect_ratio")}
    text = embeddings["encoder_hidden_states"]
    # The logarithm of how much a token takes part: none at -10,000, as the network says it; mixtures have parts.
    mask = embeddings["encoder_attention_mask"].to(text.dtype)
    part = torch.where(mask > 0, mask.clamp_min(torch.finfo(mask.dtype).tiny).log(), -10_000.0)
    output: Tensor = network(
        x_t,
        encoder_hidden_states=text,
        encoder_attention_mask=part[:, None],
        timestep=t,
        added_cond_kwargs=added,
    ).sample
    return output
