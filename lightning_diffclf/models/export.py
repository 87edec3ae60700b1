"""A trained DiT as a folder of diffusers: for those who use it without this package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_diffclf.errors import UserError
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.models.published import IN_BLOCKS, PLAIN, SHARED, attention_of
from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule


def to_diffusers(net: DiT) -> Any:
    """The same network as a ``DiTTransformer2DModel`` of diffusers, with the same weights.

    The frequencies of its timestep embedding are spaced by 1/127 where those of the published networks and ours are
    spaced by 1/128; so its outputs differ a little from those that the weights were trained for, as they do for the
    published DiT folders. (With ``time_proj.downscale_freq_shift = 0`` they agree.)

    Raises:
        ValueError: if the input is not square, ``mlp_ratio`` is not 4, or there is no null
            label: diffusers' network cannot be made otherwise.
    """
    from diffusers import DiTTransformer2DModel  # slow to import

    if net.input_size[0] != net.input_size[1]:
        raise UserError(f"export: input of {net.input_size[0]} x {net.input_size[1]}, diffusers takes squares only")
    if net.null_label is None:
        raise UserError("export: class_dropout_prob is 0, but diffusers' network has a null label")
    attention, hidden_size = attention_of(net), net.pos_embed.shape[2]
    mlp_size = len(net.state_dict()["blocks.0.mlp.fc1.bias"])
    if mlp_size != 4 * hidden_size:
        raise UserError(f"export: mlp_ratio is {mlp_size / hidden_size:g}, but diffusers' network has 4")
    model = DiTTransformer2DModel(
        num_attention_heads=attention.num_heads,
        attention_head_dim=hidden_size // attention.num_heads,
        in_channels=net.in_channels,
        out_channels=net.out_channels,
        num_layers=len(net.blocks),
        sample_size=net.input_size[0],
        patch_size=net.patch_size,
        num_embeds_ada_norm=net.num_classes,
        norm_eps=1e-6,
    )
    ours, theirs = net.state_dict(), {}
    for part in ("weight", "bias"):
        for our, their in PLAIN.items():
            theirs[f"{their}.{part}"] = ours[f"{our}.{part}"]
        for i in range(len(net.blocks)):
            block = f"transformer_blocks.{i}."
            for our, their in IN_BLOCKS.items():
                theirs[f"{block}{their}.{part}"] = ours[f"blocks.{i}.{our}.{part}"]
            for one, value in zip("qkv", ours[f"blocks.{i}.attn.qkv.{part}"].chunk(3), strict=True):
                theirs[f"{block}attn1.to_{one}.{part}"] = value
            for our, their in SHARED.items():
                if f"{our}.{part}" in ours:
                    theirs[f"{block}norm1.emb.{their}.{part}"] = ours[f"{our}.{part}"]
    model.load_state_dict(theirs)
    return model


def export_pipeline(net: DiT, schedule: NoiseSchedule, folder: Path, vae: str, class_names: Sequence[str]) -> None:
    """Write a network as a ``DiTPipeline`` of diffusers, which its users load as any other.

    That pipeline takes class 1000 for the null label, so it can guide networks of 1,000 classes only.

    Args:
        net: The network, on latents.
        schedule: What it was trained with.
        folder: Where to; new or empty.
        vae: Folder or Hub repository of the autoencoder, which is copied.
        class_names: By which the pipeline's users may ask for classes; a comma separates synonyms.

    Raises:
        ValueError: if diffusers' pipeline cannot express the network or its schedule, the autoencoder cannot be loaded,
            or the folder holds something.
    """
    from diffusers import DDIMScheduler, DiTPipeline

    if not isinstance(schedule, DiscreteSchedule):
        raise UserError(f"export: a {type(schedule).__name__}, but diffusers' DiTPipeline has discrete timesteps only")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {str(folder)!r} is not empty, expected a new folder")
    transformer, autoencoder = to_diffusers(net), Autoencoder.load(vae)
    if autoencoder.channels != net.in_channels:
        raise UserError(f"vae: {vae!r} has latents of {autoencoder.channels} channels, expected {net.in_channels}")
    if autoencoder.shift:
        raise UserError(f"vae: {vae!r} has a shift_factor of {autoencoder.shift}, which DiTPipeline leaves out")
    scheduler = DDIMScheduler(prediction_type=schedule.prediction, clip_sample=False, **_betas(schedule))
    DiTPipeline(transformer, autoencoder.vae, scheduler).save_pretrained(folder)
    index = folder / "model_index.json"  # diffusers reads names from there, and does not write them
    names = {"id2label": {str(i): name for i, name in enumerate(class_names)}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names, indent=2) + "\n")


def _betas(schedule: DiscreteSchedule) -> dict[str, Any]:
    """Noise levels as a scheduler of diffusers takes them: by name where there is one, as others would write them."""
    alphas, betas = schedule.alphas_cumprod, schedule.betas
    ends = {"beta_start": round(float(betas[0]), 8), "beta_end": round(float(betas[-1]), 8)}
    for name in ("linear", "scaled_linear"):
        maker: Any = getattr(NoiseSchedule, name)
        if torch.allclose(maker(len(alphas), **ends).alphas_cumprod, alphas, rtol=1e-4):
            return {"num_train_timesteps": len(alphas), "beta_schedule": name, **ends}
    return {"num_train_timesteps": len(alphas), "trained_betas": betas.tolist()}
