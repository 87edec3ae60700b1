"""``diffclf sample``: images of given classes from a trained network."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import torch
from jsonargparse import Namespace
from PIL import Image
from torch import Tensor

from lightning_diffclf.commands.running import on_first_process, progress
from lightning_diffclf.errors import MissingFile, UserError, check_at_least
from lightning_diffclf.files import replacing, write_json
from lightning_diffclf.hub import AUTOENCODER, local_file
from lightning_diffclf.identity import digest_of_weights, identity_of
from lightning_diffclf.models.published import config_of, is_published, load_published
from lightning_diffclf.modules.checkpoints import trained_module
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
from lightning_diffclf.modules.conditions import chosen_classes
from lightning_diffclf.results.figures import save_image_grid
from lightning_diffclf.results.settings import differences

SETTINGS = "samples.json"
GRID_SUFFIXES = (".png", ".jpg", ".jpeg")
GRID_IMAGES = 400  # in one grid; drawing more takes minutes


def sample_command(given: Namespace) -> None:
    """``diffclf sample``: a grid, or a folder with one file for each image."""
    check_at_least(1, per_class=given.per_class, batch_size=given.batch_size)
    module = network_of(given.ckpt, given.vae, given.schedule).eval()
    classes, out = chosen_classes(given.classes, module.candidates.names), Path(given.out)
    into_grid = out.suffix.lower() in GRID_SUFFIXES
    wanted = [(c, number) for c in classes for number in range(given.per_class)]
    if into_grid and len(wanted) > GRID_IMAGES:
        raise UserError(f"out: a grid of {len(wanted):,} images, expected at most {GRID_IMAGES}; or give a folder")
    if not into_grid and out.is_file():
        raise UserError(f"out: {str(out)!r} is a file, expected a folder, or a grid named {' or '.join(GRID_SUFFIXES)}")
    networks = [module.net, *([module.autoencoder.vae] if module.hparams["latents"] else [])]  # fails here if not there
    fabric = L.Fabric(
        accelerator=given.accelerator, devices=given.devices, num_nodes=given.num_nodes, precision=given.precision
    )
    fabric.launch()
    module.to(fabric.device)
    settings = {"ckpt": given.ckpt, "weights": digest_of_weights(*networks), "schedule": identity_of(module.schedule)}
    settings |= {name: given[name] for name in ("guidance_scale", "guided_channels", "steps", "seed", "precision")}

    def generate(some: list[tuple[int, int]]) -> Tensor:
        labels = torch.tensor([c for c, _ in some], device=fabric.device)
        ids = [f"{c}/{number}" for c, number in some]
        with fabric.autocast():
            x0 = module.sample(labels, given.guidance_scale, given.steps, given.seed, given.guided_channels, ids)
        return module.autoencoder.decode(x0) if module.hparams["latents"] else x0

    if into_grid:
        todo = wanted if fabric.is_global_zero else []
    else:
        on_first_process(fabric, lambda: prepare_folder(out, settings))
        # One process says what is missing: others might see files of those that have begun. Shares are equal then.
        missing = [one for one in wanted if not file_of(out, *one).is_file()] if fabric.is_global_zero else []
        todo = fabric.broadcast(missing)[fabric.global_rank :: fabric.world_size]
    made = []
    with progress(disable=not fabric.is_global_zero) as bar:
        task = bar.add_task("sampling", total=len(todo))
        for first in range(0, len(todo), given.batch_size):
            some = todo[first : first + given.batch_size]
            images = generate(some).cpu()
            if into_grid:
                made.append(images)
            else:
                for one, image in zip(some, images, strict=True):
                    save_image(image, file_of(out, *one))
            bar.advance(task, len(some))
    if made:
        save_image_grid(torch.cat(made), [module.candidates.names[c] for c in classes], out)
    fabric.barrier()
    if fabric.is_global_zero:
        print(f"{len(wanted)} images of {len(classes)} classes: {out}")


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


def prepare_folder(out: Path, settings: dict[str, object]) -> None:
    """Note what is being generated, or check that it is what the folder has.

    A checkpoint may move, and another one may take its name: what counts are the weights.

    Raises:
        ValueError: if the folder holds samples made otherwise.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.is_file() and any(out.glob("*/*.png")):  # settings alone are those of a command that failed
        there = json.loads(path.read_text()) | {"ckpt": settings["ckpt"]}
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
