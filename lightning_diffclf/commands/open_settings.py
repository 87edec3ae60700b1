"""What the settings of a network leave open, because the data say it: image size, channels, classes."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning import LightningDataModule

from lightning_diffclf.data.protocols import HasClassNames, HasImageShape, HasLatents, HasNumClasses
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.autoencoder import Autoencoder

OPEN = ("input_size", "in_channels", "num_classes")  # of a module, where they are null


def complete(config: Namespace) -> None:
    """Fill in, where ``model`` leaves one of :data:`OPEN` null, what ``data`` say; classes into both.

    So a checkpoint's settings are whole: it is evaluated with the classes that it was trained on, in their order, also
    on another folder.

    Args:
        config: Settings of a run, before classes are made of them; changed in place.

    Raises:
        ValueError: if the data do not say what is open, or cannot be used.
        FileNotFoundError: if there are no data.
    """
    network = config.get("model.init_args")
    missing = [name for name in OPEN if name in (network or {}) and network[name] is None]
    if not missing or config.get("data") is None:
        return
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(Namespace(data=config["data"].clone()))["data"]
    found = {**_of_images(data, network), **_of_classes(data)}
    for name in missing:
        if found.get(name) is None:
            raise UserError(f"model.{name}: null, but {type(data).__name__} does not say it; expected a number")
        network[name] = found[name]
    if "num_classes" in missing and (names := found.get("class_names")):
        if "class_names" in network and network["class_names"] is None:
            network["class_names"] = names
        arguments = config["data.init_args"]
        if "classes" in arguments and arguments["classes"] is None:
            arguments["classes"] = names


def _of_classes(data: object) -> dict[str, Any]:
    names = list(data.class_names or []) if isinstance(data, HasClassNames) else []
    count = data.num_classes if isinstance(data, HasNumClasses) else None
    return {"num_classes": count, "class_names": names if len(names) == count else None}


def _of_images(data: object, network: Namespace) -> dict[str, Any]:
    if not isinstance(data, HasImageShape):
        return {}
    channels, height, width = data.image_shape
    has_latents = isinstance(data, HasLatents) and len(data.latents("fit")) > 0
    if has_latents and not network.get("latents"):
        raise UserError("model.latents: false, but the data are latents; expected true")
    if network.get("latents") and not has_latents:
        if network.get("vae") is None:
            raise UserError("model.vae: null, expected the autoencoder that makes latents of the images")
        autoencoder = Autoencoder.load(network["vae"])
        if height % autoencoder.factor or width % autoencoder.factor or channels != 3:
            raise UserError(
                f"data: images of {channels} channels and {height} x {width} pixels, expected 3 channels and multiples "
                f"of {autoencoder.factor} for latents"
            )
        channels, height, width = autoencoder.channels, height // autoencoder.factor, width // autoencoder.factor
    return {"input_size": height if height == width else [height, width], "in_channels": channels}
