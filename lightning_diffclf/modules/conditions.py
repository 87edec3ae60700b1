"""Which of a class-conditional network's classes it is asked about."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_diffclf.candidates import NONE_OF_THESE, Candidates
from lightning_diffclf.data.protocols import HasClassNames, HasNetworkClasses, HasNumClasses
from lightning_diffclf.errors import UserError


class Conditions(NamedTuple):
    """What a network is asked about.

    Attributes:
        candidates: One for each condition.
        rows: The network's class for each candidate (K,); None if they are the same.
    """

    candidates: Candidates
    rows: Tensor | None = None


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


def check_labels(data: object, num_classes: int, class_names: Sequence[str] | None) -> None:
    """Raise ValueError where the names of a data module's classes say that its labels are not those of a network.

    Args:
        data: A data module. One that says in ``network_classes`` which of the network's classes its own are is right.
        num_classes: Classes of the network.
        class_names: Their names, if known.
    """
    names = list(data.class_names or []) if isinstance(data, HasClassNames) else []
    groups = data.network_classes if isinstance(data, HasNetworkClasses) else None
    if not names or (groups is not None and len(groups) != num_classes):
        return
    if len(names) != num_classes:
        raise UserError(
            f"num_classes: {num_classes}, but the data have {len(names)} classes, {names[0]!r} to {names[-1]!r}; "
            "expected a network trained on all of them, and on no others"
        )
    place_of = {name: c for c, name in enumerate(class_names or [])}
    if list(place_of) == list(map(str, range(num_classes))):  # what classes without a name are called
        return
    for c, name in enumerate(names):
        if place_of.get(name, c) != c:
            raise UserError(
                f"data: {name!r} is class {c}, but class {place_of[name]} of the network; expected the classes in the "
                "order in which it was trained on them"
            )


class AsksAboutClasses:
    """For modules of a network with classes: what it is asked about, by the data module if there is one."""

    _trainer: Any
    _conditions: tuple[Callable[[], Any], Conditions] | None = None  # of one data module

    def own_classes(self) -> tuple[int, Sequence[str] | None, bool]:
        """Number of the network's classes, their names if known, and whether the null label is a candidate."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return state | {"_conditions": None}  # found anew: they know a data module

    def asked(self, device: torch.device | None = None) -> Conditions:
        """What the network is asked about, with ``rows`` on the device."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if self._conditions is None or self._conditions[0]() is not data:
            count, names, null = self.own_classes()
            found = conditions(count, names, data, null)
            # Weakly: EMA copies all attributes of the module, and a data module knows the Trainer.
            self._conditions = (lambda: None) if data is None else weakref.ref(data), found
        whose, found = self._conditions
        if found.rows is not None and device is not None and found.rows.device != device:
            found = found._replace(rows=found.rows.to(device))  # once: not in every call
            self._conditions = whose, found
        return found

    @property
    def candidates(self) -> Candidates:
        """One for each class; where the data have fewer classes than the network, those that make them up."""
        return self.asked().candidates

    def labels_of(self, candidate: Tensor) -> Tensor:
        """The network's class of each candidate (N,)."""
        rows = self.asked(candidate.device).rows
        return candidate if rows is None else rows[candidate]


def chosen_classes(text: str, names: Sequence[str], what: str = "classes") -> list[int]:
    """Numbers of classes that are given by name or number, with commas between them, or ``all``; each once.

    Raises:
        ValueError: if one is unknown, or there is none; ``what`` is what they were given for.
    """
    if text == "all":
        return list(range(len(names)))
    number_of = {str(c): c for c in range(len(names))} | {name: c for c, name in reversed(list(enumerate(names)))}
    words = [word.strip() for word in text.split(",") if word.strip()]
    unknown = [word for word in words if word not in number_of]
    if unknown or not words:
        raise UserError(f"{what}: {unknown or text!r}, expected names or numbers 0 … {len(names) - 1}, or all")
    return list(dict.fromkeys(number_of[word] for word in words))
