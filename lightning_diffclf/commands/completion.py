"""``diffclf completion``: a script for the shell, made of what ``--help`` says of each command."""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout, suppress
from typing import NamedTuple

import shtab
from jsonargparse import Namespace

from lightning_diffclf.commands import COMMANDS, run
from lightning_diffclf.commands.configs import CONFIGS, listing

TAKES_THOSE_OF = {"demo": "fit", **dict.fromkeys(("evaluate", "attack", "certify"), "test")}  # beside its own options


class Option(NamedTuple):
    """An option as the help shows it.

    Attributes:
        names: ``-c``, ``--config``.
        values: What it takes: a list of words, nothing (a flag), or None for anything.
        about: The first words of its description.
    """

    names: tuple[str, ...]
    values: tuple[str, ...] | None
    about: str


def options_in(text: str) -> Iterator[Option]:
    r"""The options that a help text describes.

    Example:
        >>> for option in options_in("  --out OUT  where\n            it goes\n  -j, --json  print JSON"):
        ...     print(option.names, option.values, option.about)
        ('--out',) None where it goes
        ('-j', '--json') () print JSON
    """
    for block in re.findall(r"^  (-.*(?:\n {4,}.*)*)", text, re.MULTILINE):
        shown, _, about = block.partition("  ") if "  " in block.partition("\n")[0] else block.partition("\n")
        names = tuple(name for name in re.findall(r"(?:^|, )(-[\w.+-]+)", shown) if not name.endswith("+"))
        words = re.search(r"\{(.*?)\}", shown)
        takes = re.search(rf"{re.escape(names[-1])} \S", shown)
        values = tuple(words[1].split(",")) if words else None if takes else ()
        yield Option(names, values, " ".join(about.split())[:80])


def help_of(name: str) -> str:
    """What ``diffclf NAME --help`` prints."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run(name, ["--help"])
    return printed.getvalue()


def parser_of(names: Iterable[str]) -> argparse.ArgumentParser:
    """The command line as shtab takes it."""
    configs = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    whole = argparse.ArgumentParser(prog="diffclf")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers()
    for name in names:
        about = COMMANDS[name].summary
        parser = commands.add_parser(name, help=about, description=about, add_help=False)
        seen = {"--config": configs, "--copy": [name for group in listing().values() for name in group]}
        shown = help_of(name) + (help_of(TAKES_THOSE_OF[name]) if name in TAKES_THOSE_OF else "")
        for option in options_in(shown):
            if option.names[-1] in parser._option_string_actions:
                continue
            about = option.about.replace("%", "%%")
            if option.values == ():
                parser.add_argument(*option.names, action="store_true", help=about)
                continue
            values = seen.get(option.names[-1], option.values)
            action = parser.add_argument(*option.names, choices=values, help=about)
            if values is None:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        if "positional arguments:" in shown:
            parser.add_argument("files", nargs="*").complete = shtab.FILE  # type: ignore[attr-defined]
    return whole


def completion_command(given: Namespace) -> None:
    """``diffclf completion``: prints the script."""
    print(shtab.complete(parser_of(COMMANDS), given.shell))
