"""How images in folders become tar shards, which :mod:`.shards` reads."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import webdataset as wds

from lightning_diffclf.data.shards import INDEX, ShardIndex
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.files import read_checked_json, remove_temporaries, replacing, write_checked_json


@dataclass(frozen=True)
class Packed:
    """A shard to write: which files go in, at which positions of the data set, with which labels."""

    path: Path
    files: list[tuple[int, Path, int]]


def plan_shards(
    files: Sequence[tuple[Path, int]], out: Path, images_per_shard: int, prefix: str = "shard", seed: int | None = 0
) -> list[Packed]:
    """Which image goes where: in random order, so that each shard has images of all classes; in their own without seed.

    Args:
        files: Path and label of each image.
        out: Folder of the shards.
        images_per_shard: Number of images in each, but for the last.
        prefix: Beginning of the shards' names.
        seed: Key of the order, or None.

    Raises:
        ValueError: if ``images_per_shard`` is below 1.
    """
    check_at_least(1, images_per_shard=images_per_shard)
    order = np.arange(len(files)) if seed is None else np.random.default_rng(seed).permutation(len(files))
    plans = []
    for number, begin in enumerate(range(0, len(files), images_per_shard)):
        chosen = [int(i) for i in order[begin : begin + images_per_shard]]
        plans.append(Packed(out / f"{prefix}-{number:06d}.tar", [(i, *files[i]) for i in chosen]))
    return plans


def write_shard(plan: Packed) -> Path:
    """Write one shard, unless it is there; whole or not at all. Images go in as they are.

    Raises:
        OSError: if it cannot be written.
    """
    if plan.path.is_file():
        return plan.path
    with replacing(plan.path, "shards") as temporary, open(temporary, "wb") as file, wds.TarWriter(file) as tar:
        for position, path, label in plan.files:
            name = path.suffix[1:].lower()
            tar.write({"__key__": f"{position:08d}", name: path.read_bytes(), "cls": str(label)})
    return plan.path


def pack(plans: Sequence[Packed], index: ShardIndex, processes: int = 1) -> Iterator[Path]:
    """Write shards and then their index; yields each shard as it is done. Shards that are there are kept.

    Args:
        plans: What :func:`plan_shards` says.
        index: What they will be.
        processes: How many write at a time.

    Raises:
        ValueError: if the folder has an index of other shards.
        OSError: if something cannot be written.
    """
    out = plans[0].path.parent
    planned = out / f"{INDEX}.planned"  # what the shards that are there were packed by, before all are
    for path in (out / INDEX, planned):
        if path.is_file() and read_checked_json(path, "shards") != asdict(index):
            raise UserError(f"shards: {str(out)!r} holds other shards, expected an empty folder or the same data")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INDEX).is_file():
        remove_temporaries(out)
        write_checked_json(asdict(index), planned, what="shards")
    if processes == 1:
        yield from map(write_shard, plans)
    else:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(write_shard, plans)
    if planned.is_file():
        os.replace(planned, out / INDEX)
