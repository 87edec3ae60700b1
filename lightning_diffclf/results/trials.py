"""What runs that are no evaluations come to, attacks and certificates: from their rows and what their settings say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.table import Table

from lightning_diffclf.errors import UserError
from lightning_diffclf.files import write_json
from lightning_diffclf.results import attacks, certificates
from lightning_diffclf.results.settings import SETTINGS, Settings
from lightning_diffclf.results.stored import Stored

METRICS = "metrics.json"


def numbers(settings: Settings, tables: Iterable[pa.Table]) -> dict[str, Any]:
    """What stored rows come to: the numbers of metrics.json.

    Args:
        settings: Of the run.
        tables: Its records, in parts.

    Raises:
        UserError: if the run is of another kind, or its settings do not say what was tried.
    """
    if settings.kind == attacks.KIND:
        return dict(attacks.numbers(tables))
    return certificates.numbers(tables, told(settings, "radii"))


def to_table(settings: Settings, found: dict[str, Any]) -> Table:
    """The numbers for the terminal, as :func:`numbers` returns them."""
    title = told(settings, "title")
    if not found["images"]:
        return Table(title=f"{title}: no image")
    if settings.kind == attacks.KIND:
        return attacks.to_table(found, title, told(settings, "calls"))
    return certificates.to_table(found, title)


def write_metrics(folder: Path, settings: Settings) -> dict[str, Any]:
    """Write metrics.json of a run; returns its numbers."""
    found = numbers(settings, Stored(folder, settings))
    write_json({"metrics": found, "settings": settings.identity | settings.info}, folder / METRICS, 2, "results")
    return found


def told(settings: Settings, name: str) -> Any:
    """Of what an attack or a certification says of itself, for tables."""
    summary = settings.info.get("summary")
    if settings.kind not in (attacks.KIND, certificates.KIND) or not isinstance(summary, dict) or name not in summary:
        raise UserError(
            f"run: {SETTINGS} of the kind {settings.kind!r} does not say {name!r}, expected what `diffclf attack` or "
            "`diffclf certify` writes"
        )
    return summary[name]
