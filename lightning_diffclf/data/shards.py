"""Tar shards of labelled images: how they are packed, read for training without end, and read for evaluation.

A shard is a tar file in webdataset's layout: for each image a member ``KEY.jpg`` (or another format) and ``KEY.cls``
with its class as a number. ``diffclf shards`` writes an ``index.json`` beside them, which says how many images each
shard has; shards of others need none.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from lightning_diffclf.data.images import SUFFIXES, upright_rgb
from lightning_diffclf.errors import MissingFile, UserError

INDEX = "index.json"


@dataclass(frozen=True)
class ShardIndex:
    """What is in a folder of shards.

    Attributes:
        counts: Number of images in each shard, by file name.
        classes: Name of each class; empty if unknown.
        network_classes: Which of ImageNet's 1,000 classes each class is, or None.
        positions: Whether keys are positions in the data set that was packed, and so the same ids as there.
        seed: Key of the order in which they were packed.
    """

    counts: dict[str, int]
    classes: list[str] = field(default_factory=list)
    network_classes: list[list[int]] | None = None
    positions: bool = False
    seed: int | None = None

    @classmethod
    def read(cls, folder: Path) -> ShardIndex | None:
        """That of a folder, or None if it has none.

        Raises:
            ValueError: if it cannot be read.
        """
        path = folder / INDEX
        if not path.is_file():
            return None
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"shards: {str(path)!r} cannot be read ({error})") from error


class Shards:
    """Tar shards, local or remote.

    Args:
        pattern: A folder with ``*.tar``; or a pattern such as ``data/train-{000000..000999}.tar``, also of URLs.
        skip_bad: Share of missing shards that is tolerated, in [0, 1).

    Attributes:
        urls: The shards, in order, without missing ones.
        index: What is known about them, or None.

    Raises:
        FileNotFoundError: if there are none, or too many are missing.
    """

    def __init__(self, pattern: str, skip_bad: float = 0.0) -> None:
        folder = Path(pattern)
        self.root = pattern
        if folder.is_dir():
            self.index = ShardIndex.read(folder)
            names = sorted(path.name for path in folder.glob("*.tar")) if self.index is None else self.index.counts
            urls = [str(folder / name) for name in names]
        else:
            urls = list(wds.shardlists.expand_urls(pattern))
            self.index = None if is_remote(urls[0]) else ShardIndex.read(Path(urls[0]).parent)
        missing = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
        if not urls or len(missing) > skip_bad * len(urls):
            what = f"{missing[0]!r} ({len(missing)} of {len(urls)} are missing)" if missing else f"in {pattern!r}"
            raise MissingFile(f"data: no shard {what}")
        if missing:
            print(f"warning: {len(missing)} of {len(urls)} shards are missing, such as {missing[0]}", file=sys.stderr)
        self.urls = [url for url in urls if url not in set(missing)]

    def count(self, url: str) -> int | None:
        """Number of images in a shard, None if unknown."""
        return None if self.index is None else self.index.counts.get(Path(url).name)

    def identity(self) -> dict[str, Any]:
        """Which shards there are, and what the index says of them."""
        return {"shards": [Path(url).name for url in self.urls], "index": self.index}

    def samples(self, url: str) -> Iterator[dict[str, Any]]:
        """Undecoded samples of a shard: members by suffix, ``__key__`` and ``__url__``.

        Raises:
            ValueError: if the shard is damaged, or shorter than the index says.
        """
        seen = 0
        try:
            for sample in wds.tariterators.tarfile_samples(iter([{"url": url}])):
                seen += 1
                yield sample
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"data: shard {url!r} is damaged after {seen} images ({error})") from error
        if seen != self.count(url) and self.count(url) is not None:
            raise UserError(f"data: shard {url!r} has {seen} images, expected {self.count(url)} as {INDEX} says")

    def decode(self, sample: dict[str, Any]) -> tuple[Image.Image, int, int | str]:
        """RGB image, label and id of a sample.

        Raises:
            ValueError: if it has no image or label, or they cannot be read.
        """
        name = f"{sample['__key__']} in {sample.get('__url__')}"
        suffix = next((key for key in sample if f".{key.lower()}" in SUFFIXES), None)
        if suffix is None or "cls" not in sample:
            members = sorted(key for key in sample if not key.startswith("__"))
            raise UserError(f"data: sample {name} has {members}, expected an image (jpg, png, …) and cls")
        try:
            label = int(sample["cls"])
            with Image.open(io.BytesIO(sample[suffix])) as file:
                image = upright_rgb(file)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, by format
            raise UserError(f"data: sample {name} cannot be read ({error})") from error
        key = sample["__key__"]
        return image, label, int(key) if self.index is not None and self.index.positions else key


def is_remote(url: str) -> bool:
    """Whether a shard is not a local file: ``https://…``, ``pipe:…``."""
    return "://" in url or url.startswith("pipe:")


class ShardImages(IterableDataset[dict[str, Any]]):
    """Every image of shards once, in order, each shard on one process and in one worker of it; nothing is skipped.

    Args:
        shards: The shards.
        prepare: RGB image to tensor.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: while reading, as :class:`Shards`.
    """

    def __init__(
        self, shards: Shards, prepare: Callable[[Image.Image], Any], rank: int = 0, world_size: int = 1
    ) -> None:
        self.shards, self.prepare, self.rank, self.world_size = shards, prepare, rank, world_size
        self.root = shards.root

    def __iter__(self) -> Iterator[dict[str, Any]]:
        consumer, consumers = _consumer(self.rank, self.world_size)
        for url in self.shards.urls[consumer::consumers]:
            for sample in self.shards.samples(url):
                image, label, key = self.shards.decode(sample)
                yield {"image": self.prepare(image), "label": label, "id": key}


class ShardStream(IterableDataset[dict[str, Any]]):
    """Images of shards without end, shuffled, for training.

    Shards are dealt out to all workers of all processes, pass after pass in a new order, so that each is read once in a
    pass; each worker then mixes the images of its shards in a buffer. The order depends on (seed, step, process and
    worker): a run that goes on at ``step`` starts a stream of its own there.

    Args:
        shards: The shards.
        prepare: RGB image and a generator (for flips) to tensor.
        rank: This process.
        world_size: Number of processes.
        seed: Key of the order.
        step: Optimizer step at which the stream begins.
        buffer: Images to mix; undecoded, about 110 kB each for ImageNet.
        skip_bad: Share of damaged shards and images that is skipped, with a warning; above it, an error.

    Raises:
        ValueError: while reading, if more than that is damaged.
    """

    def __init__(
        self,
        shards: Shards,
        prepare: Callable[[Image.Image, np.random.Generator], Any],
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        step: int = 0,
        buffer: int = 2000,
        skip_bad: float = 0.0,
    ) -> None:
        self.shards, self.prepare, self.rank, self.world_size = shards, prepare, rank, world_size
        self.seed, self.step, self.buffer, self.skip_bad = seed, step, buffer, skip_bad

    def __iter__(self) -> Iterator[dict[str, Any]]:
        consumer, consumers = _consumer(self.rank, self.world_size)
        rng = np.random.default_rng([self.seed, self.step, consumer])
        tally = _Tally(self.skip_bad, len(self.shards.urls))
        waiting: list[dict[str, Any]] = []
        for sample in self._samples(consumer, consumers, tally):
            waiting.append(sample)
            if len(waiting) <= self.buffer:
                continue
            chosen = int(rng.integers(len(waiting)))
            waiting[chosen], waiting[-1] = waiting[-1], waiting[chosen]
            try:
                image, label, key = self.shards.decode(waiting.pop())
            except ValueError as error:
                tally.bad_image(error)
                continue
            tally.images += 1
            yield {"image": self.prepare(image, rng), "label": label, "id": key}

    def _samples(self, consumer: int, consumers: int, tally: _Tally) -> Iterator[dict[str, Any]]:
        urls, turn = self.shards.urls, consumer
        order, number = np.arange(0), -1
        while True:
            if turn // len(urls) != number:
                number = turn // len(urls)
                order = np.random.default_rng([self.seed, self.step, number]).permutation(len(urls))
            try:
                yield from self.shards.samples(urls[order[turn % len(urls)]])
            except ValueError as error:
                tally.bad_shard(urls[order[turn % len(urls)]], error)
            turn += consumers


class _Tally:
    """Counts what is damaged, and stops when it is too much."""

    def __init__(self, tolerated: float, shards: int) -> None:
        self.tolerated, self.shards, self.images = tolerated, shards, 0
        self.bad_shards: set[str] = set()
        self.bad_images = 0

    def bad_shard(self, url: str, error: ValueError) -> None:
        self.bad_shards.add(url)
        if len(self.bad_shards) > self.tolerated * self.shards:
            raise self._too_much(error, f"{len(self.bad_shards)} of {self.shards} shards")
        print(f"warning: {error}; the rest of it is skipped", file=sys.stderr)

    def bad_image(self, error: ValueError) -> None:
        self.bad_images += 1
        # The first one must not stop a run that tolerates one in a thousand.
        if self.bad_images > max(self.tolerated * self.images, 1 if self.tolerated else 0):
            raise self._too_much(error, f"{self.bad_images} of {self.images + self.bad_images} images")
        print(f"warning: {error}; skipped", file=sys.stderr)

    def _too_much(self, error: ValueError, found: str) -> ValueError:
        return ValueError(f"{error}; {found} are damaged, expected at most a share of {self.tolerated:g} (skip_bad)")


def _consumer(rank: int, world_size: int) -> tuple[int, int]:
    worker = get_worker_info()
    if worker is None:
        return rank, world_size
    return rank * worker.num_workers + worker.id, world_size * worker.num_workers


# --- packing -------------------------------------------------------------------------------------------------------


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
    if images_per_shard < 1:
        raise UserError(f"images_per_shard: {images_per_shard}, expected at least 1")
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
    temporary = plan.path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        with wds.TarWriter(file) as tar:
            for position, path, label in plan.files:
                name = path.suffix[1:].lower()
                tar.write({"__key__": f"{position:08d}", name: path.read_bytes(), "cls": str(label)})
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, plan.path)
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
        if path.is_file() and json.loads(path.read_text()) != asdict(index):
            raise UserError(f"shards: {str(out)!r} holds other shards, expected an empty folder or the same data")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INDEX).is_file():
        planned.write_text(json.dumps(asdict(index)))
    if processes == 1:
        yield from map(write_shard, plans)
    else:
        with ProcessPoolExecutor(processes) as pool:
            yield from pool.map(write_shard, plans)
    if planned.is_file():
        os.replace(planned, out / INDEX)
