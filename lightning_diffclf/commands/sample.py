"""``diffclf sample``: images of given classes from a trained network, or from a text-to-image model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from jsonargparse import Namespace
from PIL import Image
from torch import Tensor

from lightning_diffclf.baselines.synthetic_data import TextToImage
from lightning_diffclf.commands.running import on_first_process, progress
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.files import read_json, replacing, write_json
from lightning_diffclf.hub import local_file
from lightning_diffclf.identity import digest_of_weights, identity_of
from lightning_diffclf.models.families import families_in
from lightning_diffclf.models.pipeline import load
from lightning_diffclf.models.published import is_published
from lightning_diffclf.modules.checkpoints import network_of
from lightning_diffclf.modules.conditions import chosen_classes
from lightning_diffclf.modules.published_network import PublishedNetwork
from lightning_diffclf.modules.zero_shot_sd import make_prompts
from lightning_diffclf.results.figures import save_image_grid
from lightning_diffclf.results.settings import differences

SETTINGS = "samples.json"
GRID_SUFFIXES = (".png", ".jpg", ".jpeg")
GRID_IMAGES = 400  # in one grid; drawing more takes minutes


class Source(NamedTuple):
    """What draws images.

    Attributes:
        names: Name of each class.
        settings: What images depend on, by name; the first one is only where it was found.
        to: Moves it to a device.
        draw: Makes images (B, C, H, W) in [-1, 1] of classes and numbers.
    """

    names: Sequence[str]
    settings: dict[str, Any]
    to: Callable[[torch.device], object]
    draw: Callable[[list[tuple[int, int]]], Tensor]


def sample_command(given: Namespace) -> None:
    """``diffclf sample``: a grid, or a folder with one file for each image."""
    check_at_least(1, per_class=given.per_class, batch_size=given.batch_size)
    if (given.ckpt is None) == (given.model is None):
        raise UserError("sample: expected either ckpt, a class-conditional network, or model, a text-to-image one")
    network, foreign = ("ckpt", ("labels", "prompts")) if given.model is None else ("model", ("vae", "guided_channels"))
    for name in foreign:
        if given[name] is not None:
            raise UserError(f"{name}: {given[name]!r} means nothing for --{network}; expected none")
    source = of_checkpoint(given) if given.model is None else of_pipeline(given)
    classes, out = chosen_classes(given.classes, source.names), Path(given.out)
    into_grid = out.suffix.lower() in GRID_SUFFIXES
    wanted = [(c, number) for c in classes for number in range(given.per_class)]
    if into_grid and len(wanted) > GRID_IMAGES:
        raise UserError(f"out: a grid of {len(wanted):,} images, expected at most {GRID_IMAGES}; or give a folder")
    if not into_grid and out.is_file():
        raise UserError(f"out: {str(out)!r} is a file, expected a folder, or a grid named {' or '.join(GRID_SUFFIXES)}")
    fabric = L.Fabric(
        accelerator=given.accelerator, devices=given.devices, num_nodes=given.num_nodes, precision=given.precision
    )
    fabric.launch()
    settings = source.settings | {name: given[name] for name in ("guidance_scale", "steps", "seed", "precision")}
    if into_grid:
        todo = wanted if fabric.is_global_zero else []
    else:
        on_first_process(fabric, lambda: prepare_folder(out, settings))
        # One process says what is missing: others might see files of those that have begun. Shares are equal then.
        missing = [one for one in wanted if not file_of(out, *one).is_file()] if fabric.is_global_zero else []
        todo = fabric.broadcast(missing)[fabric.global_rank :: fabric.world_size]
    if todo:
        source.to(fabric.device)
    made = []
    with progress(disable=not fabric.is_global_zero) as bar:
        task = bar.add_task("sampling", total=len(todo))
        for first in range(0, len(todo), given.batch_size):
            some = todo[first : first + given.batch_size]
            with fabric.autocast():
                images = source.draw(some).cpu()
            if into_grid:
                made.append(images)
            else:
                for one, image in zip(some, images, strict=True):
                    save_image(image, file_of(out, *one))
            bar.advance(task, len(some))
    if made:
        save_image_grid(torch.cat(made), [source.names[c] for c in classes], out)
    fabric.barrier()
    if fabric.is_global_zero:
        print(f"{len(wanted)} images of {len(classes)} classes: {out}")


def of_checkpoint(given: Namespace) -> Source:
    """A class-conditional network: of a training, or published.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it cannot be read.
    """
    path = local_file(given.ckpt)
    if path.is_file() and is_published(path) and "dit" not in families_in(path):
        return of_family(given)
    module = network_of(given.ckpt, given.vae, given.schedule).eval()
    latents = module.hparams["latents"]
    networks = [module.net, *([module.autoencoder.vae] if latents else [])]  # fails here if not there
    settings = {"ckpt": given.ckpt, "weights": digest_of_weights(*networks), "schedule": identity_of(module.schedule)}

    def draw(some: list[tuple[int, int]]) -> Tensor:
        labels = torch.tensor([c for c, _ in some], device=module.device)
        ids = [f"{c}/{number}" for c, number in some]
        x0 = module.sample(labels, given.guidance_scale, given.steps, given.seed, given.guided_channels, ids)
        with torch.autocast(module.device.type, enabled=False):
            return module.autoencoder.decode(x0) if latents else x0

    return Source(module.candidates.names, settings | {"guided_channels": given.guided_channels}, module.to, draw)


def of_family(given: Namespace) -> Source:
    """Published weights of a family that says more than weights do: LightningDiT, REPA, REPA-E, EDM2.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if parts do not belong together, or another schedule than the family's is asked for.
    """
    if given.schedule != "linear":
        raise UserError(
            f"schedule: {given.schedule!r}, but the family of {given.ckpt!r} has one of its own; expected none"
        )
    module = PublishedNetwork(given.ckpt, vae=given.vae).eval()
    own = module.autoencoder
    weights = {"weights": digest_of_weights(module.published.net), "autoencoder": identity_of(own)}

    def draw(some: list[tuple[int, int]]) -> Tensor:
        labels = torch.tensor([c for c, _ in some], device=module.device)
        ids = [f"{c}/{number}" for c, number in some]
        return module.sample(labels, given.guidance_scale, given.steps, given.seed, given.guided_channels, ids)

    settings = {"ckpt": given.ckpt, **weights, "schedule": identity_of(module.schedule)}
    return Source(module.candidates.names, settings | {"guided_channels": given.guided_channels}, module.to, draw)


def of_pipeline(given: Namespace) -> Source:
    """A text-to-image model and prompts.

    Raises:
        ValueError: if it cannot be loaded, or prompts and labels do not fit.
        FileNotFoundError: if there is no such file of prompts.
    """
    prompts = given.prompts or ["a photo of a {}."]
    labels = labels_of(given.labels) if given.labels else None
    asked = make_prompts(prompts[0] if len(prompts) == 1 else prompts, labels)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(given.precision, torch.float32)
    drawer = TextToImage(load(given.model, dtype=dtype), asked)
    settings = {"model": given.model, "denoiser": identity_of(drawer)}
    return Source(
        drawer.names,
        settings,
        drawer.to,
        lambda some: drawer.sample(some, given.guidance_scale, given.steps, given.seed),
    )


def labels_of(text: str) -> list[str]:
    """Labels with commas between them; ``@NAME``, or ``@NAME:ROOT``: what the classes of a public data set are called.

    Raises:
        FileNotFoundError: if the data set is not there.
        ValueError: if there is none of that name.
    """
    if not text.startswith("@"):
        return [label.strip() for label in text.split(",")]
    name, _, root = text[1:].partition(":")
    return ZeroShotDataModule(name, root or "data").class_names


def prepare_folder(out: Path, settings: dict[str, object]) -> None:
    """Note what is being generated, or check that it is what the folder has.

    A network may move, and another one may take its name: what counts are the weights, not the first of the settings.

    Raises:
        ValueError: if the folder holds samples made otherwise.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.is_file() and any(out.glob("*/*.png")):  # settings alone are those of a command that failed
        place = next(iter(settings))
        there = read_json(path, "samples") | {place: settings[place]}
        different = list(differences(there, settings))
        if different:
            raise UserError(f"out: {str(out)!r} holds other samples ({'; '.join(different)}); give another folder")
    elif not path.is_file() and any(out.iterdir()):
        raise UserError(f"out: {str(out)!r} is not empty, expected a new folder or one of samples")
    write_json(settings, path)


def file_of(out: Path, c: int, number: int) -> Path:
    """Where an image goes."""
    return out / f"{c:04d}" / f"{number:05d}.png"


def save_image(image: Tensor, path: Path) -> None:
    """Write an image (1 or 3, H, W) in [-1, 1] as PNG, whole or not at all."""
    values = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    with replacing(path, "sample") as temporary:
        Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).save(temporary, "PNG")
