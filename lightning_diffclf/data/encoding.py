"""Images to latents: reading them, and filling a folder of latents chunk by chunk on any number of processes."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_diffclf.data.images import published_crop, stacked, to_tensor
from lightning_diffclf.data.latents import LatentsWriter
from lightning_diffclf.data.public_sets import FolderImages
from lightning_diffclf.data.shards import Shards
from lightning_diffclf.errors import UserError

CHUNK = 1024  # images of a folder that are finished together: what a stop may cost

Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W) in [-1, 1] to mean and standard deviation of their posterior, (B, C, h, w) each."""


def chunk_ends(source: FolderImages | Shards) -> list[int]:
    """Where chunks end: one for each shard, or for some images of a folder. Shards without index are counted.

    Raises:
        ValueError: if there are no images, or a shard is damaged.
    """
    if isinstance(source, FolderImages):
        ends = [min(end + CHUNK, len(source)) for end in range(0, len(source), CHUNK)]
    else:
        known = [source.count(url) for url in source.urls]
        counts = [
            sum(1 for _ in source.samples(url)) if count is None else count
            for url, count in zip(source.urls, known, strict=True)
        ]
        if 0 in counts:
            raise UserError(f"data: no images in shard {source.urls[counts.index(0)]!r}")
        ends = np.cumsum(counts).tolist()
    if not ends:
        raise UserError(f"data: no images in {source.root!r}")
    return ends


def encode(
    source: FolderImages | Shards,
    writer: LatentsWriter,
    moments: Moments,
    device: torch.device,
    batch_size: int = 32,
    num_workers: int = 2,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Encode the chunks of one process that are not there yet; yields the number of images in each, once it is written.

    Args:
        source: The images.
        writer: Where latents go.
        moments: The autoencoder.
        device: Where it is.
        batch_size: Images that are encoded at once, and as many mirror images.
        num_workers: Processes that read images.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: if an image or a shard cannot be read, or latents are not finite.
    """
    todo = [chunk for chunk in range(rank, len(writer.chunks), world_size) if not writer.is_done(chunk)]
    if not todo:
        return
    size, ends = writer.index.size, writer.index.chunk_ends
    loader: DataLoader[Any]
    if isinstance(source, FolderImages):
        batches = [
            list(range(a, min(a + batch_size, end)))
            for begin, end in (writer.chunks[chunk] for chunk in todo)
            for a in range(begin, end, batch_size)
        ]
        loader = DataLoader(_Folder(source, size), batch_sampler=batches, num_workers=num_workers, collate_fn=stacked)
    else:
        shards = _OfShards(source, [(source.urls[chunk], writer.chunks[chunk][0]) for chunk in todo], size)
        loader = DataLoader(shards, batch_size, num_workers=min(num_workers, len(todo)), collate_fn=stacked)
    waiting: dict[int, list[tuple[int, np.ndarray, tuple[int, int]]]] = {chunk: [] for chunk in todo}
    for batch in loader:
        both = torch.cat([batch["image"], batch["image"].flip(3)]).to(device)
        found = torch.cat([part.float().cpu() for part in moments(both)], dim=1)
        moments_BF = torch.stack(found.chunk(2), dim=1).numpy()  # (B, 2, 2C, h, w): image and mirror image
        labels = batch["label"].tolist()
        for moments_F, label, (place, image_id) in zip(moments_BF, labels, batch["id"], strict=True):
            chunk = bisect.bisect_right(ends, place)
            waiting[chunk].append((place, moments_F, (label, image_id)))
            begin, end = writer.chunks[chunk]
            if len(waiting[chunk]) == end - begin:
                rows = sorted(waiting.pop(chunk), key=lambda row: row[0])
                writer.write(chunk, np.stack([row[1] for row in rows]), np.array([row[2] for row in rows]))
                yield end - begin


class _Folder(Dataset[dict[str, Any]]):
    """Cropped images of a folder; their id is (position, position)."""

    def __init__(self, source: FolderImages, size: int) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.source[index]
        return {"image": to_tensor(published_crop(image, self.size)), "label": label, "id": (index, index)}


class _OfShards(IterableDataset[dict[str, Any]]):
    """Cropped images of some shards, given with the position of their first image; their id is (position, own id)."""

    def __init__(self, source: Shards, urls: list[tuple[str, int]], size: int) -> None:
        self.source, self.urls, self.size = source, urls, size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        mine = self.urls if worker is None else self.urls[worker.id :: worker.num_workers]
        for url, begin in mine:
            for place, sample in enumerate(self.source.samples(url), begin):
                image, label, key = self.source.decode(sample)
                own = key if isinstance(key, int) else place
                yield {"image": to_tensor(published_crop(image, self.size)), "label": label, "id": (place, own)}
