"""What a Trainer can be asked for: told in one line where it cannot, in place of Lightning's traceback."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Union, get_args

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.errors import UserError, check_at_least, first_line


def check_trainer(settings: Namespace) -> None:
    """Check names and numbers that Lightning itself answers with a traceback, or not at all.

    Args:
        settings: ``trainer`` of a configuration.

    Raises:
        ValueError: names the option, what was found, and what was probably meant.
    """
    known = {
        "accelerator": ["auto", "gpu", *AcceleratorRegistry.available_accelerators()],
        "strategy": ["auto", *StrategyRegistry.available_strategies()],
    }
    for option, names in known.items():
        given = settings.get(option)
        if isinstance(given, str) and given not in names:
            raise UserError(f"trainer.{option}: {unknown(option, given, names)}")
    _check_devices(settings.get("devices"))
    _check_sharding(settings)
    check_at_least(1, **{"trainer.accumulate_grad_batches": settings.get("accumulate_grad_batches")})


def _check_devices(devices: Any) -> None:
    """A number, -1 for all, a list of indices, ``auto``; a string may be any of these."""
    text = str(devices).strip("[]").replace(" ", "")
    number = int(text) if re.fullmatch(r"-?\d+", text) and not isinstance(devices, list) else None
    count = number is not None and (number == -1 or number > 0)
    if not count and devices not in (None, "auto") and not (number is None and re.fullmatch(r"\d+(,\d+)*,?", text)):
        raise UserError(f"trainer.devices: {devices!r}, expected a number, -1 for all, a list such as [0,1], or auto")


def _check_sharding(settings: Namespace) -> None:
    """Of a ModelParallelStrategy with numbers, whether they make up the processes that there will be."""
    names = [f"strategy.init_args.{kind}_parallel_size" for kind in ("data", "tensor")]
    found = [str(settings.get(name)) for name in (*names, "devices", "num_nodes")]  # numbers may be strings
    if not all(text.isdecimal() for text in found):
        return
    data, tensor, devices, nodes = map(int, found)
    if data * tensor != devices * nodes:
        raise UserError(
            f"trainer.strategy: data_parallel_size {data}, tensor_parallel_size {tensor}, but {devices * nodes} "
            "processes; expected sizes that make so many"
        )


@contextmanager
def refusals() -> Iterator[None]:
    """Around the making of a Trainer: what Lightning refuses is the user's to mend.

    Raises:
        ValueError: with the first line of what Lightning says.
    """
    try:
        yield
    except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"trainer: {first_line(error)}") from error


def integers_first(parser: ArgumentParser) -> None:
    """Have options of the Trainer that take an ``int`` or a ``float`` try the first first: 1 is one batch, 1.0 are all.

    Python 3.10 takes ``Optional[Union[int, float]]`` for the ``Optional[Union[float, int]]`` that another package has
    asked for before, and parsers try the types in their order.
    """
    for action in parser._actions:
        types = get_args(getattr(action, "_typehint", None))
        if action.dest.startswith("trainer.") and {int, float} <= set(types):
            action._typehint = Union[tuple(sorted(types, key=lambda one: one is not int))]  # noqa: UP007
