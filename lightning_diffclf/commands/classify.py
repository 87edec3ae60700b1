"""``diffclf classify``: photos and labels in, probabilities out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from jsonargparse import Namespace

from lightning_diffclf.classifier import GradientSearch, Recipe
from lightning_diffclf.classify import calibrated_by, classify, report
from lightning_diffclf.data.images import find_images
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.zero_shot import RECIPE, ZeroShotClassifier, pipeline

OF_PROMPTS = ("template", "revision", "size")  # which only text-to-image models have


def classify_command(given: Namespace) -> None:
    """``diffclf classify``: photos and labels in, probabilities out."""
    check_at_least(1, top=given.top)
    recipe = replace(RECIPE, **{field.name: given[field.name] for field in fields(Recipe) if field.name in given})
    if given.search:
        recipe = replace(recipe, proposal=GradientSearch())

    def load() -> ZeroShotClassifier:
        if given.ckpt is None:
            return _of_prompts(given, recipe)
        from lightning_diffclf.trained import class_conditional  # slow to import

        how = {name: given[name] for name in ("family", "vae", "device", "microbatch")}
        return class_conditional(given.ckpt, given.labels or "all", recipe, **how)

    if given.ckpt is not None:
        strange = [name for name in OF_PROMPTS if given[name] is not None] + ["dtype"] * (given.dtype != "auto")
        if strange:
            raise UserError(f"{strange[0]}: given, but --ckpt is of a network with classes of its own, without prompts")
    elif given.labels is None:
        raise UserError(
            "labels: none given, expected labels with commas between them, or --ckpt of a network with its own"
        )
    answers = classify(given.images, load, given.skip_bad, calibrated_by(recipe, given.calibration))
    plots = None if given.plots is None else Path(given.plots)
    report(answers, len(find_images(given.images)), given.top, given.json, plots)


def _of_prompts(given: Namespace, recipe: Recipe) -> ZeroShotClassifier:
    """Of a text-to-image model and labels."""
    labels = [label.strip() for label in given.labels.split(",")]
    recipe = replace(recipe, elimination=recipe.elimination or RECIPE.elimination)
    templates = given.template or ["a photo of a {}."]
    settings = {name: given[name] for name in ("revision", "device", "dtype", "size", "microbatch")}
    return pipeline(given.model, labels, templates=templates, recipe=recipe, **settings)
