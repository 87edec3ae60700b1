"""The search of an evaluation that learns: from training images of the data module, once, and kept with the run."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_diffclf.callbacks.first_rank import on_first_rank
from lightning_diffclf.callbacks.run_settings import data_module, dataset_identity
from lightning_diffclf.callbacks.run_writer import RunWriter
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.classifier.search import FittedSearch
from lightning_diffclf.data.batch import unpack
from lightning_diffclf.data.protocols import HasTrainingImages
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.errors import UserError
from lightning_diffclf.tensor_files import read_tensors, write_tensors

PROBE = "probe.safetensors"

PLAN_SECONDS = 20.0  # that a plan fits at most


class ProbeFitting:
    """Gives an evaluation a fitted search, such as a probe. Made on all ranks before long work.

    Args:
        probe: What the recipe has; it stays as it is.
        data: The data module.

    Attributes:
        probe: The one to use; not fitted until :meth:`prepare`.

    Raises:
        UserError: if ``data`` has no training images.
    """

    def __init__(self, probe: FittedSearch, data: Any) -> None:
        if not isinstance(data, HasTrainingImages):
            name = "no data module" if data is None else f"{type(data).__name__} has no training_images(count)"
            raise UserError(
                f"proposal: {probe!r} is fitted to training images, but {name}, expected a data module with "
                "them (see HasTrainingImages); or fit it in Python, or take GradientSearch, which needs none"
            )
        self.probe, self._loader = copy.copy(probe), data.training_images(probe.images)

    @classmethod
    def of(cls, recipe: Recipe, trainer: L.Trainer, stage: str) -> tuple[Recipe, ProbeFitting | None]:
        """The recipe of an evaluation, and what fits the probe in it, if there is one that was not fitted yet.

        In validations during ``fit``, all candidates are tried instead: weights change, each would have to fit anew.
        """
        probe = recipe.proposal
        if not isinstance(probe, FittedSearch) or probe.fitted:
            return recipe, None
        if stage == "fit":
            return replace(recipe, proposal=None), None
        fitting = cls(probe, data_module(trainer))
        return replace(recipe, proposal=fitting.probe), fitting

    def calls(self, num_candidates: int) -> int:
        """Network calls that fitting takes, at most."""
        images = self._loader.dataset
        count = min(self.probe.images, len(images)) if hasattr(images, "__len__") else self.probe.images
        return count * self.probe.calls(num_candidates)

    def identity(self) -> dict[str, Any]:
        """Which images it is fitted to, in place of the map that comes of it."""
        return dataset_identity(self._loader.dataset)

    def prepare(
        self, trainer: L.Trainer, denoiser: ConditionalDenoiser, writer: RunWriter | None, briefly: bool
    ) -> None:
        """Fit on rank 0, or read what was fitted before, and give it to all ranks; call it on all of them.

        Args:
            trainer: The Trainer that evaluates.
            denoiser: The network.
            writer: Says which run keeps the map; None if nothing is written.
            briefly: Fit to as many images as there is time for: to find out what decisions will cost.

        Raises:
            UserError: on all ranks, if images have no labels, or the file cannot be read or written.
        """

        def fitted() -> dict[str, Tensor]:
            kept = None if writer is None else read_probe(writer.folder / PROBE, writer.run)
            if kept is not None:
                return kept
            made = self._fit(trainer, denoiser, PLAN_SECONDS if briefly else math.inf)
            if writer is not None:
                write_probe(made, writer.folder / PROBE, writer.run)
            return made

        self.probe.load_state_dict(on_first_rank(trainer, fitted))

    def _fit(self, trainer: L.Trainer, denoiser: ConditionalDenoiser, seconds: float) -> dict[str, Tensor]:
        """What it learns, as it is saved; from what batches there are in so many seconds, but two images at least."""
        most, end, count = self.probe.images, time.perf_counter() + seconds, 0

        def batches() -> Iterator[tuple[Tensor, Any]]:
            nonlocal count
            for batch in self._loader:
                images, labels, *_ = unpack(batch)
                images = trainer.precision_plugin.convert_input(images[: most - count])
                count += len(images)
                yield images.to(trainer.strategy.root_device), None if labels is None else labels[: len(images)]
                if count == most or (count > 1 and time.perf_counter() > end):
                    break

        with trainer.precision_plugin.forward_context():
            self.probe.fit(denoiser, batches())
        calls = self.probe.calls(len(denoiser.candidates))
        each = "a network call" if calls == 1 else f"{calls:,} network calls"
        measured = "" if self.probe.inflation in (None, 1.0) else f"; measured inflation {self.probe.inflation:.2f}"
        print(f"{type(self.probe).__name__}: fitted to {count:,} training images, {each} each{measured}")
        return {name: value.cpu() for name, value in self.probe.state_dict().items()}


def write_probe(state: dict[str, Tensor], path: Path, run: str) -> None:
    """Keep a fitted map with the run that it belongs to.

    Raises:
        FailedWrite: if it cannot be written.
    """
    write_tensors(state, path, "probe", run=run)


def read_probe(path: Path, run: str) -> dict[str, Tensor] | None:
    """What :func:`write_probe` kept; None if there is no file.

    Raises:
        UserError: if it cannot be read, was changed, or belongs to another run.
    """
    if not path.is_file():
        return None
    tensors = read_tensors(path, "probe", run=run)
    weight = tensors.get("weight", torch.empty(0))
    if weight.dtype != torch.float32 or weight.ndim not in (2, 3):  # a map, or one for each value of x0
        raise UserError(
            f"probe: {str(path)!r} holds {weight.dtype} {tuple(weight.shape)}, expected matrices of float32"
        )
    return tensors
