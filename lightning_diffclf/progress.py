"""What long work is at, such as loading a network or embedding prompts, told to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str, int, int | None], None]
"""Takes what is being done, how much of it is done, and how much there is in all; None if unknown."""

_listeners: list[Listener] = []


def tell(what: str, done: int = 0, total: int | None = None) -> None:
    """Say what is being done now, to all who are :func:`listening`."""
    for listener in _listeners:
        listener(what, done, total)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener`` is told.

    Example:
        >>> with listening(print):
        ...     tell("embedding prompts", 32, 1000)
        embedding prompts 32 1000
        >>> tell("nobody listens")
    """
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def described(what: str, done: int, total: int | None) -> str:
    """In words.

    Example:
        >>> described("embedding prompts", 32, 1000), described("network calls", 640, None)
        ('embedding prompts: 32 of 1,000', 'network calls: 640')
    """
    if total is not None:
        return f"{what}: {done:,} of {total:,}"
    return f"{what}: {done:,}" if done else what
