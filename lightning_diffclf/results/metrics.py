"""What is counted during an evaluation: a torchmetrics object, synced over ranks once, when computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric

from lightning_diffclf.errors import UserError
from lightning_diffclf.results.columns import Chunk
from lightning_diffclf.results.summary import Outline, Summary, zeros


def gather(value: Tensor, group: Any = None) -> list[Tensor]:
    """``value`` of each rank, wherever the ranks' backend wants it to be meanwhile."""
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group)
    return values


class ClassifierMetrics(Metric):
    """:class:`~lightning_diffclf.results.summary.Summary` over all ranks.

    The sums stay on the CPU, where decisions are made: so that nothing is copied for them, and because not all
    accelerators have float64.

    Args:
        outline: The evaluation.
    """

    full_state_update = False

    def __init__(self, outline: Outline) -> None:
        super().__init__(dist_sync_fn=gather)
        self.outline = outline
        for name, zero in zeros(outline).items():
            self.add_state(name, torch.from_numpy(zero), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> ClassifierMetrics:
        return self

    def _summary(self) -> Summary:
        return Summary(self.outline, {name: getattr(self, name).numpy() for name in self._defaults})

    def update(self, decisions: Chunk) -> None:
        """Count images."""
        self._summary().update(decisions)

    def compute(self) -> Summary:
        """The summary of the images of all ranks; call it on all ranks.

        Raises:
            ValueError: if there are none.
        """
        summary = self._summary()
        if summary.images == 0:
            raise UserError("evaluation: no image, expected at least one")
        return Summary(self.outline, {name: sums.copy() for name, sums in summary.sums.items()})
