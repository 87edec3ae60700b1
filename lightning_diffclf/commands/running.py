"""What commands that run for long on several processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lightning_diffclf.errors import UserError


def progress(**settings: Any) -> Progress:
    """A progress bar that says when it will be done."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), **settings)


def on_first_process(fabric: L.Fabric, work: Callable[[], None]) -> None:
    """Run ``work`` on the first process while the others wait.

    Raises:
        ValueError: on all of them, if it raised ValueError or OSError there.
    """
    failure: Exception | None = None
    if fabric.is_global_zero:
        try:
            work()
        except (ValueError, OSError) as error:
            failure = error
    failure = fabric.broadcast(failure)
    if failure is not None:
        raise UserError(str(failure)) from failure
