"""``diffclf shards|encode``: data sets made ready for training."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from jsonargparse import Namespace

from lightning_diffclf.commands.running import on_first_process, progress
from lightning_diffclf.data.encoding import chunk_ends, encode
from lightning_diffclf.data.imagenet import classes_of, network_classes_of, open_source
from lightning_diffclf.data.latents import Latents, LatentsIndex, LatentsWriter
from lightning_diffclf.data.packing import pack, plan_shards
from lightning_diffclf.data.public_sets import FolderImages
from lightning_diffclf.data.shards import ShardIndex
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.models.autoencoder import Autoencoder


def shards_command(given: Namespace) -> None:
    """``diffclf shards``: a folder of images becomes tar shards."""
    check_at_least(1, processes=given.processes)
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


def encode_command(given: Namespace) -> None:
    """``diffclf encode``: images become latents."""
    check_at_least(1, size=given.size, batch_size=given.batch_size)
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
