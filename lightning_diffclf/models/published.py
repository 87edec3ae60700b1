"""Weights of class-conditional DiT networks as others publish them, read and written.

Read are the files of Peebles & Xie (``DiT-XL-2-256x256.pt``), also as their training script writes them; SiT's, of the
same network trained on a rectified flow; safetensors with the same names; and folders of diffusers. Written are folders
of diffusers. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
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
    "blocks.0.mlp.fc1.bias": 1,
    "final_layer.linear.weight": 2,
}  # tensors whose shapes give a network's size, and how many axes they have

CLASSES = "rows for classes (one more with the null label)"

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
        found = read_file(path)
        for name in ("ema", "model"):  # of the published training scripts
            found = found[name] if isinstance(found.get(name), Mapping) else found
    else:
        raise MissingFile(f"checkpoint: no file or folder {str(path)!r}")
    check_measured(found, path)
    return {name: value.float() for name, value in found.items()}


def check_measured(weights: Mapping[str, Any], path: str | Path) -> None:
    """Raise ValueError unless ``weights``, of the file ``path``, have the tensors that give a DiT's size."""
    strange = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if strange or not weights.keys() >= MEASURED.keys():
        raise UserError(f"checkpoint: {str(path)!r} has no weights of a DiT (it has {sorted(map(str, weights))[:4]})")
    for name, axes in MEASURED.items():
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
    c, p = net.in_channels, net.patch_size
    if net.out_channels == c and schedule.prediction == "velocity":
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            if len(weights[name]) == 2 * c * p * p:
                weights[name] = weights[name].unflatten(0, (p * p, 2 * c))[:, :c].flatten(0, 1)
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
    weights, heads_of = read_published(path), {width: heads for width, _, heads in SIZES.values()}
    sizes = sizes_of(weights)
    heads = heads_of.get(sizes["hidden_size"])
    if Path(path).is_dir():
        heads = _read_config(Path(path))["num_attention_heads"]
    if heads is None:
        raise UserError(f"checkpoint: {str(path)!r} is {sizes['hidden_size']} wide, expected one of {sorted(heads_of)}")
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
        "mlp_ratio": len(weights["blocks.0.mlp.fc1.bias"]) / hidden_size,
        CLASSES: len(weights["y_embedder.embedding_table.weight"]),
        OUTPUTS: len(weights["final_layer.linear.weight"]) // patch_size**2,
    }


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
    there, here = _read_config(path)["num_attention_heads"], _attention(net).num_heads
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


def _attention(net: DiT) -> Any:
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
    attention, hidden_size = _attention(net), net.pos_embed.shape[2]
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

    from lightning_diffclf.models.autoencoder import Autoencoder

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
