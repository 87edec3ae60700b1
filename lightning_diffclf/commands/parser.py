"""The parser of the commands: says what is wrong in a few words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from lightning_diffclf.commands.mistakes import explained


class Plain:
    """Reports what is wrong, without the hundreds of lines of usage before it."""

    prog: str
    exit_on_error: bool
    _actions: list[Any]
    _option_string_actions: dict[str, Any]

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | settings)

    def parse_args(self, *args: Any, **settings: Any) -> Any:
        """As the base class; a place to write to must have a name."""
        found = super().parse_args(*args, **settings)  # type: ignore[misc]
        out = found.get("out")
        if isinstance(out, str) and (not out.strip() or "\0" in out):
            self.error(f"out: {out!r}, expected the name of a file or folder")
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one message and exit with status 2; of the arguments of a class, leave that to the whole parser."""
        if not self.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        commands = [
            one for action in self._actions if isinstance(action.choices, dict) for one in action.choices.values()
        ]
        options = [name for one in (self, *commands) for name in one._option_string_actions if ".help" not in name]
        prog = self.prog.replace(" [options]", "")
        print(f"error: {explained(message, options)}\nAll options: {prog} --help", file=sys.stderr)
        raise SystemExit(2) from ex


class Parser(Plain, ArgumentParser):
    """Of the commands that need no Trainer."""

    def read(self, args: Sequence[str]) -> Namespace:
        """The values of arguments; those that are classes are made."""
        return self.instantiate_classes(self.parse_args(list(args)))
