"""Tar shards of labelled images: read for training without end, and for evaluation.

A shard is a tar file in webdataset's layout: for each image a member ``KEY.jpg`` (or another format) and ``KEY.cls``
with its class as a number. ``diffclf shards`` writes an ``index.json`` beside them, which says how many images each
shard has; shards of others need none.
"""

from __future__ import annotations

import io
import lzma
import re
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from lightning_diffclf.data.images import SUFFIXES, decode_image
from lightning_diffclf.data.tar import read_samples
from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.files import is_count, read_checked_json

INDEX = "index.json"

MAX_SHARDS = 1_000_000

PLAIN_NAME = re.compile(r"[^/\\:|{}\x00-\x1f\x7f]*[^/\\:|{}\x00-\x1f\x7f.][^/\\:|{}\x00-\x1f\x7f]*")


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
            ValueError: if it cannot be read, or says something else than names of files in this folder and numbers.
        """
        path = folder / INDEX
        if not path.is_file():
            return None
        try:
            index = cls(**read_checked_json(path, "shards"))
        except TypeError as error:
            raise UserError(f"shards: {str(path)!r} cannot be read ({error})") from error
        index._check(path)
        return index

    def _check(self, path: Path) -> None:
        """An index comes with the shards, so it may name files beside it, and nothing that would open anything else."""
        groups = [] if self.network_classes is None else self.network_classes
        right = {
            "counts": isinstance(self.counts, dict) and all(map(is_count, self.counts.values())),
            "classes": isinstance(self.classes, list) and all(isinstance(name, str) for name in self.classes),
            "network_classes": isinstance(groups, list)
            and all(isinstance(group, list) and all(map(is_count, group)) for group in groups),
            "positions": isinstance(self.positions, bool),
            "seed": self.seed is None or isinstance(self.seed, int),
        }
        for name, fits in right.items():
            if not fits:
                found = repr(getattr(self, name))[:200]
                raise UserError(f"shards: {str(path)!r} says {name}: {found}, expected what `diffclf shards` writes")
        for name in self.counts:
            if not PLAIN_NAME.fullmatch(name):
                raise UserError(
                    f"shards: {str(path)!r} names a shard {name!r}, expected the plain name of a file in its folder"
                )


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
        ValueError: if the pattern is none, or the index says something else than files of its folder and numbers.
    """

    def __init__(self, pattern: str, skip_bad: float = 0.0) -> None:
        folder = Path(pattern)
        self.root = pattern
        if folder.is_dir():
            self.index = ShardIndex.read(folder)
            names = sorted(path.name for path in folder.glob("*.tar")) if self.index is None else self.index.counts
            urls = [f"{pattern or '.'}/{name}" for name in names]  # with a slash, no name is taken for an address
            surplus = sorted({path.name for path in folder.glob("*.tar")} - set(names))
            if surplus:
                print(
                    f"warning: {len(surplus)} shards in {pattern!r} are left out, as {INDEX} does not name them, such "
                    f"as {surplus[0]}",
                    file=sys.stderr,
                )
        else:
            urls = expand(pattern)
            self.index = None if is_remote(urls[0]) else ShardIndex.read(Path(urls[0]).parent)
        missing = [url for url in urls if not is_remote(url) and not Path(url).is_file()]
        if not urls or len(missing) > skip_bad * len(urls):
            what = f"{missing[0]!r} ({len(missing)} of {len(urls)} are missing)" if missing else f"in {pattern!r}"
            raise MissingFile(f"data: no shard {what}")
        if missing:
            print(f"warning: {len(missing)} of {len(urls)} shards are missing, such as {missing[0]}", file=sys.stderr)
        absent = set(missing)
        self.urls = [url for url in urls if url not in absent]
        self._names = distinct_names(urls)

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
            with open_shard(url) as file:
                for sample in read_samples(file):
                    seen += 1
                    yield sample | {"__url__": url}
        except UserError as error:
            raise UserError(f"data: shard {url!r}: {error}") from error
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise UserError(f"data: shard {url!r} is damaged after {seen} images ({error})") from error
        if seen == 0 and self.count(url) is None:  # a file that was allocated and never written is a tar of nothing
            raise UserError(f"data: shard {url!r} has no images")
        if seen != self.count(url) and self.count(url) is not None:
            raise UserError(f"data: shard {url!r} has {seen} images, expected {self.count(url)} as {INDEX} says")

    def decode(self, sample: dict[str, Any]) -> tuple[Image.Image, int, int | str]:
        """RGB image, label and id of a sample.

        The id is the position in the data set that was packed, where the index says that keys are positions. Otherwise
        it is the shard's name and the key, as in ``shard-000001/00000042``: many data sets count anew in each shard.

        Raises:
            ValueError: if it has no image or label, or they cannot be read.
        """
        name = f"{sample['__key__']} in {sample.get('__url__')}"
        suffix = next((key for key in sample if f".{key.lower()}" in SUFFIXES), None)
        if suffix is None or "cls" not in sample:
            members = sorted(key for key in sample if not key.startswith("__"))
            raise UserError(f"data: sample {name} has {members}, expected an image (jpg, png, …) and cls")
        text = sample["cls"].strip()
        if not text.isdigit() or len(text) > 9:
            raise UserError(f"data: sample {name} has the class {text[:40]!r}, expected a number")
        label, image = int(text), decode_image(io.BytesIO(sample[suffix]), f"data: sample {name}")
        key = sample["__key__"]
        if self.index is None or not self.index.positions:
            return image, label, f"{self._names[sample['__url__']]}/{key}"
        if not key.isdecimal():
            raise UserError(f"data: sample {name}, expected a number as key: {INDEX} says that keys are positions")
        return image, label, int(key)


def expand(pattern: str) -> list[str]:
    """What a pattern of webdataset stands for.

    Raises:
        ValueError: if it is none, or stands for more than a million.
    """
    count = 1
    for inner in re.findall(r"\{([^{}]*)\}", pattern):
        ends = re.fullmatch(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\..*)?", inner)
        count *= abs(int(ends[2]) - int(ends[1])) + 1 if ends else inner.count(",") + 1
    if count > MAX_SHARDS:
        raise UserError(f"data: {pattern!r} stands for {count:,} shards, expected at most {MAX_SHARDS:,}")
    try:
        return list(wds.shardlists.expand_urls(pattern))
    except (ValueError, AssertionError) as error:  # unbalanced braces; no such variable
        raise UserError(f"data: {pattern!r} is no pattern of shards ({error})") from error


def distinct_names(urls: Sequence[str]) -> dict[str, str]:
    """A short name of each shard: its file's, and as much of the folders before it as tells shards apart."""
    for parts in range(1, 1 + max((url.count("/") + 1 for url in urls), default=1)):
        names = {url: "/".join(url.split("/")[-parts:]).removesuffix(".tar") for url in urls}
        if len(set(names.values())) == len(names):
            break
    return names


def open_shard(url: str) -> IO[bytes]:
    """A shard to read from its beginning."""
    # Not gopen for files: it would run what stands in the name of one.
    return wds.gopen.gopen(url, "rb") if is_remote(url) else open(url, "rb")


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
        positions: set[int | str] = set()  # other ids have the shard's name in them
        for url in self.shards.urls[consumer::consumers]:
            for sample in self.shards.samples(url):
                image, label, key = self.shards.decode(sample)
                if key in positions:
                    raise UserError(f"data: sample {sample['__key__']} in {url} has the id {key} of another image")
                if isinstance(key, int):
                    positions.add(key)
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
        tally = Tally(self.skip_bad, len(self.shards.urls))
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

    def _samples(self, consumer: int, consumers: int, tally: Tally) -> Iterator[dict[str, Any]]:
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


class Tally:
    """Counts what is damaged, and stops when it is too much.

    Args:
        tolerated: Share that is skipped with a warning, in [0, 1).
        shards: Number of shards, of which as large a share may be damaged.

    Attributes:
        images: Images that could be read.
    """

    def __init__(self, tolerated: float, shards: int = 0) -> None:
        self.tolerated, self.shards, self.images = tolerated, shards, 0
        self.bad_shards: set[str] = set()
        self.bad_images = 0

    def bad_shard(self, url: str, error: ValueError) -> None:
        """Count a damaged shard.

        Raises:
            ValueError: if that is one too many.
        """
        self.bad_shards.add(url)
        if len(self.bad_shards) > self.tolerated * self.shards:
            raise self._too_much(error, f"{len(self.bad_shards)} of {self.shards} shards")
        print(f"warning: {error}; the rest of it is skipped", file=sys.stderr)

    def bad_image(self, error: ValueError) -> None:
        """Count a damaged image.

        Raises:
            ValueError: if that is one too many.
        """
        self.bad_images += 1
        # The first one must not stop a run that tolerates one in a thousand.
        if self.bad_images > max(self.tolerated * self.images, 1 if self.tolerated else 0):
            raise self._too_much(error, f"{self.bad_images} of {self.images + self.bad_images} images")
        print(f"warning: {error}; skipped", file=sys.stderr)

    def _too_much(self, error: ValueError, found: str) -> ValueError:
        return UserError(f"{error}; {found} are damaged, expected at most a share of {self.tolerated:g} (skip_bad)")


def _consumer(rank: int, world_size: int) -> tuple[int, int]:
    worker = get_worker_info()
    if worker is None:
        return rank, world_size
    return rank * worker.num_workers + worker.id, world_size * worker.num_workers
