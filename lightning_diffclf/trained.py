"""What a checkpoint of a training, or published weights, classify with: network, recipe, and how it sees images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from PIL import Image
from torch import Tensor

from lightning_diffclf.classifier import DiffusionClassifier, LikelihoodRatio, Recipe
from lightning_diffclf.classifier.from_checkpoint import FromCheckpoint
from lightning_diffclf.cli import CONFIG_KEY, settings_of
from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.data.images import transform
from lightning_diffclf.errors import MissingFile, UserError, WrongType
from lightning_diffclf.hub import local_file
from lightning_diffclf.models.published import is_published
from lightning_diffclf.modules.checkpoints import module_of, read_checkpoint
from lightning_diffclf.modules.conditions import chosen_classes
from lightning_diffclf.modules.published_network import PublishedNetwork
from lightning_diffclf.zero_shot import LATENT_INFLATION, ZeroShotClassifier, placed

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


@dataclass(frozen=True)
class ClassNetwork:
    """A network with classes of its own, ready to be asked about photos.

    Attributes:
        module: A ConditionalDenoiser whose candidates are its classes: a ClassConditionalDiT or a PublishedNetwork.
        recipe: What it was evaluated with in training; the default one where that is not known.
        size: Height and width in pixels of what it sees.
        channels: Channels of that, 1 or 3.
        inflation: Of :class:`LikelihoodRatio`: residuals of latents are correlated.
    """

    module: Any
    recipe: Recipe
    size: tuple[int, int]
    channels: int
    inflation: float

    def prepare(self, image: Image.Image) -> Tensor:
        """An image in RGB as it sees it (C, H, W): cropped as in training, or, if not square, so that it is covered."""
        crop = transform(*self.size, crop="published" if self.size[0] == self.size[1] else "covering")
        return crop(image.convert("L") if self.channels == 1 else image)


def open_network(
    name: str | Path, device: torch.device, vae: str | None = None, family: str | None = None
) -> ClassNetwork:
    """A network of a checkpoint that ``fit`` wrote, with averaged weights, or of published weights.

    Args:
        name: The file; a folder of diffusers with a DiT, or ``hf://OWNER/REPOSITORY/FILE``.
        device: Where it will run.
        vae: Autoencoder in place of its own.
        family: Of published weights; see :mod:`~lightning_diffclf.models.families`.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it cannot be read, or works on latents without an autoencoder.
    """
    path = local_file(name)
    if not path.exists():
        raise MissingFile(f"checkpoint: no file {str(name)!r}")
    if is_published(path):
        published = PublishedNetwork(weights=str(path), family=family, vae=vae)  # type: ignore[arg-type]
        inflation = 1.0 if published.autoencoder is None else LATENT_INFLATION
        return ClassNetwork(published, Recipe(), published.native_size, 3, inflation)
    if family is not None:
        raise UserError(
            f"family: {family!r} given, but {str(name)!r} is the checkpoint of a training, which says it all"
        )
    trained = trained_classifier(DiffusionClassifier, path, vae=vae, raw=False, settings={})
    module: Any = trained.denoiser
    channels, height, width = module.image_shape
    if module.hparams["latents"]:
        if module.hparams["vae"] is None:
            raise UserError(f"vae: none given, but {str(name)!r} works on latents; expected --vae, an autoencoder")
        factor = module.autoencoder.factor
        channels, height, width = 3, height * factor, width * factor
    inflation = LATENT_INFLATION if module.hparams["latents"] else 1.0
    return ClassNetwork(module.to(device), trained.recipe, (height, width), channels, inflation)


def class_conditional(
    name: str,
    labels: str,
    recipe: Recipe,
    *,
    family: str | None = None,
    vae: str | None = None,
    device: str = "auto",
    microbatch: int = 32,
) -> ZeroShotClassifier:
    """An image classifier of a network with classes of its own.

    Args:
        name: See :func:`open_network`.
        labels: The classes in question by name or number, with commas between them, or ``all``.
        recipe: What decides results; without a rule, :class:`LikelihoodRatio` as it suits the network.
        family: See :func:`open_network`.
        vae: See :func:`open_network`.
        device: ``auto`` is the GPU if there is one.
        microbatch: Rows of a network call.

    Raises:
        FileNotFoundError: if the network is not there.
        ValueError: if it cannot be read, or has no such class.
    """
    place = placed(device)[0]
    network = open_network(name, place, vae, family)
    names = network.module.candidates.names
    chosen = chosen_classes(labels, names, "labels")
    rule = recipe.elimination or LikelihoodRatio(inflation=network.inflation)
    # A class has one candidate, so that ensembles do not matter: of all classes, the recipe is that of an evaluation.
    some = None if chosen == list(range(len(names))) else chosen
    recipe = replace(recipe, elimination=rule, candidates=some, ensemble=Recipe.ensemble)
    classifier = DiffusionClassifier(network.module, recipe, microbatch=microbatch)
    return ZeroShotClassifier(classifier, place, network.size, network.prepare)
