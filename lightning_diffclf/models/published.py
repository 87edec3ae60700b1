"""Weights of class-conditional DiT networks as others publish them.

Read are the files of Peebles & Xie (``DiT-XL-2-256x256.pt``), also as their training script writes them; SiT's, of the
same network trained on a rectified flow; safetensors with the same names; and folders of diffusers, which
:mod:`~lightning_diffclf.models.export` writes. Nothing is unpickled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.files import is_count, read_json
from lightning_diffclf.models.dit import SIZES, DiT, positions_2d
from lightning_diffclf.models.weight_files import read_file
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

MEASURED = {
    "pos_embed": 3,
    "x_embedder.proj.weight": 4,
    "y_embedder.embedding_table.weight": 2,
    "final_layer.linear.weight": 2,
}  # tensors whose shapes give a network's size, and how many axes they have

MLP = ("blocks.0.mlp.fc1.bias", "blocks.0.mlp.w12.bias")  # the first layer of an MLP, or of a gated one

CLASSES = "rows for classes (one more with the null label)"

HEADS = {width: heads for width, _, heads in SIZES.values()} | {1536: 24, 1792: 28}  # of the published widths

OUTPUTS = "output channels (doubled by learn_sigma)"


def is_published(path: str | Path) -> bool:
    """Whether ``path`` is a folder, or a file with weights only, rather than a checkpoint of a training of ours."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        return True
    return path.is_file() and "state_dict" not in read_file(path)


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
        found: dict[str, Any] = dict(_from_diffusers(path))
    elif path.is_file():
        found = weights_in(read_file(path))
    else:
        raise MissingFile(f"checkpoint: no file or folder {str(path)!r}")
    check_measured(found, path)
    return {name: value.float() for name, value in found.items()}


def weights_in(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a file holds, the network's weights: the average, where a published training script wrote it."""
    for name in ("ema", "model"):
        found = found[name] if isinstance(found.get(name), Mapping) else found
    return dict(found)


def check_measured(weights: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError unless ``weights``, of the file ``path``, have the tensors that give a DiT's size."""
    strange = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if strange or not weights.keys() >= MEASURED.keys():
        raise UserError(f"checkpoint: {str(path)!r} has no weights of a DiT (it has {sorted(map(str, weights))[:4]})")
    inner = next((name for name in MLP if name in weights), None)
    if inner is None:
        raise UserError(f"checkpoint: {str(path)!r} has no weights of a DiT (it has none of {', '.join(MLP)})")
    for name, axes in {**MEASURED, inner: 1}.items():
        shape = tuple(weights[name].shape)
        if len(shape) != axes or 0 in shape:
            raise UserError(f"checkpoint: {str(path)!r} has a {name} of shape {shape}, expected {axes} axes")


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
    if net.out_channels == net.in_channels and schedule.prediction == "velocity":
        weights = without_variance(weights, net.in_channels, net.patch_size)
    fit_weights(net, weights, path)


def without_variance(weights: Weights, channels: int, patch_size: int) -> Weights:
    """Weights of a network that predicts no variance, of one that does or has outputs for it (SiT)."""
    size = channels * patch_size**2
    cut = {
        name: weights[name].unflatten(0, (patch_size**2, 2 * channels))[:, :channels].flatten(0, 1)
        for name in ("final_layer.linear.weight", "final_layer.linear.bias")
        if len(weights[name]) == 2 * size
    }
    return weights | cut


def fit_weights(net: DiT, weights: Weights, path: str | Path) -> None:
    """Put weights into a network; raise ValueError, naming the file ``path``, unless they fit."""
    ours = net.state_dict()
    there, here = sizes_of(weights), sizes_of(ours)
    wrong = [f"{name}: {there[name]} there, {here[name]} here" for name in here if there[name] != here[name]]
    if not wrong:  # nothing that has a plain name
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
        raise UserError(f"checkpoint: {str(path)!r} does not fit the network as configured: {few}")
    if not torch.allclose(weights["pos_embed"], ours["pos_embed"], atol=1e-4):
        raise UserError(f"checkpoint: {str(path)!r} has other position codes than a DiT of its size")
    net.load_state_dict(weights)


def config_of(path: str | Path) -> dict[str, Any]:
    """Arguments of a :class:`~lightning_diffclf.models.dit.DiT` that weights are for, with a null label.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it cannot be read, or its number of attention heads is not known: shapes do not show it, folders
            of diffusers and the published widths do.
    """
    heads = _read_config(Path(path))["num_attention_heads"] if Path(path).is_dir() else None
    return config_of_weights(read_published(path), path, heads)


def config_of_weights(weights: Weights, path: str | Path, num_heads: int | None = None) -> dict[str, Any]:
    """As :func:`config_of`, of weights that were read from ``path``; ``num_heads`` are theirs, if known."""
    sizes = sizes_of(weights)
    heads = num_heads or HEADS.get(sizes["hidden_size"])
    if heads is None:
        raise UserError(f"checkpoint: {str(path)!r} is {sizes['hidden_size']} wide, expected one of {sorted(HEADS)}")
    plain = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "mlp_ratio")
    return {name: sizes[name] for name in plain} | {
        "num_heads": heads,
        "num_classes": sizes[CLASSES] - 1,
        "learn_sigma": sizes[OUTPUTS] == 2 * sizes["in_channels"],
    }


def sizes_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of a DiT's weights say of it; the input is taken for a square if its tokens could be one."""
    hidden_size, in_channels, patch_size = weights["x_embedder.proj.weight"].shape[:3]
    tokens = weights["pos_embed"].shape[1]
    side = math.isqrt(tokens)
    return {
        "input_size": side * patch_size if side**2 == tokens else f"that of {tokens} tokens",
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "mlp_ratio": _mlp_width(weights) / hidden_size,
        CLASSES: len(weights["y_embedder.embedding_table.weight"]),
        OUTPUTS: len(weights["final_layer.linear.weight"]) // patch_size**2,
    }


def _mlp_width(weights: Mapping[str, Tensor]) -> int:
    """Width of the first block's MLP; a gated one has two layers of two thirds of it."""
    plain, gated = (weights.get(name) for name in MLP)
    return len(plain) if plain is not None else -(-3 * len(gated) // 4) if gated is not None else 0


def _read_mapping(path: Path) -> dict[str, Any]:
    found = read_json(path, "checkpoint")
    if not isinstance(found, dict):
        raise UserError(f"checkpoint: {str(path)!r} holds a {type(found).__name__}, expected names with values")
    return found


def _transformer(path: Path) -> Path:
    return path / "transformer" if (path / "transformer").is_dir() else path


def _read_config(path: Path) -> dict[str, Any]:
    """Configuration of the network in a folder of diffusers."""
    file = _transformer(path) / "config.json"
    if not file.is_file():
        raise UserError(f"checkpoint: {str(path)!r} has no transformer/config.json, expected a DiT of diffusers")
    config = _read_mapping(file)
    if config.get("_class_name") not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UserError(f"checkpoint: {str(path)!r} is a {config.get('_class_name')}, expected DiTTransformer2DModel")
    for name, expected in (("norm_type", "ada_norm_zero"), ("activation_fn", "gelu-approximate")):
        if config.get(name) != expected:
            raise UserError(f"checkpoint: {str(path)!r} has {name} {config.get(name)!r}, expected {expected!r}")
    for name in ("num_attention_heads", "sample_size"):
        if not is_count(config.get(name)) or config[name] == 0:
            raise UserError(f"checkpoint: {str(path)!r} has {name} {config.get(name)!r}, expected an integer from 1")
    return config


def _check_folder(net: DiT, schedule: NoiseSchedule, path: Path) -> None:
    """What a folder says beside its weights, and shapes do not show."""
    there, here = _read_config(path)["num_attention_heads"], attention_of(net).num_heads
    if there != here:
        raise UserError(f"checkpoint: {str(path)!r} has {there} heads, expected {here}")
    if not (path / "scheduler" / "scheduler_config.json").is_file():
        return
    import diffusers  # slow to import

    config = _read_mapping(path / "scheduler" / "scheduler_config.json")
    name = str(config.get("_class_name"))
    if not name.endswith("Scheduler") or not hasattr(diffusers, name):
        raise UserError(f"checkpoint: {str(path)!r} has a {name!r}, expected a scheduler of diffusers")
    found = NoiseSchedule.from_diffusers(getattr(diffusers, name).from_config(config))
    if found.prediction != schedule.prediction:
        raise UserError(f"checkpoint: {str(path)!r} predicts {found.prediction!r}, expected {schedule.prediction!r}")
    if isinstance(found, DiscreteSchedule) and isinstance(schedule, DiscreteSchedule):
        alphas, expected = found.alphas_cumprod, schedule.alphas_cumprod
        if len(alphas) != len(expected) or not torch.allclose(alphas, expected, atol=1e-4):
            raise UserError(f"checkpoint: {str(path)!r} has other noise levels than the schedule as configured")


def attention_of(net: DiT) -> Any:
    """Attention of the first block."""
    block: Any = net.blocks[0]
    return block.attn


# --- diffusers -----------------------------------------------------------------------------------------------------


def _from_diffusers(path: Path) -> Weights:
    config, folder = _read_config(path), _transformer(path)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"checkpoint: no weights (*.safetensors, *.bin) in {str(folder)!r}")
    theirs: Weights = {name: value for file in files for name, value in read_file(file).items()}
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
                        raise UserError(
                            f"checkpoint: {str(path)!r} has another {their} in block {i} than in block 0, expected "
                            "copies of one"
                        )
    except KeyError as error:
        raise UserError(f"checkpoint: {str(path)!r} lacks {error}, which a DiT of diffusers has") from error
    hidden_size, _, patch_size = ours["x_embedder.proj.weight"].shape[:3]
    side = config["sample_size"] // patch_size
    ours["pos_embed"] = positions_2d(side, side, hidden_size)[None]  # fixed; diffusers does not store it
    return ours
