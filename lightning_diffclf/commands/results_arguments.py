"""Arguments of what works on stored results; see :mod:`~lightning_diffclf.commands.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from jsonargparse import Namespace

from lightning_diffclf.classifier.elimination import Elimination
from lightning_diffclf.classifier.sequential import SequentialTest  # noqa: F401  (rules are named without a path)
from lightning_diffclf.commands.parser import Parser


def replay(args: Sequence[str]) -> Namespace:
    """Of ``diffclf replay``."""
    parser = Parser(
        prog="diffclf replay",
        description="What other elimination rules and timestep weights would have decided, and what they would have "
        "cost, from the errors that `evaluate.py --keep-errors` wrote. Needs no network.",
    )
    parser.add_argument("file", type=str, help="errors.parquet of a run without elimination")
    parser.add_argument(
        "--elimination", type=Elimination | None, default=None, help="the rule; if omitted, the usual ones are compared"
    )
    parser.add_argument(
        "--weights", type=str | list[float] | None, default=None, help="timestep weights; those of the run if omitted"
    )
    parser.add_argument("--budget", type=int | None, default=None, help="network calls for one image at most")
    parser.add_argument("--out", type=str | None, default=None, help="write the numbers to this JSON file as well")
    return parser.read(args)


def merge(args: Sequence[str]) -> Namespace:
    """Of ``diffclf merge``."""
    parser = Parser(
        prog="diffclf merge",
        description="Join runs with the same settings, ended or killed: jobs of an array, parts of a data set. Images "
        "that are in several count once and must agree.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="folders of evaluations")
    parser.add_argument("--out", type=str, required=True, help="folder for the whole")
    return parser.read(args)


def compare(args: Sequence[str]) -> Namespace:
    """Of ``diffclf compare``."""
    parser = Parser(
        prog="diffclf compare",
        description="Compare two evaluations image by image: agreement, accuracy with intervals, McNemar's exact test, "
        "cost.",
    )
    parser.add_argument("first", type=str, help="folder of an evaluation")
    parser.add_argument("second", type=str, help="folder of another on the same images")
    parser.add_argument("--out", type=str | None, default=None, help="folder for figures and comparison.json")
    return parser.read(args)


def ood(args: Sequence[str]) -> Namespace:
    """Of ``diffclf ood``."""
    parser = Parser(
        prog="diffclf ood",
        description="How well what an evaluation stores tells images of none of the classes from known ones: AUROC, "
        "FPR95 and AUPR with 95 % intervals, for each number. With errors.parquet in both folders (--keep-errors), "
        "also by the error level at each timestep.",
    )
    parser.add_argument("known", type=str, help="folder of an evaluation of images of the classes")
    parser.add_argument(
        "foreign", type=str, help="folder of one by the same network and recipe on others (`diffclf predict`)"
    )
    parser.add_argument(
        "--unconditional",
        type=str | None,
        default=None,
        help="name of the candidate that stands for no condition, such as an empty prompt",
    )
    parser.add_argument("--out", type=str | None, default=None, help="write the numbers to this JSON file as well")
    return parser.read(args)


def robustness(args: Sequence[str]) -> Namespace:
    """Of ``diffclf robustness``."""
    parser = Parser(
        prog="diffclf robustness",
        description="Effective robustness: how much better runs are on shifted data than a line through the accuracies "
        "of ordinary classifiers lets expect. Files of such accuracies: results/ in timm's repository, for ImageNet-A "
        "results-imagenet-a-clean.csv and results-imagenet-a.csv.",
    )
    parser.add_argument("--ordinary", type=str, required=True, help="CSV with the columns model and top1 (percent)")
    parser.add_argument("--shifted", type=str, required=True, help="the same of the shifted data")
    parser.add_argument(
        "--run",
        type=list[str],
        default=[],
        help="ORDINARY,SHIFTED: folders of an evaluation on each; as a list of several: '[A,B,C,D]' is two pairs",
    )
    parser.add_argument("--out", type=str | None, default=None, help="folder for robustness.json, .png and .svg")
    return parser.read(args)


def reproduce(args: Sequence[str]) -> Namespace:
    """Of ``diffclf reproduce``: its own, and ``flags``, which are those of ``evaluate``."""
    own = argparse.ArgumentParser(
        prog="diffclf reproduce",
        description="A table or figure of the paper: its values beside ours, with intervals, network calls and time. "
        "Runs the cells that this machine has data and weights for, goes on where it was stopped, and says what is "
        "missing. Of `digits`, everything is here.",
        epilog="All other flags are those of `diffclf evaluate`, such as --trainer.accelerator cpu.",
        allow_abbrev=False,
    )
    own.add_argument(
        "table", help="table1, table3, table4, table5, table8, table9, table10, fig3, fig4, fig6, fig8 or digits"
    )
    own.add_argument("--out", default="runs/reproduce", help="folder for the runs and the table")
    own.add_argument(
        "--errors", metavar="RUN", help="fig3, fig4, fig8: of an evaluation of yours with --keep-errors, on any data"
    )
    own.add_argument("--dry-run", action="store_true", help="run nothing: show what is there and what is missing")
    known, flags = own.parse_known_args(list(args))
    return Namespace(**vars(known), flags=flags)


def suite(args: Sequence[str]) -> Namespace:
    """Of ``diffclf suite``: its own, and ``flags``, which are those of ``evaluate``."""
    own = argparse.ArgumentParser(
        prog="diffclf suite",
        description="Evaluate models × data sets × rules of a YAML file, each in a process of its own, and make a "
        "leaderboard. What is done is skipped, what was begun goes on. See docs/results.md for the file.",
        epilog="All other flags are those of `diffclf evaluate` and should be about this machine only, such as "
        "--trainer.accelerator cpu: they do not tell cells apart.",
        allow_abbrev=False,
    )
    own.add_argument("file", help="YAML with models, data and rules")
    own.add_argument("--out", help="folder for the runs and the leaderboard (default: that of the file, or runs/NAME)")
    what = own.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="run nothing: show the cells and what is done")
    what.add_argument("--plan", action="store_true", help="measure what each cell will cost, once, and show that")
    what.add_argument(
        "--part",
        metavar="I/N",
        help="run only the I-th of N parts of the cells, about equal by planned network calls, as the jobs of an array "
        "do; needs --plan before",
    )
    known, flags = own.parse_known_args(list(args))
    return Namespace(**vars(known), flags=flags)


def leaderboard(args: Sequence[str]) -> Namespace:
    """Of ``diffclf leaderboard``."""
    parser = Parser(
        prog="diffclf leaderboard",
        description="Evaluations of the same images, the best first: accuracy with intervals, network calls, a paired "
        "test against the best. As HTML, Markdown and CSV. Runs of other data are refused.",
    )
    parser.add_argument("runs", type=str, nargs="+", help="folders of evaluations")
    parser.add_argument("--title", type=str, default="", help="what the data are called")
    parser.add_argument("--out", type=str, default=".", help="folder for leaderboard.html, .md and .csv")
    return parser.read(args)


def report(args: Sequence[str]) -> Namespace:
    """Of ``diffclf report``."""
    parser = Parser(
        prog="diffclf report",
        description="One HTML file that shows an evaluation (also one that is still running), and its figures as PNG "
        "and SVG. Needs no network, neither to make nor to open.",
    )
    parser.add_argument("run", type=str, help="folder of an evaluation")
    parser.add_argument("--out", type=str | None, default=None, help="the file (default: report.html in the folder)")
    parser.add_argument("--gallery", type=int, default=240, help="images to show at most")
    return parser.read(args)
