"""DiT as diffusers has it: conditioned on the number of a class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_diffclf.errors import UserError

NETWORK = "transformer"
TEXT: tuple[str, ...] = ()
STEP = 2  # latents come in squares of this side
CROSS_ATTENTION = False


def embed(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    classes = pipeline.transformer.config.num_embeds_ada_norm
    numbers = [int(prompt) if prompt.strip().isdecimal() else -1 for prompt in prompts]
    for prompt, number in zip(prompts, numbers, strict=True):
        if not 0 <= number < classes:
            raise UserError(f"prompt {prompt!r}: this network takes class numbers, expected one of 0 … {classes - 1}")
    return {"class_labels": torch.tensor(numbers)}


def vectors(network: nn.Module, conditions: dict[str, Tensor]) -> dict[str, Tensor]:
    tables = [network.get_parameter(name) for name in tables_of(network)]
    return {"class_embeddings": torch.stack([table[conditions["class_labels"]] for table in tables], dim=1)}


def tables_of(network: nn.Module) -> list[str]:
    """Names of the tables of class embeddings, of which every block has its own."""
    return [name for name, _ in network.named_parameters() if name.endswith("class_embedder.embedding_table.weight")]


def shared(pipeline: Any, x0: Tensor) -> dict[str, Tensor]:
    return {}


def predict(network: nn.Module, x_t: Tensor, t: Tensor, embeddings: dict[str, Tensor]) -> Tensor:
    if "class_embeddings" in embeddings:  # (N, blocks, D): each row's own take the place of the tables
        rows = zip(tables_of(network), embeddings["class_embeddings"].unbind(1), strict=True)
        given = {"timestep": t, "class_labels": torch.arange(len(x_t), device=x_t.device)}
        output: Tensor = functional_call(network, dict(rows), (x_t,), given).sample
        return output
    output = network(x_t, timestep=t, class_labels=embeddings["class_labels"]).sample
    return output
