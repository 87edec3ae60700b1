"""Features of images, kept in a folder so that each is computed once, whatever training is interrupted or repeated.

::

    index.json               of which network they are
    <digest>.safetensors     keys (n, 12) uint8 and features (n, C, h, w) float16 of some images, with a checksum

An image is known by a digest of its pixels. So the cache serves any data module, also with mirrored images (each
mirrored one is an image of its own), and cannot give one image what was computed of another. (Latents, in
``data/latents.py``, are of a folder of images and their mirror images, and have a posterior.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_json, write_json
from lightning_diffclf.identity import digest_of, identity_of
from lightning_diffclf.tensor_files import read_tensors, write_tensors

INDEX = "index.json"
KIND = "diffclf features 1"
CHUNK = 1024  # images of a file: what a kill may cost


class FeatureCache:
    """Opens the features in a folder, or begins with none. Several processes may fill a folder at a time.

    Args:
        folder: Where they are.
        network: What they are of, as :func:`~lightning_diffclf.identity.identity_of` takes it.

    Raises:
        ValueError: if the folder holds those of another network, or something else, or a file was changed.
        OSError: if it cannot be written.
    """

    def __init__(self, folder: Path, network: Any) -> None:
        self.folder, here = folder, identity_of(network)
        self._network = digest_of(repr(here).encode())
        self._files: list[Any] = []
        self._places: dict[str, tuple[int, int]] = {}  # of each image: file and row
        self._waiting: dict[str, Tensor] = {}  # that are in no file yet
        if (folder / INDEX).is_file():
            there = read_json(folder / INDEX, "features")
            if there != {"kind": KIND, "network": here}:
                found = there.get("network") if isinstance(there, dict) else None
                other = found if isinstance(found, dict) else {}
                names = sorted(name for name in {**here, **other} if here.get(name) != other.get(name))
                raise UserError(
                    f"features: {str(folder)!r} holds those of another network ({', '.join(names) or 'or no features'} "
                    "differ); give another folder (model.cache), or remove it"
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"features: {str(folder)!r} is not empty, expected a new folder or one of features")
        else:
            write_json({"kind": KIND, "network": here}, folder / INDEX, 2, "features")
        for path in sorted(folder.glob("*.safetensors")):
            self._open(path, read_tensors(path, "features", network=self._network)["keys"])

    def _open(self, path: Path, keys: Tensor) -> None:
        """Make a file's features known; they are read from it when they are asked for."""
        names = [bytes(row).hex() for row in keys.tolist()]
        self._places |= {name: (len(self._files), row) for row, name in enumerate(names)}
        self._files.append(safe_open(path, "pt").get_slice("features"))

    def __len__(self) -> int:
        return len(self._places.keys() | self._waiting.keys())

    def get(self, key: str) -> Tensor | None:
        """The features (C, h, w) of an image, float16; None where they are not known."""
        if key in self._waiting:
            return self._waiting[key]
        if key not in self._places:
            return None
        file, row = self._places[key]
        found: Tensor = self._files[file][row : row + 1][0]
        return found

    def add(self, keys: Sequence[str], features: Tensor) -> None:
        """Keep features (B, C, h, w) of images.

        Raises:
            ValueError: if one is not finite in float16.
            FailedWrite: if they cannot be written.
        """
        half = features.detach().half().cpu()
        if not bool(half.isfinite().all()):
            raise UserError("features: not finite in float16, expected finite ones; name another layer")
        self._waiting |= dict(zip(keys, half, strict=True))
        if len(self._waiting) >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Write what is in no file yet."""
        if not self._waiting:
            return
        names = sorted(self._waiting)
        keys = torch.tensor([list(bytes.fromhex(name)) for name in names], dtype=torch.uint8)
        path = self.folder / f"{digest_of(*(name.encode() for name in names))}.safetensors"
        tensors = {"keys": keys, "features": torch.stack([self._waiting[name] for name in names])}
        write_tensors(tensors, path, "features", network=self._network)
        self._open(path, keys)
        self._waiting = {}
