"""``diffclf``: which commands there are, and how one is run. Nothing heavy is imported before it is needed."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from typing import NamedTuple

from lightning_diffclf import __version__
from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.errors import user_error
from lightning_diffclf.interruption import leaves_at_once


class Command(NamedTuple):
    """One word after ``diffclf``.

    Attributes:
        summary: One line for the help.
        module: Where ``NAME_command`` is, which takes what the function ``NAME`` of
            :mod:`~lightning_diffclf.commands.arguments` returns. None for Lightning's own subcommands, whose arguments
            are those of all classes that they may make.
    """

    summary: str
    module: str | None = None


GROUPS: dict[str, dict[str, Command]] = {
    "Begin": {
        "demo": Command("train on handwritten digits and classify with what was learnt: minutes", "commands.demo"),
        "configs": Command("the experiments that come with this package, or a copy of one to edit", "commands.configs"),
        "completion": Command("a script with which TAB completes commands and options", "commands.completion"),
    },
    "Train and evaluate": {
        "fit": Command("train: --config dit_digits.yaml, and any value in it as a flag"),
        "evaluate": Command(
            "classify a test set: --ckpt of a run, or --config of a network as it is", "commands.evaluate"
        ),
        "validate": Command("the same on the validation set, as Lightning's subcommand"),
        "test": Command("what evaluate runs, as Lightning's subcommand"),
        "predict": Command("classify images without labels, as Lightning's subcommand"),
    },
    "Results": {
        "report": Command("one HTML file that shows an evaluation, and its figures", "commands.results"),
        "compare": Command("two evaluations image by image: agreement, McNemar's test, cost", "commands.results"),
        "ood": Command("how well a run's numbers tell foreign images: AUROC, FPR95, AUPR", "commands.ood"),
        "leaderboard": Command("several evaluations of the same images, the best first", "commands.results"),
        "merge": Command("join evaluations of parts of a data set", "commands.results"),
        "robustness": Command(
            "runs on shifted data against a line through ordinary classifiers", "commands.robustness"
        ),
        "replay": Command(
            "what other rules, weights and budgets would have decided, without the network", "commands.replay"
        ),
    },
    "Trust": {
        "attack": Command("accuracy under attack: APGD or AutoAttack on a checkpoint", "commands.trials"),
        "certify": Command("distances within which no change of an image changes its answer", "commands.trials"),
    },
    "Many evaluations": {
        "suite": Command("models × data sets × rules of a YAML file, and their leaderboard", "commands.suite"),
        "reproduce": Command("a table of the paper, its values beside ours: reproduce digits", "commands.reproduce"),
    },
    "Photos and samples": {
        "app": Command("a local page: drop a picture, and watch labels fall draw by draw", "commands.app"),
        "classify": Command("photos and labels in, probabilities out", "commands.classify"),
        "sample": Command("images of given classes from a trained network", "commands.sample"),
        "fid": Command("how good generated images are: FID, Inception Score, precision, recall", "commands.fid"),
    },
    "Data and weights": {
        "shards": Command("a folder of images becomes tar shards", "commands.data"),
        "encode": Command("images become latents", "commands.data"),
        "export": Command("a trained DiT becomes a folder of diffusers", "commands.export"),
    },
}

COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


def help_text() -> str:
    """All commands, a line each."""
    width = max(map(len, COMMANDS))
    groups = [
        "\n".join([title, *(f"  {name:{width}}  {command.summary}" for name, command in group.items())])
        for title, group in GROUPS.items()
    ]
    usage = "usage: diffclf COMMAND [options]"
    about = "Diffusion models as classifiers: train them, evaluate them, look at them."
    return "\n\n".join([usage, about, *groups, "All options of a command: diffclf COMMAND --help"])


def run(name: str, args: Sequence[str]) -> None:
    """Run a command with its arguments.

    Raises:
        UserError: if it cannot be done as asked.
        SystemExit: if the arguments cannot be understood, or ask for help.
    """
    module = COMMANDS[name].module
    if module is None:
        import_module("lightning_diffclf.cli").DiffClfCLI([name, *args])
        return
    given = getattr(import_module("lightning_diffclf.commands.arguments"), name)(args)  # before what is slow to import
    getattr(import_module(f"lightning_diffclf.{module}"), f"{name}_command")(given)


def main(args: Sequence[str] | None = None) -> None:
    """``diffclf``: one of the commands; ``args`` are those of the process if omitted."""
    name, *others = (sys.argv[1:] if args is None else args) or [""]
    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"diffclf {__version__}")
    elif name in COMMANDS:
        telling(lambda: run(name, others), program=args is None)
    elif name == "":
        print(help_text(), file=sys.stderr)
        raise SystemExit(2)
    else:
        raise SystemExit(f"error: {unknown('command', name, COMMANDS)}\nAll commands: diffclf --help")


def evaluate(args: Sequence[str] | None = None) -> None:
    """``evaluate.py``: ``diffclf evaluate``; ``args`` are those of the process if omitted."""
    telling(lambda: run("evaluate", sys.argv[1:] if args is None else args), program=args is None)


def telling(command: Callable[[], object], program: bool = False) -> None:
    """Run a command; what the user did wrong is told in one line instead of a traceback.

    Args:
        command: What to run.
        program: Whether that is all that this process is for, so that it may end at once when that is done.
    """
    for harmless in (
        "isinstance\\(treespec, LeafSpec\\)",
        "The number of training batches",
        "The dirpath has changed",
        ".*does not have many workers",
        "predict returned None",
    ):
        warnings.filterwarnings("ignore", message=f".*{harmless}")
    chatter = "Tip:", "already configured with model summary", "TPU available", "Restoring states from the checkpoint"
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(text in record.getMessage() for text in chatter)
    )
    try:
        with leaves_at_once() if program else nullcontext():
            command()
    except BrokenPipeError:  # who reads what is printed has seen enough, as `| head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the end
        raise SystemExit(1) from None
    except Exception as error:
        told = user_error(error)
        if told is None:
            raise
        raise SystemExit(f"error: {told}") from error
