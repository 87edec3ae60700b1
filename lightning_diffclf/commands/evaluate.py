"""``diffclf evaluate``: a test set, classified with a checkpoint or a network of its own."""

from __future__ import annotations

from jsonargparse import Namespace

from lightning_diffclf.cli import DiffClfCLI, test_arguments


def evaluate_command(given: Namespace) -> None:
    """``diffclf evaluate``: ``test`` of a checkpoint, by default with the settings that it was trained with."""
    kept = {None: [], True: ["errors"], "distances": ["errors", "distances"]}[given.keep_errors]
    own = [
        *[f"--classifier.keep_{what}=true" for what in kept],
        *(["--classifier.plan=true"] if given.plan else []),
    ]
    DiffClfCLI(test_arguments(given, "evaluation", own))


class _Parses(DiffClfCLI):
    """Goes as far as the settings, of which it makes nothing."""

    def _set_seed(self) -> None:
        """Nothing: no randomness is needed."""

    def before_instantiate_classes(self) -> None:
        """Nothing: open settings are completed from data, which are read then."""

    def instantiate_classes(self) -> None:
        """Nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing."""


def check_evaluation(given: Namespace) -> None:
    """Whether ``diffclf evaluate`` would understand its arguments; makes and runs nothing.

    Raises:
        SystemExit: after a message, if an argument or a configuration is not understood.
        UserError: if a checkpoint, or what it says, cannot be read.
    """
    _Parses(test_arguments(given, "evaluation", []))
