"""Planning: what an evaluation will cost, measured in its place on its first batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from lightning_diffclf.callbacks.sharding import BATCH_LIMITS, batches_within_limit
from lightning_diffclf.classifier import DiffusionClassifier
from lightning_diffclf.classifier.discriminative import Classifier
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results.plan import Measurement, Plan, measure, measure_logits, spends_the_same


class Planner:
    """Lets a Trainer load one batch, measures on it, and says what all of them would cost.

    Args:
        classifier: What would classify.
        candidates: Indices of the candidates in play; all if omitted.
        fitting: Network calls that fitting a probe takes beforehand.
    """

    def __init__(self, classifier: Classifier, candidates: Sequence[int] | None, fitting: int = 0) -> None:
        self.classifier, self.candidates, self.fitting = classifier, candidates, fitting
        self._limits: dict[str, int | float] = {}  # of the Trainer, where they were set to one batch

    def limit_batches(self, trainer: L.Trainer) -> None:
        """Let the Trainer load one batch only; a limit of no batch stays."""
        for name in BATCH_LIMITS.values():
            limit = getattr(trainer, name)
            if limit not in (0, 1) or isinstance(limit, float):
                self._limits[name] = limit
                setattr(trainer, name, 1 if limit else 0)

    def restore_limits(self, trainer: L.Trainer) -> None:
        """Undo :meth:`limit_batches`."""
        for name, limit in self._limits.items():
            setattr(trainer, name, limit)
        self._limits = {}

    def begin(self, trainer: L.Trainer, loader: Any, images: int | None, parts: int) -> None:
        """Find out how much there would be to do.

        Args:
            trainer: Its limits are restored: it has counted its batches.
            loader: The DataLoader.
            images: Images on this rank; None if unknown.
            parts: Only one of so many parts of them would be classified.
        """
        self.restore_limits(trainer)
        self._images, self._parts = images, parts
        self._batches = batches_within_limit(trainer, loader)
        self._measured: Measurement | None = None

    def measure(self, images: Tensor, ids: Sequence[int | str], batch_size: int) -> None:
        """Measure on images, which are some of the first batch."""
        if self._batches is not None:
            most = self._batches * batch_size
            self._images = most if self._images is None else min(most, self._images)
        if self._images is not None:
            self._images = round(self._images / self._parts)
        if isinstance(self.classifier, DiffusionClassifier):
            self._measured = measure(self.classifier, images, ids, self.candidates)
        else:
            self._measured = measure_logits(self.classifier, images)

    def finish(self, trainer: L.Trainer) -> Plan:
        """What all ranks measured, together; call it on all ranks.

        Raises:
            UserError: if none had an image.
        """
        c, m = self.classifier, self._measured
        images = math.nan if self._images is None else self._images
        mine = [0.0] * 7
        if m is not None:
            mine = [images, m.rows_per_second, m.flops_per_row, m.nfe_sum, m.nfe_images, m.search_nfe_sum, m.kept_sum]
        gathered = [mine]
        if trainer.world_size > 1:
            tensor = torch.tensor(mine, dtype=torch.float64, device=trainer.strategy.root_device)
            gathered = trainer.strategy.all_gather(tensor).tolist()
        used = [values for values in gathered if values[1] > 0]  # a rank may have no image
        if not used:
            raise UserError("plan: no image to measure on")
        shared = len(self.candidates or c.candidates), len(c.timesteps_S), c.microbatch
        return Plan(
            ranks=[
                Measurement(*shared, rate, flops, *map(int, sums), one_call=c.terms.logits)
                for _, rate, flops, *sums in used
            ],
            images=[None if math.isnan(images) else int(images) for images, *_ in used],
            rule=repr(c.rule),
            exact=spends_the_same(c),
            proposal=None if c.recipe.proposal is None else repr(c.recipe.proposal),
            fitting=self.fitting,
        )

    @staticmethod
    def show(plan: Plan, file: str | None = None) -> None:
        """Print a plan as a table, and write its numbers to a JSON file."""
        Console(soft_wrap=True).print(plan.to_table())
        if file is not None:
            write_json(plan.numbers(), file, 2, "plan")
