"""Leaving in the middle of long work, but never in the middle of writing its results.

A signal handler that raises ends a program at once, between any two instructions. What must be done as a whole, such as
writing the decisions that are in memory, says so: then the handler has its turn right after.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress


class Left(SystemExit):
    """Raised where a signal ends the program and everything is saved; ``code`` is its status."""


@contextmanager
def leaves_at_once() -> Iterator[None]:
    """Around a whole program: when it is done, or was :class:`Left`, what others do at its end is done, then it ends.

    Python would take apart every module and object first, which for those that are imported here takes seconds.
    """
    statuses: list[int] = []

    def end() -> None:
        if statuses:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with suppress(BrokenPipeError):  # whoever read it is gone
                    stream.flush()
            os._exit(statuses[0])

    atexit.register(end)  # now, before others do: what is registered first is called last
    try:
        yield
        statuses.append(0)
    except Left as left:
        statuses.append(int(left.code or 0))
        raise


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
