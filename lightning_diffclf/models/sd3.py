"""Stable Diffusion 3 and 3.5: a rectified flow over 16-channel latents, three text encoders (T5 optional)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

NETWORK = "transformer"
TEXT = ("text_encoder", "text_encoder_2", "text_encoder_3")
STEP = 2  # latents come in squares of this side
CROSS_ATTENTION = False


def embed(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    text, _, pooled, _ = pipeline.encode_prompt(
        prompt=prompts,
        prompt_2=prompts,
        prompt_3=prompts,
        device=pipeline.text_encoder.device,
        do_classifier_free_guidance=False,
    )
    return {"encoder_hidden_states": text, "pooled_projections": pooled}


def vectors(network: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    return conditions


def shared(pipeline: Any, x0: Tensor) -> dict[str, Tensor]:
    return {}


def predict(network: nn.Module, x_t: Tensor, t: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    output: Tensor = network(hidden_states=x_t, timestep=t, **embeddings).sample  # t in 0 … 1000, not an integer
    return output
