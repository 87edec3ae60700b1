"""Packages whose members are imported when they are asked for (PEP 562): the package itself costs nothing.

What they are is said once, in the stub ``__init__.pyi`` of the package, which type checkers and editors read as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def members(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package: what its stub imports."""
    module = sys.modules[package]
    homes = imported_by(Path(str(module.__file__)).with_suffix(".pyi"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        value = getattr(import_module(homes[name]), name)
        setattr(module, name, value)  # asked for once
        return value

    return get, lambda: sorted({*vars(module), *homes}), sorted(homes)


def imported_by(stub: Path) -> dict[str, str]:
    """The module that each name is imported from, of lines such as ``from package.module import Name as Name``."""
    lines = ast.parse(stub.read_text(encoding="utf-8")).body
    return {one.name: str(line.module) for line in lines if isinstance(line, ast.ImportFrom) for one in line.names}
