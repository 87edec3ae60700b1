"""A page about a run, whatever kind of run it is: what it shows, and how it becomes HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_diffclf.results import charts, headline
from lightning_diffclf.results.settings import Settings


class Cell(NamedTuple):
    """A cell of the table of classes.

    Attributes:
        text: What is shown.
        value: What it is sorted by and saved as, if it is a number.
        place: What else it is sorted by.
    """

    text: str
    value: float | None = None
    place: int | None = None


@dataclass(frozen=True)
class Page:
    """What a page about a run shows.

    Attributes:
        sentence: The run in words.
        cards: The six numbers that matter most.
        numbers: All numbers.
        meaning: Where it is said what they mean.
        charts: By name.
        columns: Of the table of classes.
        classes: Its rows; none, for no table.
        template: Name of the template.
        more: What it shows besides.
    """

    sentence: str
    cards: Sequence[headline.Line]
    numbers: Sequence[headline.Line]
    meaning: str
    charts: Mapping[str, charts.Chart]
    columns: Sequence[str]
    classes: Sequence[Sequence[Cell]]
    template: str = "page.html.j2"
    more: Mapping[str, Any] = field(default_factory=dict)


def templates() -> Environment:
    """The templates of this folder; what is put into them is escaped."""
    environment = Environment(loader=PackageLoader("lightning_diffclf.results", "."), undefined=StrictUndefined)
    environment.autoescape = True
    return environment


def render(page: Page, run: Path, settings: Settings, specs: dict[str, dict[str, Any]], library: str) -> str:
    """A page as HTML that needs nothing else, with the ``library`` that draws its charts from their ``specs``."""
    return (
        templates()
        .get_template(page.template)
        .render(
            title="/".join(run.resolve().parts[-2:]),
            sentence=page.sentence,
            cards=page.cards,
            numbers=page.numbers,
            meaning=page.meaning,
            figures={name: spec["title"] for name, spec in specs.items()},
            specs=as_script(specs),
            light=charts.LIGHT,
            dark=charts.DARK,
            themes=as_script({"light": charts.theme(charts.LIGHT), "dark": charts.theme(charts.DARK)}),
            library=library.replace("</script", "<\\/script"),
            columns=page.columns,
            classes=page.classes,
            settings=_flat(settings.identity) | _flat(_for_readers(settings.info)),
            command=settings.info.get("command", "unknown"),
            version=version("lightning-diffclf"),
            **page.more,
        )
    )


def _for_readers(info: dict[str, Any]) -> dict[str, Any]:
    lists = ("candidate_names", "candidate_classes", "class_names", "timesteps_S", "log_snr_S", "command")
    return {name: value for name, value in info.items() if name not in lists}


def _flat(values: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def as_script(values: Any) -> str:
    """JSON that may stand inside a script element; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(values), separators=(",", ":")).replace("<", "\\u003c")


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(value) for value in values]
    if isinstance(values, (float, np.floating)):
        return float(values) if np.isfinite(values) else None
    return values.item() if isinstance(values, np.generic) else values
