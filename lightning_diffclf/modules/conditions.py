"""Which of a class-conditional network's classes it is asked about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_diffclf.data.protocols import HasClassNames, HasNetworkClasses, HasNumClasses
from lightning_diffclf.denoiser import Candidates
from lightning_diffclf.errors import UserError


class Conditions(NamedTuple):
    """What a network is asked about.

    Attributes:
        candidates: One for each condition.
        rows: The network's class for each candidate (K,); None if they are the same.
    """

    candidates: Candidates
    rows: Tensor | None = None


NONE_OF_THESE = "none of these"  # the null label, as a candidate


def conditions(
    num_classes: int, class_names: Sequence[str] | None, data: object = None, null: bool = False
) -> Conditions:
    """What to ask a network with ``num_classes`` about some data.

    Args:
        num_classes: Classes of the network.
        class_names: Their names, if known.
        data: A data module. One with fewer classes than the network may say in ``network_classes`` which of the
            network's make up each of its own (ImageNet-A: one of 1,000; ObjectNet: one or several).
        null: Whether the network's null label, which comes after its classes, is a candidate as well, of a class of its
            own.

    Raises:
        ValueError: if a class of the data is none of the network's.
    """
    names = list(data.class_names or []) if isinstance(data, HasClassNames) else []
    groups = data.network_classes if isinstance(data, HasNetworkClasses) else None
    if groups is None or len(groups) == num_classes:
        names = list(class_names or (names if len(names) == num_classes else map(str, range(num_classes))))
        return Conditions(Candidates([*names, NONE_OF_THESE] if null else names))
    pairs = [(c, row) for c, group in enumerate(groups) for row in group]
    highest = max(row for _, row in pairs)
    if highest >= num_classes:
        raise UserError(f"data: classes up to {highest} of the network, but it has {num_classes}")
    own = [names[c] if len(groups[c]) == 1 else f"{names[c]} ({row})" for c, row in pairs]
    if null:
        own, pairs, names = [*own, NONE_OF_THESE], [*pairs, (len(groups), num_classes)], [*names, NONE_OF_THESE]
    return Conditions(Candidates(own, [c for c, _ in pairs], names), torch.tensor([row for _, row in pairs]))


def check_trains_all(data: object, num_classes: int) -> None:
    """Raise ValueError unless a data module, as far as it says, has all of a network's classes to train on."""
    if isinstance(data, HasNumClasses) and data.num_classes not in (None, num_classes):
        raise UserError(f"num_classes: {num_classes}, but the training data have {data.num_classes} classes")
    groups = data.network_classes if isinstance(data, HasNetworkClasses) else None
    if groups is not None and len(groups) != num_classes:
        raise UserError(f"data: {len(groups)} classes to validate on, expected {num_classes} as in training")
