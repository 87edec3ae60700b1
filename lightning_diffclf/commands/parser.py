"""The parser of the commands that need no Trainer."""

from __future__ import annotations

import sys
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser


class Parser(LightningArgumentParser):
    """Reports what is wrong, without the hundreds of lines of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one message and exit with status 2."""
        print(f"error: {message}\nAll options: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2) from ex
