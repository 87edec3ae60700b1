"""What one process does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import lightning as L

T = TypeVar("T")


def on_first_rank(trainer: L.Trainer, make: Callable[[], T]) -> T:
    """What ``make`` returns on the first process, on every process; it is called there only.

    Raises:
        ValueError, OSError: on every process, if ``make`` does: none of them then waits for another.
    """
    outcome: T | Exception | None = None
    if trainer.is_global_zero:
        try:
            outcome = make()
        except (ValueError, OSError) as error:
            outcome = error
    outcome = trainer.strategy.broadcast(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    assert outcome is not None
    return outcome
