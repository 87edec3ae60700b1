"""``diffclf classify``: photos and labels in, probabilities out."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from jsonargparse import Namespace

from lightning_diffclf.classifier import GradientSearch, Recipe
from lightning_diffclf.classify import RECIPE, classify, report
from lightning_diffclf.data.images import find_images
from lightning_diffclf.errors import check_at_least


def classify_command(given: Namespace) -> None:
    """``diffclf classify``: photos and labels in, probabilities out."""
    check_at_least(1, top=given.top)
    labels = [label.strip() for label in given.labels.split(",")]
    recipe = replace(RECIPE, **{field.name: given[field.name] for field in fields(Recipe) if field.name in given})
    if recipe.elimination is None:
        recipe = replace(recipe, elimination=RECIPE.elimination)
    if given.search:
        recipe = replace(recipe, proposal=GradientSearch())
    settings = ("model", "revision", "microbatch", "size", "device", "dtype", "calibration")
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
