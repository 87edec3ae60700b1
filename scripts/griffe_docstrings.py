"""Our docstrings as mkdocstrings reads them: roles become code or links, and an example is a section of code."""

import re
from pathlib import Path
from typing import Any

import griffe

import lightning_diffclf
from lightning_diffclf.lazy import imported_by

PUBLIC = imported_by(Path(str(lightning_diffclf.__file__)).with_suffix(".pyi"))

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(~?)([^`]+)`")


def as_markdown(docstring: str) -> str:
    """``:class:`~a.b.C` `` becomes ``C``, a link where C is public; ``Example:`` is called ``Examples:``."""

    def link(role: re.Match[str]) -> str:
        shortened, path = role.groups()
        name = path.rpartition(".")[2]
        code = f"`{name if shortened else path}`"
        return f"[{code}][lightning_diffclf.{name}]" if name in PUBLIC else code

    return re.sub(r"^Example:$", "Examples:", ROLE.sub(link, docstring), flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring that is read."""

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
