"""What commands take: a function for each, from its arguments to their values.

No torch is imported, so that ``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

from jsonargparse import Namespace

from lightning_diffclf.classifier.elimination import Elimination
from lightning_diffclf.classifier.sequential import SequentialTest  # noqa: F401  (rules are named without a path)
from lightning_diffclf.commands.evaluation_arguments import attack as attack
from lightning_diffclf.commands.evaluation_arguments import certify as certify
from lightning_diffclf.commands.evaluation_arguments import evaluate as evaluate
from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.commands.results_arguments import compare as compare
from lightning_diffclf.commands.results_arguments import leaderboard as leaderboard
from lightning_diffclf.commands.results_arguments import merge as merge
from lightning_diffclf.commands.results_arguments import ood as ood
from lightning_diffclf.commands.results_arguments import replay as replay
from lightning_diffclf.commands.results_arguments import report as report
from lightning_diffclf.commands.results_arguments import reproduce as reproduce
from lightning_diffclf.commands.results_arguments import robustness as robustness
from lightning_diffclf.commands.results_arguments import suite as suite
from lightning_diffclf.hub import AUTOENCODER, TEXT_TO_IMAGE


def demo(args: Sequence[str]) -> Namespace:
    """Of ``diffclf demo``: its own, and ``flags``, which are those of ``fit``."""
    own = argparse.ArgumentParser(
        prog="diffclf demo",
        description="Train a small DiT on scikit-learn's handwritten digits, and classify the test digits with it: "
        "minutes on two CPU cores. The same command resumes where it was stopped.",
        epilog="All other flags are those of `diffclf fit`, such as --trainer.max_steps 100.",
        allow_abbrev=False,
    )
    own.add_argument("--run_dir", default="runs/dit_digits", help="folder for checkpoints, logs and results")
    known, flags = own.parse_known_args(list(args))
    return Namespace(**vars(known), flags=flags)


def configs(args: Sequence[str]) -> Namespace:
    """Of ``diffclf configs``."""
    parser = Parser(
        prog="diffclf configs",
        description="The configurations that come with this package: each is a whole experiment, which --config takes "
        "by its name; suites for `diffclf suite`, and jobs for SLURM, both to be copied first.",
    )
    parser.add_argument("--copy", metavar="NAME", type=str | None, default=None, help="write one to a file, to edit it")
    parser.add_argument("--out", type=str | None, default=None, help="the file (default: NAME, in this folder)")
    return parser.read(args)


def completion(args: Sequence[str]) -> Namespace:
    """Of ``diffclf completion``."""
    parser = Parser(
        prog="diffclf completion",
        description="Print a script with which TAB completes commands, options and names of configurations. It takes "
        "seconds, so keep it in a file: diffclf completion bash > "
        "~/.local/share/bash-completion/completions/diffclf, or, for zsh, a file _diffclf in a folder of $fpath.",
    )
    parser.add_argument("shell", type=Literal["bash", "zsh", "tcsh"], help="which shell")
    return parser.read(args)


def classify(args: Sequence[str]) -> Namespace:
    """Of ``diffclf classify``."""
    parser = Parser(
        prog="diffclf classify",
        description="Which label fits an image best, by a text-to-image model: the one whose prompt lets it predict "
        "noise in the image best; or, with --ckpt, by a network with classes of its own. LikelihoodRatio drops labels "
        "early, or --elimination. Probabilities "
        "are those of a softmax with --temperature; see docs/results.md.",
    )
    parser.add_argument("images", type=str, nargs="+", help="files, folders or patterns")
    parser.add_argument(
        "--labels",
        type=str | None,
        default=None,
        help='labels with commas between them: "cat,dog,horse"; of --ckpt: names or numbers of classes (default: all)',
    )
    parser.add_argument(
        "--ckpt",
        type=str | None,
        default=None,
        help="checkpoint of a training, or published weights of DiT, SiT, REPA-E, LightningDiT or EDM2: a file, or "
        "hf://OWNER/REPOSITORY/FILE",
    )
    parser.add_argument(
        "--family", type=str | None, default=None, help="of published weights that do not tell it: dit or sit"
    )
    parser.add_argument("--vae", type=str | None, default=None, help="autoencoder in place of the one of --ckpt")
    parser.add_argument(
        "--template", type=str, action="append", default=None, help="prompt; {} is the label; may be repeated"
    )
    parser.add_argument(
        "--model",
        type=str,
        default=TEXT_TO_IMAGE,
        help="folder or Hub repository of a diffusers pipeline",
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the repository")
    parser.add_argument("--top", type=int, default=5, help="labels to show")
    parser.add_argument("--draws", type=int, default=100, help="(t, noise) pairs for each image at most")
    parser.add_argument(
        "--grid",
        type=int | None,
        default=None,
        help="even grid of timesteps that draws are the first of (default: as many as draws)",
    )
    parser.add_argument(
        "--antithetic", type=bool, default=False, help="draws in pairs, with opposite noise at one timestep"
    )
    parser.add_argument("--seed", type=int, default=0, help="key of the noise")
    parser.add_argument("--loss", type=str, default="l2", help="l2, l1, huber, kl, nll, or several joined by +")
    parser.add_argument(
        "--elimination",
        type=Elimination | None,
        default=None,
        help="rule that drops labels early (default: LikelihoodRatio with inflation 5)",
    )
    parser.add_argument(
        "--weights",
        type=str | list[float],
        default="uniform",
        help="what the draws weigh: uniform, sample, velocity, clark_jaini, or a number for each draw",
    )
    parser.add_argument("--budget", type=int | None, default=None, help="network calls for one image at most")
    parser.add_argument(
        "--abstain", type=float, default=0.0, help="margin in nats below which an answer counts as not given"
    )
    parser.add_argument(
        "--ensemble",
        type=Literal["best", "mean"],
        default="mean",
        help="what counts of several prompts of a label: the best one, or the mean of their errors",
    )
    parser.add_argument(
        "--reduction", type=Literal["mean", "sum"], default="sum", help="how probabilities are read off scores"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of the probabilities")
    parser.add_argument(
        "--coverage",
        type=float | None,
        default=None,
        help="also print a set of labels that contains the right one for this share of images (0.9); needs "
        "--calibration",
    )
    parser.add_argument(
        "--coverage_by_class", action="store_true", help="let that hold for the images of each label by themselves"
    )
    parser.add_argument(
        "--calibration",
        type=str | None,
        default=None,
        help="folder of an evaluation of other labelled images by the same network, labels, prompts and recipe",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="first find the labels worth trying, by the gradient of the error by the prompts (GradientSearch): pays "
        "where labels are many; a label that it leaves out has probability 0",
    )
    parser.add_argument("--microbatch", type=int, default=32, help="rows of a network call")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images (default: the model's own)")
    parser.add_argument("--device", type=str, default="auto", help="cuda, cpu, …")
    parser.add_argument("--dtype", type=str, default="auto", help="float32, float16, bfloat16")
    parser.add_argument("--skip-bad", action="store_true", help="go on where an image cannot be read")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plots", type=str | None, default=None, help="folder for pictures with bars")
    return parser.read(args)


def app(args: Sequence[str]) -> Namespace:
    """Of ``diffclf app``."""
    parser = Parser(
        prog="diffclf app",
        description="A page in the browser: drop a picture, type labels, and watch them fall draw by draw. It needs no "
        "network; a tiny model of handwritten digits comes with the package. Ctrl-C ends it.",
    )
    parser.add_argument(
        "--ckpt", type=str, action="append", default=[], help="checkpoint of a training; may be repeated"
    )
    parser.add_argument(
        "--model",
        type=str,
        action="append",
        default=[],
        help="folder or Hub repository of a text-to-image pipeline of diffusers; may be repeated",
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the repositories")
    parser.add_argument("--template", type=str, default="a photo of a {}", help="prompt; {} is the label")
    parser.add_argument("--vae", type=str | None, default=None, help="autoencoder in place of the checkpoints' own")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to serve; 0.0.0.0 is for everybody")
    parser.add_argument("--port", type=int, default=7860, help="port to serve; 0 is any that is free")
    parser.add_argument("--device", type=str, default="auto", help="cuda, cpu, …")
    parser.add_argument("--dtype", type=str, default="auto", help="of pipelines: float32, float16, bfloat16")
    return parser.read(args)


def shards(args: Sequence[str]) -> Namespace:
    """Of ``diffclf shards``."""
    parser = Parser(
        prog="diffclf shards",
        description="Pack a folder of images, one folder for each class, into tar shards in webdataset's layout. "
        "Images go in as they are, in random order. The same command resumes where it was stopped.",
    )
    parser.add_argument("--data", type=str, required=True, help="folder with a folder of images for each class")
    parser.add_argument("--out", type=str, required=True, help="folder for the shards")
    parser.add_argument("--images_per_shard", type=int, default=1000, help="images in one shard")
    parser.add_argument("--processes", type=int, default=4, help="shards that are written at a time")
    parser.add_argument("--seed", type=int | None, default=0, help="of the order; null keeps that of the folder")
    return parser.read(args)


def encode(args: Sequence[str]) -> Namespace:
    """Of ``diffclf encode``."""
    parser = Parser(
        prog="diffclf encode",
        description="Make latents of a folder of images or of tar shards, once: of each image and its mirror image, "
        "the mean and standard deviation of the autoencoder's posterior, in float16. Runs on several devices, also "
        "under torchrun or srun; the same command resumes where it stopped. At the end all is read back and checked.",
    )
    parser.add_argument("--data", type=str, required=True, help="folder with a folder for each class, or tar shards")
    parser.add_argument("--out", type=str, required=True, help="folder for the latents")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--vae", type=str, default=AUTOENCODER, help="folder or Hub repository of the autoencoder")
    parser.add_argument("--batch_size", type=int, default=32, help="images that are encoded at once")
    parser.add_argument("--num_workers", type=int, default=4, help="processes that read images, for each device")
    parser.add_argument("--accelerator", type=str, default="auto", help="gpu, cpu, …")
    parser.add_argument("--devices", type=int, default=1, help="devices of this machine")
    parser.add_argument("--num_nodes", type=int, default=1, help="machines, under srun or torchrun")
    return parser.read(args)


def export(args: Sequence[str]) -> Namespace:
    """Of ``diffclf export``."""
    parser = Parser(
        prog="diffclf export",
        description="Write a trained DiT as a DiTPipeline folder of diffusers, to publish or to sample from.",
    )
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of a training, or published weights of DiT")
    parser.add_argument("--out", type=str, required=True, help="folder for the pipeline; new or empty")
    parser.add_argument(
        "--vae", type=str | None, default=None, help=f"autoencoder (default: the network's own, else {AUTOENCODER})"
    )
    parser.add_argument(
        "--weights",
        type=Literal["ema", "raw"],
        default="ema",
        help="the average, if there is one, or those in training",
    )
    return parser.read(args)


def fid(args: Sequence[str]) -> Namespace:
    """Of ``diffclf fid``."""
    parser = Parser(
        prog="diffclf fid",
        description="FID, Inception Score, precision and recall of generated images with regard to real ones. What is "
        "needed of the real ones is kept in a file beside their folder.",
    )
    parser.add_argument("folder", type=str, help="generated images, also in folders below")
    parser.add_argument(
        "--reference",
        type=str,
        required=True,
        help="folder of real images; or a .npz that was kept of them, or one with mu and sigma (then FID only)",
    )
    parser.add_argument(
        "--size", type=int | None, default=None, help="crop real images to this many pixels, as for training"
    )
    parser.add_argument(
        "--stats", type=str | None, default=None, help="what is kept of real images (default: FOLDER.fid.npz)"
    )
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="file of the Inception network (default: it is downloaded)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")
    parser.add_argument("--device", type=str, default="auto", help="cuda, cpu, …")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.read(args)


def sample(args: Sequence[str]) -> Namespace:
    """Of ``diffclf sample``."""
    parser = Parser(
        prog="diffclf sample",
        description="Generate images of given classes, by a trained class-conditional network or by a text-to-image "
        "model and prompts. An image depends on seed, class and number only, not on batch size or devices. Into a "
        "folder, the same command resumes where it was stopped; a classifier can be trained on it (docs/baselines.md).",
    )
    parser.add_argument(
        "--ckpt",
        type=str | None,
        default=None,
        help="checkpoint (its averaged weights), or published ones: DiT, SiT, REPA-E, LightningDiT, EDM2",
    )
    parser.add_argument(
        "--model",
        type=str | None,
        default=None,
        help="in its place, a folder or Hub repository of a text-to-image pipeline of diffusers",
    )
    parser.add_argument(
        "--labels",
        type=str | None,
        default=None,
        help='classes of --model: "cat,dog,horse"; @pets: those of a public set in data/, @NAME:ROOT: in ROOT',
    )
    parser.add_argument(
        "--prompts",
        type=str,
        action="append",
        default=None,
        help="prompt of --model, {} is the label, may be repeated (the images of a class take them in turn); or a CSV "
        "file (prompt,classname,classidx) in place of labels (default: a photo of a {}.)",
    )
    parser.add_argument("--out", type=str, required=True, help="a .png or .jpg for a grid, else a folder")
    parser.add_argument("--classes", type=str, default="all", help="names or numbers with commas between them, or all")
    parser.add_argument("--per_class", type=int, default=8, help="images of each class")
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="1 is no guidance")
    parser.add_argument(
        "--guided_channels", type=int | None, default=None, help="channels that are guided (3 as published for DiT)"
    )
    parser.add_argument("--steps", type=int, default=50, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="key of the noise")
    parser.add_argument("--batch_size", type=int, default=32, help="images that are generated at once on a device")
    parser.add_argument(
        "--vae", type=str | None, default=None, help=f"autoencoder (default: the network's own, else {AUTOENCODER})"
    )
    parser.add_argument("--schedule", type=str, default="linear", help="of published weights; sit for those of SiT")
    parser.add_argument("--accelerator", type=str, default="auto", help="gpu, cpu, …")
    parser.add_argument("--devices", type=int, default=1, help="devices of this machine")
    parser.add_argument("--num_nodes", type=int, default=1, help="machines, under srun or torchrun")
    parser.add_argument(
        "--precision", type=Literal["32-true", "bf16-mixed", "16-mixed"], default="32-true", help="of the network"
    )
    return parser.read(args)
