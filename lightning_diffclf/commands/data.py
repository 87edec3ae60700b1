"""``diffclf shards|encode``: data sets made ready for training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L

from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.commands.running import on_first_process, progress
from lightning_diffclf.data.encoding import chunk_ends, encode
from lightning_diffclf.data.imagenet import classes_of, network_classes_of, open_source
from lightning_diffclf.data.latents import Latents, LatentsIndex, LatentsWriter
from lightning_diffclf.data.packing import pack, plan_shards
from lightning_diffclf.data.shards import ShardIndex
from lightning_diffclf.data.zero_shot import FolderImages
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.autoencoder import DEFAULT, Autoencoder


def shards_command(args: Sequence[str]) -> None:
    """``diffclf shards``: a folder of images becomes tar shards."""
    parser = Parser(
        prog="diffclf shards",
        description="Pack a folder of images, one folder for each class, into tar shards in webdataset's layout. "
        "Images go in as they are, in random order. The same command resumes where it was stopped.",
    )
    parser.add_argument("--data", type=str, required=True, help="folder with a folder of images for each class")
    parser.add_argument("--out", type=str, required=True, help="folder for the shards")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="images in one shard")
    parser.add_argument("--processes", type=int, default=4, help="shards that are written at a time")
    parser.add_argument("--seed", type=int | None, default=0, help="of the order; null keeps that of the folder")
    given = parser.parse_args(list(args))
    if given.processes < 1:
        raise UserError(f"processes: {given.processes}, expected at least 1")
    source = open_source(given.data)
    if not isinstance(source, FolderImages):
        raise UserError(f"data: {given.data!r} is no folder of images, expected one folder for each class")
    plans = plan_shards(source.files, Path(given.out), given.images_per_shard, seed=given.seed)
    sizes = {plan.path: len(plan.files) for plan in plans}
    index = ShardIndex(
        {plan.path.name: len(plan.files) for plan in plans},
        classes=classes_of(source),
        network_classes=network_classes_of(source),
        positions=True,
        seed=given.seed,
    )
    with progress() as bar:
        task = bar.add_task("packing", total=len(source.files))
        for path in pack(plans, index, given.processes):
            bar.advance(task, sizes[path])
    print(f"{len(source)} images of {len(source.classes)} classes in {len(plans)} shards: {given.out}")


def encode_command(args: Sequence[str]) -> None:
    """``diffclf encode``: images become latents."""
    parser = Parser(
        prog="diffclf encode",
        description="Make latents of a folder of images or of tar shards, once: of each image and its mirror image, "
        "the mean and standard deviation of the autoencoder's posterior, in float16. Runs on several devices, also "
        "under torchrun or srun; the same command resumes where it stopped. At the end all is read back and checked.",
    )
    parser.add_argument("--data", type=str, required=True, help="folder with a folder for each class, or tar shards")
    parser.add_argument("--out", type=str, required=True, help="folder for the latents")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--vae", type=str, default=DEFAULT, help="folder or Hub repository of the autoencoder")
    parser.add_argument("--batch_size", type=int, default=32, help="images that are encoded at once")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that read images, for each device")
    parser.add_argument("--accelerator", type=str, default="auto", help="gpu, cpu, …")
    parser.add_argument("--devices", type=int, default=1, help="devices of this machine")
    parser.add_argument("--num_nodes", type=int, default=1, help="machines, under srun or torchrun")
    given = parser.parse_args(list(args))
    for name in ("size", "batch_size"):
        if given[name] < 1:
            raise UserError(f"{name}: {given[name]}, expected at least 1")
    source = open_source(given.data)
    if isinstance(source, Latents):
        raise UserError(f"data: {given.data!r} are latents already, expected images or shards")
    autoencoder = Autoencoder.load(given.vae)
    if given.size % autoencoder.factor:
        raise UserError(f"size: {given.size}, expected a multiple of the autoencoder's {autoencoder.factor}")
    side = given.size // autoencoder.factor
    index = LatentsIndex(
        source=given.data,
        chunk_ends=chunk_ends(source),
        shape=(autoencoder.channels, side, side),
        size=given.size,
        vae=given.vae,
        fingerprint=autoencoder.fingerprint,
        scaling=autoencoder.scaling,
        shift=autoencoder.shift,
        classes=classes_of(source),
        network_classes=network_classes_of(source),
    )
    fabric = L.Fabric(accelerator=given.accelerator, devices=given.devices, num_nodes=given.num_nodes)
    fabric.launch()
    out = Path(given.out)
    on_first_process(fabric, lambda: LatentsWriter.create(out, index))
    writer = LatentsWriter(out)
    autoencoder = autoencoder.to(fabric.device)
    mine = range(fabric.global_rank, len(writer.chunks), fabric.world_size)
    done = sum(writer.chunks[chunk][1] - writer.chunks[chunk][0] for chunk in mine if writer.is_done(chunk))
    with progress(disable=not fabric.is_global_zero) as bar:
        name = "encoding" if fabric.world_size == 1 else f"encoding (1 of {fabric.world_size} processes)"
        task = bar.add_task(name, total=sum(writer.chunks[c][1] - writer.chunks[c][0] for c in mine), completed=done)
        for count in encode(
            source,
            writer,
            autoencoder.moments,
            fabric.device,
            given.batch_size,
            given.num_workers,
            fabric.global_rank,
            fabric.world_size,
        ):
            bar.advance(task, count)
    fabric.barrier()
    if fabric.is_global_zero:
        with progress() as bar:
            task = bar.add_task("checking", total=len(writer.chunks))
            for _ in writer.verify():
                bar.advance(task)
        print(f"{index.count} images and their mirror images: {out}")
    fabric.barrier()
