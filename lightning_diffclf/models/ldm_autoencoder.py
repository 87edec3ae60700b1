"""Autoencoders in the layout of latent diffusion (Rombach et al. 2022), as networks of diffusers.

In it are VA-VAE, which LightningDiT works on, and those within the checkpoints of REPA-E: other names for the same
layers, with attention also in the blocks of the lowest resolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")

PLAIN = {
    "nin_shortcut": "conv_shortcut",
    "norm_out": "conv_norm_out",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    "downsample.conv": "downsamplers.0.conv",
    "upsample.conv": "upsamplers.0.conv",
}  # their names of layers, and those of diffusers

ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def is_ldm(weights: Mapping[str, Any]) -> bool:
    """Whether weights are of an autoencoder in this layout."""
    return {"encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"} <= weights.keys()


def ldm_autoencoder(published: Mapping[str, Any], where: str) -> Any:
    """An ``AutoencoderKL`` of diffusers with published weights; other tensors beside them are left out.

    Its scaling factor is 1: networks on its latents have statistics of their own.

    Args:
        published: Weights by name.
        where: The file, for messages.

    Raises:
        ValueError: if weights are missing or of other shapes.
    """
    from diffusers import AutoencoderKL  # slow to import

    weights = {name: one for name, one in published.items() if name.startswith(PARTS) and isinstance(one, Tensor)}
    try:
        levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"encoder\.down\.(\d+)\.block\.", name)))
        widths = [len(weights[f"encoder.down.{i}.block.0.conv2.bias"]) for i in range(levels)]
        attends = [f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)]
        decodes = [f"decoder.up.{i}.attn.0.q.weight" in weights for i in range(levels)]
        with torch.device("meta"):
            vae = AutoencoderKL(
                latent_channels=weights["post_quant_conv.weight"].shape[1],
                block_out_channels=tuple(widths),
                layers_per_block=len({n.split(".")[4] for n in weights if n.startswith("encoder.down.0.block.")}),
                down_block_types=tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends),
                up_block_types=tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in decodes[::-1]),
                scaling_factor=1.0,
            )
        vae.load_state_dict(dict(_renamed(name, one.float(), levels) for name, one in weights.items()), assign=True)
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"vae: {where!r} has no autoencoder of latent diffusion ({reason})") from error
    return vae.eval()


def _renamed(name: str, value: Tensor, levels: int) -> tuple[str, Tensor]:
    """A weight as diffusers names it; it counts the decoder's resolutions from the lowest."""
    name = re.sub(r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets.", name)
    name = re.sub(r"\bdown\.(\d+)\.attn\.", r"down_blocks.\1.attentions.", name)
    name = re.sub(r"\bdown\.(\d+)\.", r"down_blocks.\1.", name)
    if up := re.match(r"decoder\.up\.(\d+)\.", name):
        rest = name[up.end() :].replace("block.", "resnets.", 1).replace("attn.", "attentions.", 1)
        name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{rest}"
    for theirs, ours in PLAIN.items():
        name = name.replace(theirs, ours)
    if ".attentions." in name:
        before, layer, kind = name.rsplit(".", 2)
        return f"{before}.{ATTENTION[layer]}.{kind}", value.flatten(1) if value.ndim == 4 else value
    return name, value
