"""Weights of class-conditional DiT networks as others publish them, read and written.

Read are the files of Peebles & Xie (``DiT-XL-2-256x256.pt``), also as their training script writes them; SiT's, of the
same network trained on a rectified flow; safetensors with the same names; and folders of diffusers. Written are folders
of diffusers. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_diffclf.models.dit import DiT
from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule

Weights = dict[str, Tensor]

PLAIN = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}  # our names of layers, and those of diffusers

IN_BLOCKS = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}

SHARED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}  # of which diffusers has a copy in each block


def is_published(path: str | Path) -> bool:
    """Whether ``path`` is a folder, or a file with weights only, rather than a checkpoint of a training of ours."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return True
    return path.is_file() and "state_dict" not in _read_file(path)


def read_published(path: str | Path) -> Weights:
    """Weights by our names (and those of the published files), float32.

    Args:
        path: A file, or a folder of diffusers: of a pipeline or of its ``transformer``.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it cannot be read, or is something else.
    """
    path = Path(path)
    if path.is_dir():
        found: dict[str, Any] = dict(_from_diffusers(_read_folder(path)[0], path))
    elif path.is_file():
        found = _read_file(path)
        for name in ("ema", "model"):  # of the published training scripts
            found = found[name] if isinstance(found.get(name), Mapping) else found
    else:
        raise FileNotFoundError(f"checkpoint: no file or folder {str(path)!r}")
    strange = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if strange or "final_layer.linear.weight" not in found:
        raise ValueError(f"checkpoint: {str(path)!r} has no weights of a DiT (it has {sorted(found)[:4]})")
    return {name: value.float() for name, value in found.items()}


def load_published(net: DiT, schedule: NoiseSchedule, path: str | Path) -> None:
    """Load published weights into a network, which must be of their size.

    Files do not say what was predicted and when: the caller's configuration does. For a network that predicts no
    variance, one in the file is left out: SiT's has an output of that size and does not use it.

    Args:
        net: The network.
        schedule: What it is used with.
        path: See :func:`read_published`.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it cannot be read, or does not fit.
    """
    weights = read_published(path)
    if Path(path).is_dir():
        _check_folder(net, schedule, Path(path))
    c, p = net.in_channels, net.patch_size
    if net.out_channels == c and schedule.prediction == "velocity":
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if len(weights[name]) == 2 * c * p * p:
                weights[name] = weights[name].unflatten(0, (p * p, 2 * c))[:, :c].flatten(0, 1)
    ours = net.state_dict()
    weights.setdefault("pos_embed", ours["pos_embed"])  # fixed; diffusers does not store it
    wrong = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(value.shape)} here"
        for name, value in ours.items()
        if name in weights and weights[name].shape != value.shape
    ]
    missing, surplus = sorted(ours.keys() - weights.keys()), sorted(weights.keys() - ours.keys())
    wrong += [f"{len(missing)} tensors are missing there, such as {missing[0]}"] if missing else []
    wrong += [f"{len(surplus)} tensors are unknown here, such as {surplus[0]}"] if surplus else []
    if wrong:
        few = "; ".join(wrong[:4])
        raise ValueError(f"checkpoint: {str(path)!r} does not fit the network as configured: {few}")
    if not torch.allclose(weights["pos_embed"], ours["pos_embed"], atol=1e-4):
        raise ValueError(f"checkpoint: {str(path)!r} has other position codes than a DiT of its size")
    net.load_state_dict(weights)


def _read_file(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError, UnpicklingError) as error:
        raise ValueError(f"checkpoint: {str(path)!r} cannot be read ({type(error).__name__}: {error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"checkpoint: {str(path)!r} holds a {type(found).__name__}, expected weights by name")
    return found


def _read_folder(path: Path) -> tuple[Weights, dict[str, Any]]:
    """Weights by the names of diffusers, and the network's configuration."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint: {str(path)!r} has no transformer/config.json, expected a DiT of diffusers")
    config = json.loads((folder / "config.json").read_text())
    if config.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise ValueError(f"checkpoint: {str(path)!r} is a {config.get('_class_name')}, expected DiTTransformer2DModel")
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"checkpoint: no weights (*.safetensors, *.bin) in {str(folder)!r}")
    return {name: value for file in files for name, value in _read_file(file).items()}, config


def _check_folder(net: DiT, schedule: NoiseSchedule, path: Path) -> None:
    """What a folder says beside its weights, and shapes do not show."""
    config = _read_folder(path)[1]
    heads = _attention(net).num_heads
    if config["num_attention_heads"] != heads:
        raise ValueError(f"checkpoint: {str(path)!r} has {config['num_attention_heads']} heads, expected {heads}")
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        prediction = json.loads(scheduler.read_text()).get("prediction_type", "epsilon")
        if prediction != schedule.prediction:
            raise ValueError(f"checkpoint: {str(path)!r} predicts {prediction!r}, expected {schedule.prediction!r}")


def _attention(net: DiT) -> Any:
    block: Any = net.blocks[0]
    return block.attn


# --- diffusers -----------------------------------------------------------------------------------------------------


def _from_diffusers(theirs: Weights, path: Path) -> Weights:
    depth = 1 + max((int(m[1]) for name in theirs if (m := re.match(r"transformer_blocks\.(\d+)\.", name))), default=-1)
    ours: Weights = {}
    try:
        for part in ("weight", "bias"):
            for our, their in PLAIN.items():
                ours[f"{our}.{part}"] = theirs[f"{their}.{part}"]
            for i in range(depth):
                block = f"transformer_blocks.{i}."
                for our, their in IN_BLOCKS.items():
                    ours[f"blocks.{i}.{our}.{part}"] = theirs[f"{block}{their}.{part}"]
                qkv = [theirs[f"{block}attn1.to_{one}.{part}"] for one in "qkv"]
                ours[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
                for our, their in SHARED.items():
                    if (our, part) == ("y_embedder.embedding_table", "bias"):
                        continue
                    value = theirs[f"{block}norm1.emb.{their}.{part}"]
                    if not torch.equal(ours.setdefault(f"{our}.{part}", value), value):
                        raise ValueError(
                            f"checkpoint: {str(path)!r} has another {their} in block {i} than in block 0, expected "
                            "copies of one"
                        )
    except KeyError as error:
        raise ValueError(f"checkpoint: {str(path)!r} lacks {error}, which a DiT of diffusers has") from error
    return ours


def to_diffusers(net: DiT) -> Any:
    """The same network as a ``DiTTransformer2DModel`` of diffusers, with the same weights.

    The frequencies of its timestep embedding are spaced by 1/127 where those of the published networks and ours are
    spaced by 1/128; so its outputs differ a little from those that the weights were trained for, as they do for the
    published DiT folders. (With ``time_proj.downscale_freq_shift = 0`` they agree.)

    Raises:
        ValueError: if the input is not square, or there is no null label, which diffusers' always has.
    """
    from diffusers import DiTTransformer2DModel  # slow to import

    if net.input_size[0] != net.input_size[1]:
        raise ValueError(f"export: input of {net.input_size[0]} x {net.input_size[1]}, diffusers takes squares only")
    if net.null_label is None:
        raise ValueError("export: class_dropout_prob is 0, but diffusers' network has a null label")
    attention, hidden_size = _attention(net), net.pos_embed.shape[2]
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
        vae: Folder or Hub repository of the autoencoder.
        class_names: By which the pipeline's users may ask for classes; a comma separates synonyms.

    Raises:
        ValueError: if diffusers' pipeline cannot express the network or its schedule, the autoencoder cannot be loaded,
            or the folder holds something.
    """
    from diffusers import DDIMScheduler, DiTPipeline

    from lightning_diffclf.models.autoencoder import Autoencoder

    if not isinstance(schedule, DiscreteSchedule):
        raise ValueError(f"export: a {type(schedule).__name__}, but diffusers' DiTPipeline has discrete timesteps only")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"export: {str(folder)!r} is not empty, expected a new folder")
    transformer = to_diffusers(net)
    alphas = schedule.alphas_cumprod
    betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
    linear = torch.linspace(float(betas[0]), float(betas[-1]), len(betas), dtype=torch.float64)
    known: dict[str, Any] = {"trained_betas": betas.tolist()}
    if torch.allclose(betas, linear, rtol=1e-4):  # by name, as others would write it
        known = {"beta_start": round(float(betas[0]), 8), "beta_end": round(float(betas[-1]), 8)}
        known["beta_schedule"] = "linear"
    scheduler = DDIMScheduler(
        num_train_timesteps=len(betas), prediction_type=schedule.prediction, clip_sample=False, **known
    )
    DiTPipeline(transformer, Autoencoder.load(vae).vae, scheduler).save_pretrained(folder)
    index = folder / "model_index.json"  # diffusers reads names from there, and does not write them
    names = {"id2label": {str(i): name for i, name in enumerate(class_names)}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names, indent=2) + "\n")
