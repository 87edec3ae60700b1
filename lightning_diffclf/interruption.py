"""Leaving in the middle of long work, but never in the middle of writing its results.

A signal handler that raises ends a program at once, between any two instructions. What must be done as a whole, such as
writing the decisions that are in memory, says so: then the handler has its turn right after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_uninterrupted = 0  # such work that is being done, one inside another
_waiting: list[Callable[[], None]] = []


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, what :func:`interrupt` is given waits; it is called when the outermost block ends."""
    global _uninterrupted
    _uninterrupted += 1
    try:
        yield
    finally:
        _uninterrupted -= 1
        if _uninterrupted == 0 and _waiting:
            leave = _waiting[0]
            _waiting.clear()
            leave()


def interrupt(leave: Callable[[], None]) -> None:
    """Call ``leave``, which may raise, now or as soon as no work is :func:`uninterrupted`; for signal handlers."""
    if _uninterrupted:
        _waiting.append(leave)
    else:
        leave()
