"""Files of weights, read without running anything from them, and with the checksums that they carry."""

from __future__ import annotations

import os
import re
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import safe_globals

from lightning_diffclf.errors import UserError

ZIP = b"PK\x03\x04"  # how torch.save's files begin

PICKLE = b"\x80"  # and those before version 1.6


def read_file(path: Path) -> dict[str, Any]:
    """What a file of torch or safetensors holds, on the CPU; no code from it is run.

    Files of ``torch.save`` carry a checksum of each tensor, which is verified. Safetensors and torch's files before
    version 1.6 carry none.

    Raises:
        ValueError: if it cannot be read, is not what was written, or holds no mapping; of a checkpoint among others, it
            names the newest that is whole.
    """
    try:
        return _read(path)
    except UserError as error:
        raise UserError(f"{error}{_advice(path)}") from error


def _advice(path: Path) -> str:
    """What may be taken in place of a checkpoint that cannot be read."""
    others = [one for one in path.parent.glob("*.ckpt") if one != path] if path.suffix == ".ckpt" else []
    for one in sorted(others, key=os.path.getmtime, reverse=True):
        with suppress(UserError, OSError):
            _read(one)
            return f"; the newest beside it that is whole is {str(one)!r}: --ckpt_path takes it, of evaluate --ckpt"
    return f"; none of the {len(others)} others beside it is whole" if others else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = check_whole(path)
        with open(path, "rb") as file:
            if not zipped and file.read(1) != PICKLE:
                raise UserError("it is no file of torch.save")
        with safe_globals([Namespace]):  # the published training scripts save their arguments too
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        _check_tensors(found)
    except Exception as error:  # of a damaged file torch raises what comes: RuntimeError, IndexError, …
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
        if isinstance(error, UserError):
            reason = str(error)
        elif isinstance(error, UnpicklingError):  # of which torch says in many lines that the code could be run
            code = re.search(r"GLOBAL (\S+)", str(error))
            reason = f"it holds {code[1]}, expected weights only" if code else "it is damaged or of another kind"
        raise UserError(f"checkpoint: {str(path)!r} cannot be read ({reason})") from error
    if not isinstance(found, dict):
        raise UserError(f"checkpoint: {str(path)!r} holds a {type(found).__name__}, expected weights by name")
    return found


def check_whole(path: str | Path) -> bool:
    """Verify the checksums of a file of ``torch.save``; returns whether it has any.

    Raises:
        ValueError: if a part is not what was written, or the file claims to hold more than its size.
        OSError: if it cannot be read.
    """
    state = os.stat(path)
    return _is_whole(str(path), state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=16)  # an evaluation opens its checkpoint several times
def _is_whole(path: str, inode: int, size: int, changed: int) -> bool:
    with open(path, "rb") as file:
        zipped = file.read(4) == ZIP
    if not zipped and not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            packed = [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]
            if packed or sum(part.file_size for part in parts) > size:
                raise UserError("its parts are compressed or larger than the file, which torch.save never writes")
            wrong = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"it is damaged: {error}") from error
    if wrong is not None:
        raise UserError(f"it is damaged: {wrong} does not have its checksum")
    return True


def _check_tensors(found: Any) -> None:
    """A tensor may claim more values than there are, all of them one: it would fill the memory when it is copied."""
    left: list[Any] = [found]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if isinstance(one, Tensor):
            if one.layout != torch.strided or one.device.type != "cpu" or one.is_quantized:
                raise UserError("it holds a tensor that is not dense")
            if one.numel() * one.element_size() > one.untyped_storage().nbytes():
                raise UserError(f"it holds a tensor of {one.numel():,} values, but not as many values")
        elif isinstance(one, (Mapping, list, tuple)) and id(one) not in seen:
            seen.add(id(one))
            left += one.values() if isinstance(one, Mapping) else one
