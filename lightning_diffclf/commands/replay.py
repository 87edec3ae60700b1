"""``diffclf replay``: other rules on stored errors."""

from __future__ import annotations

from jsonargparse import Namespace
from rich.console import Console

from lightning_diffclf.classifier import LikelihoodRatio
from lightning_diffclf.files import write_json
from lightning_diffclf.results.errors import StoredErrors
from lightning_diffclf.results.replay import measure_inflation, replay, to_table, usual_rules


def replay_command(given: Namespace) -> None:
    """``diffclf replay``: prints a table, and writes it to ``--out``."""
    errors = StoredErrors(given.file)
    rules = usual_rules(errors) if given.elimination is None else [given.elimination]
    replays = [replay(errors, rule, given.weights, given.budget) for rule in rules]
    console = Console(soft_wrap=True)
    console.print(to_table(replays, errors.info))
    inflation = None
    if given.elimination is None and any(isinstance(one.rule, LikelihoodRatio) for one in replays):
        inflation = measure_inflation(errors)
        console.print(f"measured here for LikelihoodRatio: inflation {inflation:.2f}")
    if given.out is not None:
        numbers = {"file": given.file, "loss": errors.info.loss, "draws": errors.info.draws, "seed": errors.info.seed}
        numbers |= {} if inflation is None else {"inflation": inflation}
        write_json(numbers | {"replays": [one.summary() for one in replays]}, given.out, indent=2, what="replay")
