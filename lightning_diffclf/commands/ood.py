"""``diffclf ood``: images that fit no class."""

from __future__ import annotations

from jsonargparse import Namespace
from rich.console import Console

from lightning_diffclf.files import write_json
from lightning_diffclf.results import ood
from lightning_diffclf.results.evaluation import Evaluation


def ood_command(given: Namespace) -> None:
    """``diffclf ood``: prints a table, and writes it to ``--out``."""
    known, foreign = Evaluation.read(given.known), Evaluation.read(given.foreign)
    found = ood.compare_with_foreign(known, foreign, given.unconditional)
    Console(soft_wrap=True).print(ood.to_table(found, known.images, foreign.images))
    if given.out is not None:
        runs = {"known": given.known, "foreign": given.foreign}
        write_json(runs | {"scores": ood.to_dict(found)}, given.out, indent=2, what="ood")
