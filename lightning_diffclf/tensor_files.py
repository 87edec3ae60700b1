"""Files of tensors that say what they belong to, and whether they are still what was written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_bytes
from lightning_diffclf.identity import digest_of, digest_of_tensor


def checksum_of(tensors: Mapping[str, Tensor]) -> str:
    """A short name of tensors and their names."""
    return digest_of(*(part.encode() for name in sorted(tensors) for part in (name, digest_of_tensor(tensors[name]))))


def write_tensors(tensors: Mapping[str, Tensor], path: Path, what: str, **described: str) -> None:
    """Write safetensors, whole or not at all, with a checksum and what else describes them.

    Args:
        tensors: By name.
        path: The file.
        what: What it is, for errors.
        **described: What they belong to.

    Raises:
        FailedWrite: if it cannot be written.
    """
    write_bytes(save(dict(tensors), described | {"checksum": checksum_of(tensors)}), path, what)


def read_tensors(path: Path, what: str, **expected: str) -> dict[str, Tensor]:
    """What :func:`write_tensors` wrote.

    Args:
        path: The file.
        what: What it is, for errors.
        **expected: What they must belong to.

    Raises:
        UserError: if it cannot be read, was changed, or belongs to something else.
    """
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what}: {str(path)!r} cannot be read ({error}); remove it to make it anew") from error
    for name, value in {**expected, "checksum": checksum_of(tensors)}.items():
        if described.get(name) != value:
            raise UserError(
                f"{what}: {str(path)!r} has {name} {described.get(name)}, expected {value}: it was changed or belongs "
                "to something else; remove it to make it anew"
            )
    return tensors
