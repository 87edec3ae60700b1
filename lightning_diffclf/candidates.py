"""What a denoiser can be asked about, by name and class."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_diffclf.errors import UserError, WrongType

MAX_CLASSES = 10_000_000
NONE_OF_THESE = "none of these"  # what a candidate without a condition is called: the null label, the empty prompt


class Candidates:
    """The K conditions that a denoiser can be asked about.

    Args:
        names: Human-readable name of each candidate, such as a class name or a prompt.
        classes: Class index of each candidate; candidate k is class k if omitted. Several candidates may share a class
            (several prompts for one class).
        class_names: Human-readable name of each class up to the largest index; that of its first candidate if omitted.

    Raises:
        TypeError: if ``names`` is a single text.
        ValueError: if there are no candidates, the lengths differ, a class has no name, or a class index is negative,
            no whole number or above ten million: every class up to the largest takes room.

    Example:
        >>> candidates = Candidates(["a photo of a cat", "a drawing of a cat", "a photo of a dog"], [0, 0, 1])
        >>> len(candidates), candidates.num_classes, candidates.classes
        (3, 2, (0, 0, 1))
    """

    def __init__(
        self,
        names: Sequence[str],
        classes: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        for listed in (names, [] if class_names is None else class_names):
            if isinstance(listed, (str, bytes)) or not isinstance(listed, Iterable):  # letters would be candidates
                raise WrongType(f"candidates: {listed!r}, expected a list of names")
        self.names = tuple(str(name) for name in names)
        self.classes = tuple(range(len(self.names))) if classes is None else tuple(map(_class_index, classes))
        if not self.names:
            raise UserError("candidates: none given, expected at least one")
        if len(self.classes) != len(self.names):
            raise UserError(f"candidates: {len(self.names)} names but {len(self.classes)} class indices")
        if min(self.classes) < 0:
            raise UserError(f"candidates: class index {min(self.classes)}, expected 0 or more")
        self._class_names = None if class_names is None else tuple(str(name) for name in class_names)
        if self._class_names is not None and len(self._class_names) != self.num_classes:
            raise UserError(f"candidates: {len(self._class_names)} names for {self.num_classes} classes")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def class_names(self) -> list[str]:
        """A name for each class: as given, or that of its first candidate, or else its index."""
        if self._class_names is not None:
            return list(self._class_names)
        names = [str(c) for c in range(self.num_classes)]
        for name, c in reversed(list(zip(self.names, self.classes, strict=True))):
            names[c] = name
        return names

    @property
    def num_classes(self) -> int:
        """One more than the largest class index."""
        return max(self.classes) + 1


def _class_index(value: Any) -> int:
    """A whole number, also of numpy or torch, or one such as 2.0."""
    try:
        index = int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"candidates: class index {value!r}, expected a whole number") from error
    if isinstance(value, str) or index != value or index >= MAX_CLASSES:
        raise UserError(f"candidates: class index {value!r}, expected a whole number below {MAX_CLASSES:,}")
    return index
