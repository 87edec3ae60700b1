"""Arguments of what runs a network on a test set; see :mod:`~lightning_diffclf.commands.arguments`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction

from jsonargparse import Namespace

from lightning_diffclf.commands.mistakes import similar, unknown
from lightning_diffclf.errors import UserError

EPS = {"linf": "8/255", "l2": "0.5"}  # those of RobustBench for CIFAR-10
FLAGS = (
    "All other flags override the settings of the checkpoint (--classifier.draws 50, --data.eval_batch_size 16, "
    "--trainer.accelerator gpu); see `diffclf test --help`."
)


def evaluate(args: Sequence[str]) -> Namespace:
    """Of ``diffclf evaluate``: its own, and ``flags``, which are those of the classes that it makes."""
    own = _parser(
        "evaluate",
        "Classify a test set with a trained network. Prints a table; writes metrics.json, predictions.parquet, "
        "confusion.png and timesteps.png to OUT.",
        "evaluation",
    )
    own.add_argument(
        "--keep-errors",
        nargs="?",
        const=True,
        choices=["distances"],
        help="write every error to errors.parquet, for `diffclf replay`; with `distances`, also those between the "
        "candidates' predictions, which LikelihoodRatio needs",
    )
    own.add_argument(
        "--plan", action="store_true", help="measure what the evaluation will cost, print that and write nothing"
    )
    return _read(own, args)


def attack(args: Sequence[str]) -> Namespace:
    """Of ``diffclf attack``: its own, and ``flags``, as of ``evaluate``."""
    own = _parser(
        "attack",
        "How many test images a network still classifies rightly after an attack: APGD on the margin of its "
        "differentiable logits, or AutoAttack. All distances are in units of images in [0, 1]. The same command goes "
        "on where it was stopped. Writes metrics.json and predictions.parquet to OUT.",
        "attack",
    )
    own.add_argument("--norm", choices=list(EPS), default="linf", help="of the change of an image (default: linf)")
    own.add_argument(
        "--eps",
        type=_number,
        help="its largest size, in units of images in [0, 1]: 8/255, which is 8 grey levels, or 0.03 (default: "
        f"{EPS['linf']} for linf, {EPS['l2']} for l2)",
    )
    own.add_argument("--steps", type=int, default=100, help="gradients of APGD (default: 100)")
    own.add_argument("--restarts", type=int, default=1, help="starts of APGD, the first of them the image (default: 1)")
    _add_draws(own)
    own.add_argument(
        "--randomness",
        choices=["fixed", "fresh"],
        default="fixed",
        help="whether draws are fixed, and known to the attacker, or new at each call: a random defence (default: "
        "fixed)",
    )
    own.add_argument(
        "--seeds", type=int, default=1, help="draws that must all decide rightly: the worst counts (default: 1)"
    )
    own.add_argument("--eot", type=int, help="calls that a gradient is the mean of, where draws are fresh (default: 5)")
    own.add_argument("--auto", action="store_true", help="AutoAttack in place of APGD; needs the extra `attack`")
    own.add_argument("--batch_size", type=int, default=32, help="images that are attacked together (default: 32)")
    _add_common(own)
    given = _read(own, args)
    if given.eps is None:
        given.eps = _number(EPS[given.norm])
    return given


def certify(args: Sequence[str]) -> Namespace:
    """Of ``diffclf certify``: its own, and ``flags``, as of ``evaluate``."""
    own = _parser(
        "certify",
        "Within which Euclidean distance no change of a test image changes the answer: randomised smoothing, with one "
        "step of the denoiser to take the noise away. All distances are in units of images in [0, 1]. The same command "
        "goes on where it was stopped. Writes metrics.json and predictions.parquet to OUT.",
        "certification",
    )
    own.add_argument(
        "--sigma",
        type=_number,
        default=0.25,
        help="standard deviation of the noise, in units of images in [0, 1] (default: 0.25)",
    )
    own.add_argument("--n0", type=int, default=100, help="noisy images that choose the answer (default: 100)")
    own.add_argument("--n", type=int, default=1000, help="others that count its votes (default: 1000)")
    own.add_argument(
        "--alpha", type=float, default=0.001, help="probability that a certificate is wrong (default: 0.001)"
    )
    own.add_argument(
        "--radii",
        type=_numbers,
        default=(0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0),
        help="radii of the table, with commas between them",
    )
    _add_draws(own)
    own.add_argument("--batch_size", type=int, default=100, help="noisy images of one image at once (default: 100)")
    _add_common(own)
    return _read(own, args)


# --- what they have in common ----------------------------------------------------------------------------------------


def _parser(name: str, description: str, folder: str) -> argparse.ArgumentParser:
    own = argparse.ArgumentParser(prog=f"diffclf {name}", description=description, epilog=FLAGS, allow_abbrev=False)
    own.add_argument(
        "--ckpt",
        help="checkpoint; a run of ours needs nothing else. Or published weights: a file, or "
        "hf://OWNER/REPOSITORY/FILE",
    )
    own.add_argument("-c", "--config", action="append", default=[], help="YAML file, or the name of one in configs/")
    own.add_argument("--run_dir", help="folder of the run (default: the checkpoint's, or what --config says)")
    own.add_argument("--out", help=f"folder for the results (default: `{folder}` in the folder of the run)")
    own.add_argument("--untrained", action="store_true", help="take a network without --ckpt, as it was made")
    own.add_argument(
        "--part",
        metavar="I/N",
        help="only the I-th of N parts of the images, as the jobs of an array do; `diffclf merge` joins them",
    )
    own.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help="let the checkpoint's settings name any class and any address: like running a program of who made it",
    )
    return own


def _add_draws(own: argparse.ArgumentParser) -> None:
    own.add_argument(
        "--draws",
        type=int,
        help="draws of a diffusion classifier, all of them counted; cost grows with them (default: 10)",
    )


def _add_common(own: argparse.ArgumentParser) -> None:
    own.add_argument("--limit", type=int, help="only the first so many images (default: all)")
    own.add_argument("--seed", type=int, default=0, help="key of what is random, with the id of an image (default: 0)")


def _read(own: argparse.ArgumentParser, args: Sequence[str]) -> Namespace:
    known, flags = own.parse_known_args(list(args))
    if known.out is not None and (not known.out.strip() or "\0" in known.out):
        own.error(f"out: {known.out!r}, expected the name of a folder")
    if known.ckpt is None and not known.config:
        for name in (flag.partition("=")[0] for flag in flags):
            if similar(name, ("--ckpt", "--config")):
                raise UserError(unknown("option", name, ("--ckpt", "--config")))
        own.error("give --ckpt PATH, or --config FILE for a network that needs no training")
    return Namespace(**vars(known), flags=flags)


def _number(text: str) -> float:
    """A number, or a fraction such as 8/255."""
    try:
        return float(Fraction(text.strip())) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number such as 0.03 or 8/255") from error


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(_number, text.split(",")))
