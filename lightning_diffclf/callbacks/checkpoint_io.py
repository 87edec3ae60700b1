"""Checkpoint files that are whole or not there."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from lightning_diffclf.errors import MissingFile
from lightning_diffclf.files import remove_temporaries, replacing
from lightning_diffclf.models.weight_files import read_file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a kill or a full disk leaves the old file intact.

    Lightning writes into the temporary folder of the machine and moves the file from there: a copy, wherever that is
    another file system than that of the checkpoint, as on most clusters. It also holds the whole file in memory first.

    Pass it to the Trainer: ``plugins=[AtomicCheckpointIO()]``. Addresses such as ``s3://…`` are left to Lightning.

    Reading verifies the checksum of every tensor, and never runs code from the file.

    Raises:
        OSError: from ``save_checkpoint``, if the file cannot be written.
        ValueError: from ``load_checkpoint``, if the file is not what was written, or more than weights and numbers.
    """

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """What ``path`` holds, on the CPU; whatever ``weights_only`` says."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        if not Path(path).is_file():
            raise MissingFile(f"checkpoint: no file {str(path)!r}")
        return read_file(Path(path))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``, for which there must be room beside the file of that name."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        remove_temporaries(Path(path).parent, f"{glob.escape(Path(path).name)}.*")  # as large as a checkpoint
        with replacing(path, "checkpoint") as temporary:
            try:
                torch.save(checkpoint, temporary)
            except RuntimeError as error:  # by which torch's writer tells of a full disk
                raise OSError(error) from error
