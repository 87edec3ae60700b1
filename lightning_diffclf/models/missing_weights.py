"""Pipelines whose weights are all there: libraries only warn of the others, and give them random values or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_diffclf.errors import UserError

DOWNLOAD = ("variant", "use_safetensors", "token", "cache_dir", "force_download", "local_files_only", "proxies")
"""What both libraries call by the same name."""


def text_encoders(
    parts: dict[str, Any], pretrained: str, revision: str | None, dtype: torch.dtype, **others: Any
) -> dict[str, Any]:
    """Load the networks of a pipeline that are transformers', to be given to ``DiffusionPipeline.from_pretrained``.

    By itself it would not say which of their weights are missing: transformers fills them with random numbers and
    warns, and a text encoder that says nothing makes a classifier that guesses.

    Args:
        parts: What ``model_index.json`` says, checked.
        pretrained: Folder in diffusers' format, or repository on the Hub.
        revision: Branch, tag or commit of the repository.
        dtype: Of the weights in memory.
        **others: For ``DiffusionPipeline.from_pretrained``; what is named here is not loaded.

    Raises:
        ValueError: if a weight is missing.
        OSError: if a part is not there.
    """
    import transformers

    if "quantization_config" in others:  # applies to parts by rules of diffusers' own
        return {}
    kinds = {name: getattr(transformers, value[1], None) for name, value in parts.items() if _is_loaded(value)}
    networks: dict[str, Any] = {
        name: kind
        for name, kind in kinds.items()
        if name not in others and isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    }
    loaded: dict[str, Any] = {}
    for name, network in networks.items():
        how = {key: others[key] for key in DOWNLOAD if key in others}
        loaded[name], found = network.from_pretrained(
            pretrained, subfolder=name, revision=revision, dtype=dtype, output_loading_info=True, **how
        )
        refuse_missing(sorted(found["missing_keys"]), name, pretrained)
    return loaded


def check_whole(pipeline: Any, pretrained: str) -> None:
    """Raise ValueError if weights of a pipeline have no values: those that diffusers did not find stay on ``meta``."""
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            refuse_missing([key for key, value in part.state_dict().items() if value.is_meta], name, pretrained)


def _is_loaded(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == "transformers"


def refuse_missing(missing: list[str], name: str, pretrained: str) -> None:
    """Raise ValueError where weights of a part ``name`` are missing."""
    if missing:
        raise UserError(
            f"pretrained: {pretrained!r} lacks {len(missing)} weights of its {name}: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}. Its files are damaged, or of a version of transformers or diffusers "
            "that names weights otherwise"
        )
