"""Checkpoints of trainings: read, compared with a module, and made into the module that was trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import LightningModule
from torch import Tensor

from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.hub import AUTOENCODER, local_file
from lightning_diffclf.models.published import (
    CLASSES,
    check_measured,
    config_of,
    is_published,
    load_published,
    sizes_of,
)
from lightning_diffclf.models.weight_files import read_file
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint onto the CPU without running code from it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no Lightning checkpoint.
    """
    if not Path(path).is_file():
        raise MissingFile(f"checkpoint: no file {str(path)!r}")
    checkpoint = read_file(Path(path))
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"checkpoint: {str(path)!r} has no 'state_dict', expected a Lightning checkpoint")
    if not isinstance(checkpoint.get("hyper_parameters", {}), Mapping):
        raise UserError(f"checkpoint: {str(path)!r} has 'hyper_parameters' that are no mapping of names to values")
    return checkpoint


def check_checkpoint(module: LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError unless ``checkpoint`` has the weights of a module like this one, trained in its way."""
    for name in ("schedule", "prediction"):  # which shapes do not show
        trained, configured = (h.get(name) for h in (checkpoint.get("hyper_parameters", {}), module.hparams))
        if "hyper_parameters" in checkpoint and trained != configured:
            raise UserError(
                f"checkpoint: {str(path)!r} was trained with {name} {trained!r}, "
                f"but {name} is configured as {configured!r}"
            )
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if ours == theirs:
        return
    differing = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    found = [f"{name} is {theirs[name]} there and {ours[name]} here" for name in differing[:3]]
    missing, surplus = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    found += [f"{len(missing)} tensors are missing there, such as {missing[0]}"] if missing else []
    found += [f"{len(surplus)} tensors are unknown here, such as {surplus[0]}"] if surplus else []
    raise UserError(
        f"checkpoint: {str(path)!r} does not fit {type(module).__name__} as configured: {'; '.join(found)}. "
        "To train anew, give another --run_dir"
    )


def check_classes(module: LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Raise ValueError where ``checkpoint`` was trained on classes of other names, or in another order.

    Weights fit as long as there are as many, and would then be taken for those of other classes.
    """
    trained, configured = (h.get("class_names") for h in (checkpoint.get("hyper_parameters", {}), module.hparams))
    if not isinstance(trained, list) or not isinstance(configured, list) or trained == configured:
        return
    new = [name for name in configured if name not in trained]
    gone = [name for name in trained if name not in configured]
    found = [f"{new[0]!r} is new"] if new else []
    found += [f"{gone[0]!r} is gone"] if gone else []
    raise UserError(
        f"checkpoint: {str(path)!r} was trained on {len(trained)} classes, but there are {len(configured)} here: "
        f"{' and '.join(found) or 'the same ones in another order'}. To train anew, give another --run_dir"
    )


def trained_module(path: str | Path, vae: str | None = None, raw: bool = False) -> ClassConditionalDiT:
    """The module of a checkpoint, with averaged weights where there are.

    Lightning's ``load_from_checkpoint`` would take the class to make and its arguments from the file; here the class is
    known, and arguments are plain values.

    Args:
        path: The checkpoint.
        vae: Autoencoder in place of the module's own.
        raw: Take the weights in training rather than their average.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or is of another module.
    """
    return module_of(read_checkpoint(path), path, vae, raw)


def network_of(path: str, vae: str | None, schedule: str) -> ClassConditionalDiT:
    """The network of a checkpoint, with averaged weights; or published weights, with their sizes.

    Args:
        path: Checkpoint, published file, or folder of diffusers.
        vae: Autoencoder in place of the network's own; the default one for published weights without it.
        schedule: Of published weights.

    Raises:
        FileNotFoundError: if there is nothing.
        ValueError: if it cannot be read.
    """
    path = str(local_file(path))
    if not Path(path).exists():
        raise MissingFile(f"checkpoint: no file or folder {path!r}")
    if not is_published(path):
        return trained_module(path, vae)
    config = config_of(path)
    if schedule == "sit":
        config["learn_sigma"] = False
    own = f"{path}/vae" if (Path(path) / "vae").is_dir() else AUTOENCODER
    module = ClassConditionalDiT(**config, schedule=schedule, vae=vae or own)  # type: ignore[arg-type]
    load_published(module.net, module.schedule, path)
    return module


def module_of(
    checkpoint: Mapping[str, Any], path: str | Path, vae: str | None = None, raw: bool = False
) -> ClassConditionalDiT:
    """As :func:`trained_module`, of a checkpoint that was read from ``path``."""
    weights = checkpoint.get("current_model_state", checkpoint["state_dict"]) if raw else checkpoint["state_dict"]
    saved = checkpoint.get("hyper_parameters", {})
    return made_of(ClassConditionalDiT, saved | ({} if vae is None else {"vae": vae}), weights, path)


def made_of(
    cls: type[ClassConditionalDiT], arguments: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path
) -> ClassConditionalDiT:
    """A module made of what a file says.

    Args:
        cls: The class to make.
        arguments: Its arguments by name, and others, such as what Lightning notes for itself.
        weights: Its weights by name.
        path: Where they were found, for messages.

    Raises:
        ValueError: if arguments are no plain values, or the weights are not those of the module that they make.
    """
    known = set(inspect.signature(cls.__init__).parameters) - {"self"}
    arguments = {name: value for name, value in arguments.items() if name in known}
    if "net.final_layer.linear.weight" not in weights or not arguments:
        raise UserError(f"checkpoint: {str(path)!r} is of no ClassConditionalDiT, expected one that `fit` wrote")
    strange = [name for name, value in arguments.items() if not _is_plain(value)]
    if strange:
        raise UserError(f"checkpoint: {str(path)!r} has {strange[0]!r} in its hyper_parameters, expected plain values")
    _check_sizes(arguments, weights, path)
    try:
        module = cls(**arguments)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"checkpoint: {str(path)!r} has hyper_parameters of no module ({reason})") from error
    check_checkpoint(module, {"state_dict": weights}, path)
    module.load_state_dict(weights)
    return module


def _check_sizes(arguments: Mapping[str, Any], weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Raise ValueError where arguments ask for another network than the weights are: it could fill the memory first."""
    net = {name.removeprefix("net."): value for name, value in weights.items() if name.startswith("net.")}
    check_measured(net, path)
    found = sizes_of(net)
    tolerances = {
        "hidden_size": 0,
        "depth": 0,
        "patch_size": 0,
        "in_channels": 0,
        "mlp_ratio": 1 / found["hidden_size"],
    }
    for name, tolerance in tolerances.items():
        asked = arguments.get(name, found[name]) if arguments.get("model") is None else found[name]
        if not isinstance(asked, (int, float)) or not abs(asked - found[name]) <= tolerance:
            raise UserError(
                f"checkpoint: {str(path)!r} has {name} {asked!r} in its hyper_parameters, but weights of {found[name]}"
            )
    if arguments.get("num_classes", 0) not in range(found[CLASSES] + 1):
        raise UserError(
            f"checkpoint: {str(path)!r} has num_classes {arguments['num_classes']!r} in its hyper_parameters, but "
            f"{found[CLASSES]} {CLASSES}"
        )
    sides = arguments.get("input_size", 0)
    side = max(sides, default=0) if isinstance(sides, (list, tuple)) else sides
    if not isinstance(side, int) or side > net["pos_embed"].shape[1] * found["patch_size"]:
        raise UserError(
            f"checkpoint: {str(path)!r} has input_size {sides!r} in its hyper_parameters, but weights for "
            f"{net['pos_embed'].shape[1]} tokens"
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
