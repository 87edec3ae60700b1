"""DiT as diffusers has it: conditioned on the number of a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_diffclf.errors import UserError

NETWORK = "transformer"
TEXT: tuple[str, ...] = ()
STEP = 2  # latents come in squares of this side


def embed(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    classes = pipeline.transformer.config.num_embeds_ada_norm
    numbers = [int(prompt) if prompt.strip().isdecimal() else -1 for prompt in prompts]
    for prompt, number in zip(prompts, numbers, strict=True):
        if not 0 <= number < classes:
            raise UserError(f"prompt {prompt!r}: this network takes class numbers, expected one of 0 … {classes - 1}")
    return {"class_labels": torch.tensor(numbers)}


def shared(pipeline: Any, x0: Tensor) -> dict[str, Tensor]:
    return {}


def predict(network: nn.Module, x_t: Tensor, t: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    output: Tensor = network(x_t, timestep=t, class_labels=embeddings["class_labels"]).sample
    return output
