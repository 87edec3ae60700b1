"""What a checkpoint of a training classifies with: its network, and the recipe in its settings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_diffclf.classifier import Recipe
from lightning_diffclf.classifier.from_checkpoint import FromCheckpoint
from lightning_diffclf.cli import CONFIG_KEY, settings_of
from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.errors import WrongType
from lightning_diffclf.modules.checkpoints import module_of, read_checkpoint

RECIPE = [field.name for field in fields(Recipe)]

C = TypeVar("C", bound=FromCheckpoint)


def trained_classifier(cls: type[C], path: Path, *, vae: str | None, raw: bool, settings: Mapping[str, Any]) -> C:
    """A classifier of a checkpoint; see :meth:`~.classifier.DiffusionClassifier.from_checkpoint`."""
    others = [name for name in inspect.signature(cls).parameters if name not in ("denoiser", "recipe")]
    for name in settings:
        if name not in [*RECIPE, *others]:
            raise WrongType(f"from_checkpoint: {unknown('argument', name, [*RECIPE, *others])}")
    checkpoint = read_checkpoint(path)
    module = module_of(checkpoint, path, vae, raw).eval()
    own = recipe_of(checkpoint, path) if CONFIG_KEY in checkpoint else Recipe()
    recipe = replace(own, **{name: value for name, value in settings.items() if name in RECIPE})
    make: Any = cls
    classifier: C = make(module, recipe, **{name: one for name, one in settings.items() if name not in RECIPE})
    return classifier


def recipe_of(checkpoint: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe in the settings of a checkpoint read from ``path``, which may name classes of this package only.

    Raises:
        ValueError: if the settings cannot be read, or say what they may not.
    """
    kept = yaml.safe_load(settings_of(checkpoint, path)).get("classifier") or {}
    parser = Parser()
    parser.add_class_arguments(Recipe, "recipe")
    parsed = parser.parse_object({"recipe": {name: kept[name] for name in RECIPE if name in kept}})
    recipe: Recipe = parser.instantiate_classes(parsed).recipe
    return recipe
