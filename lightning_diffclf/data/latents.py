"""Latents of a data set, made once: the autoencoder's posterior of every image and of its mirror image, in one file.

::

    index.json       what they were made of and with; ``complete`` once all are there and checked
    moments.npy      (N, 2, 2C, h, w) float16: of image and mirror image, means and then standard deviations
    labels.npy       (N, 2) int64: class and id
    chunks/*.json    count and CRC-32 of each finished chunk, from which an interrupted run resumes

Ids are those of the images that were encoded, so that latents get the noise that the images would. 42 GB for ImageNet
at 256 x 256.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.files import (
    is_count,
    is_number,
    read_checked_json,
    read_json,
    write_checked_json,
    write_json,
)

INDEX = "index.json"
KIND = "diffclf latents 1"


@dataclass(frozen=True)
class LatentsIndex:
    """What latents were made of and with.

    Attributes:
        source: What was encoded.
        chunk_ends: Position after the last image of each chunk; the last one is the number of images N.
        shape: (C, h, w) of a latent.
        size: Side of the images in pixels.
        vae: Name of the autoencoder.
        fingerprint: Short name of its weights.
        scaling: Networks see ``(latent - shift) * scaling``.
        shift: See ``scaling``.
        classes: Name of each class.
        network_classes: Which of ImageNet's 1,000 classes each class is, or None.
        complete: Whether all are there and checked.
        kind: Version of this format.
    """

    source: str
    chunk_ends: list[int]
    shape: tuple[int, int, int]
    size: int
    vae: str
    fingerprint: str
    scaling: float
    shift: float
    classes: list[str]
    network_classes: list[list[int]] | None = None
    complete: bool = False
    kind: str = KIND

    @property
    def count(self) -> int:
        """Number of images N."""
        return self.chunk_ends[-1]

    @classmethod
    def read(cls, folder: Path) -> LatentsIndex:
        """That of a folder.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be read.
        """
        path = folder / INDEX
        if not path.is_file():
            raise MissingFile(f"latents: no {INDEX} in {str(folder)!r}")
        values = read_checked_json(path, "latents")
        try:
            if values.get("kind") != KIND:
                raise UserError(f"kind {values.get('kind')!r}, expected {KIND!r}")
            index = cls(**values | {"shape": tuple(values["shape"])})
            index._check()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"latents: {str(path)!r} cannot be read ({error})") from error
        return index

    def _check(self) -> None:
        ends, groups = self.chunk_ends, self.network_classes or []
        right = {
            "chunk_ends": isinstance(ends, list)
            and len(ends) > 0
            and all(map(is_count, ends))
            and all(a < b for a, b in itertools.pairwise([0, *ends])),
            "shape": len(self.shape) == 3 and all(is_count(side) and side > 0 for side in self.shape),
            "size": is_count(self.size) and self.size > 0,
            "scaling": is_number(self.scaling) and self.scaling != 0,
            "shift": is_number(self.shift),
            "classes": isinstance(self.classes, list) and all(isinstance(name, str) for name in self.classes),
            "network_classes": isinstance(groups, list)
            and all(isinstance(group, list) and all(map(is_count, group)) for group in groups),
            "complete": isinstance(self.complete, bool),
        } | {name: isinstance(getattr(self, name), str) for name in ("source", "vae", "fingerprint")}
        for name, fits in right.items():
            if not fits:
                raise UserError(f"{name}: {repr(getattr(self, name))[:200]}, expected what `diffclf encode` writes")

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        write_checked_json(asdict(self), folder / INDEX, "latents")


def is_latents(folder: Path) -> bool:
    """Whether a folder holds latents, complete or not."""
    path = folder / INDEX
    return path.is_file() and KIND.encode() in path.read_bytes()[-2000:]


class LatentsWriter:
    """Fills the folder of latents, chunk by chunk, from any number of processes.

    Args:
        folder: Where to write; made by :meth:`create` on one process, then opened on all.

    Attributes:
        index: What is being written.
        chunks: First and last position + 1 of each chunk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, LatentsIndex.read(folder)
        self.chunks = list(itertools.pairwise([0, *self.index.chunk_ends]))
        self._moments = np.lib.format.open_memmap(folder / "moments.npy", mode="r+")
        self._labels = np.lib.format.open_memmap(folder / "labels.npy", mode="r+")

    @staticmethod
    def create(folder: Path, index: LatentsIndex) -> None:
        """Make the files, or check that those in the folder are of the same latents, finished or not.

        Raises:
            ValueError: if the folder holds others.
            OSError: if it cannot be written, or there is no room.
        """
        if (folder / INDEX).is_file():
            there, here = asdict(LatentsIndex.read(folder)), asdict(index)
            names = [name for name in here if name != "complete" and there[name] != here[name]]
            different = [f"{name}: {there[name]!r} there, {here[name]!r} here" for name in names]
            if different:
                raise UserError(f"latents: {str(folder)!r} holds others ({'; '.join(different)}); give another folder")
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"latents: {str(folder)!r} is not empty, expected a new folder or one of latents")
        (folder / "chunks").mkdir(parents=True, exist_ok=True)
        c, h, w = index.shape
        files: tuple[tuple[str, tuple[int, ...], str], ...] = (
            ("moments", (index.count, 2, 2 * c, h, w), "<f2"),
            ("labels", (index.count, 2), "<i8"),
        )
        for name, shape, dtype in files:
            path = folder / f"{name}.npy"
            np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
            with open(path, "rb+") as opened:  # take the room now: a full disk must not show after a day
                os.posix_fallocate(opened.fileno(), 0, path.stat().st_size)
        index.write(folder)

    def is_done(self, chunk: int) -> bool:
        """Whether a chunk was written."""
        return self._receipt(chunk).is_file()

    def _receipt(self, chunk: int) -> Path:
        return self.folder / "chunks" / f"{chunk:06d}.json"

    def write(self, chunk: int, moments: np.ndarray, labels: np.ndarray) -> None:
        """Write a chunk: moments (n, 2, 2C, h, w) and labels (n, 2), which are class and id.

        Raises:
            ValueError: if there are more or fewer than the chunk has, or values that float16 has not.
        """
        begin, end = self.chunks[chunk]
        if moments.shape != (end - begin, *self._moments.shape[1:]):
            expected = (end - begin, *self._moments.shape[1:])
            raise UserError(f"latents: chunk {chunk} is {moments.shape}, expected {expected}")
        half = moments.astype("<f2")
        if not np.isfinite(half).all():
            raise UserError(f"latents: chunk {chunk} has values that are not finite in float16")
        self._moments[begin:end], self._labels[begin:end] = half, labels
        self._moments.flush()
        self._labels.flush()
        write_json({"count": end - begin, "crc32": self._checksum(begin, end)}, self._receipt(chunk))

    def _checksum(self, begin: int, end: int) -> int:
        return zlib.crc32(self._moments[begin:end].data, zlib.crc32(self._labels[begin:end].data))

    def verify(self) -> Iterator[int]:
        """Read everything back, yielding each chunk that is right; at the end the latents are complete.

        Raises:
            ValueError: if a chunk is missing or not what was written. A wrong one is forgotten, so that encoding again
                writes it anew.
        """
        wrong = []
        for chunk, (begin, end) in enumerate(self.chunks):
            receipt = self._receipt(chunk)
            expected = read_json(receipt, "latents") if receipt.is_file() else None
            if expected == {"count": end - begin, "crc32": self._checksum(begin, end)}:
                yield chunk
            else:
                wrong.append(chunk)
                receipt.unlink(missing_ok=True)
        if wrong:
            raise UserError(
                f"latents: {len(wrong)} of {len(self.chunks)} chunks in {str(self.folder)!r} are missing or damaged, "
                f"such as images {self.chunks[wrong[0]][0]} … {self.chunks[wrong[0]][1] - 1}; encode again"
            )
        LatentsIndex(**asdict(self.index) | {"complete": True}).write(self.folder)


class Latents(Dataset[dict[str, Tensor]]):
    """Latents as networks see them: the posterior's mean for evaluation, samples of it for training.

    Args:
        folder: What ``diffclf encode`` wrote.

    Attributes:
        index: What they were made of and with.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if they are not complete, or files do not have the sizes that they should have.
    """

    def __init__(self, folder: str) -> None:
        self.root, self.index = folder, LatentsIndex.read(Path(folder))
        if not self.index.complete:
            raise UserError(f"latents: {folder!r} is not complete; finish it with `diffclf encode`")
        self._open()

    def _open(self) -> None:
        try:
            self._moments = np.load(Path(self.root) / "moments.npy", mmap_mode="r")
            self._labels = np.load(Path(self.root) / "labels.npy", mmap_mode="r")
            found = self._moments.shape, self._labels.shape
        except Exception as error:  # numpy reads headers as Python does: SyntaxError, TokenError, …
            raise UserError(f"latents: {self.root!r} is damaged ({str(error)[:200]})") from error
        (c, h, w), count = self.index.shape, self.index.count
        expected = ((count, 2, 2 * c, h, w), (count, 2))
        if found != expected:
            raise UserError(f"latents: files of shapes {found} in {self.root!r}, expected {expected}")

    def identity(self) -> dict[str, Any]:
        """What they were made of and with, and the classes and ids of the images; not their values."""
        return {"index": self.index, "labels": np.asarray(self._labels)}

    def __getstate__(self) -> dict[str, Any]:  # worker processes open the files, they are not sent them
        return {"root": self.root, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def check(self, shape: tuple[int, ...], vae: str | None) -> None:
        """Raise ValueError unless a network can work on these.

        Args:
            shape: What it takes (C, h, w).
            vae: Its autoencoder; None if it has none.
        """
        if self.index.shape != shape:
            raise UserError(f"latents: {self.root!r} has {self.index.shape}, the network takes {shape}")
        if vae not in (None, self.index.vae):
            raise UserError(f"latents: {self.root!r} was made with {self.index.vae!r}, expected {vae!r} (model.vae)")

    def __len__(self) -> int:
        return self.index.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: part[0] for name, part in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        c = self.index.shape[0]
        return self._batch(self._moments[indices, 0, :c].astype(np.float32), indices)

    def sample(self, indices: Sequence[int], keys: Sequence[tuple[int, int]], flip: bool = True) -> dict[str, Tensor]:
        """Draw from the posterior of images or, every other time, of their mirror images.

        Args:
            indices: Which images (B,).
            keys: What each draw depends on: two numbers.
            flip: Whether to use mirror images.

        Returns:
            ``image`` (B, C, h, w) float32 as networks see it, ``label`` and ``id`` (B,) int64.
        """
        c, (_, h, w) = self.index.shape[0], self.index.shape
        noise, flips = np.empty((len(indices), c, h, w), dtype=np.float32), np.zeros(len(indices), dtype=np.int64)
        for row, key in enumerate(keys):
            rng = np.random.Generator(np.random.SFC64(key))
            flips[row] = rng.integers(2) if flip else 0
            rng.standard_normal(dtype=np.float32, out=noise[row])
        moments = self._moments[indices, flips].astype(np.float32)
        return self._batch(moments[:, :c] + moments[:, c:] * noise, indices)

    def _batch(self, latents: np.ndarray, indices: Sequence[int]) -> dict[str, Tensor]:
        seen = (latents - self.index.shift) * np.float32(self.index.scaling)
        labels = torch.from_numpy(self._labels[indices].astype(np.int64))
        return {"image": torch.from_numpy(seen), "label": labels[:, 0], "id": labels[:, 1]}
