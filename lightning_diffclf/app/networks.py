"""The networks that the page offers: what each can be asked about, and how a picture becomes what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lightning_diffclf.classifier import (
    DiffusionClassifier,
    Elimination,
    Exhaustive,
    LikelihoodRatio,
    PairedTest,
    Stages,
)
from lightning_diffclf.commands.mistakes import unknown
from lightning_diffclf.data.digit_scenes import WORDS
from lightning_diffclf.data.images import transform
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.pipeline import PipelineDenoiser, load
from lightning_diffclf.trained import open_network
from lightning_diffclf.zero_shot import LATENT_INFLATION, RECIPE, asked, placed

TINY = "assets/sd_digits"

MICROBATCH = 32

RULES = {
    "LikelihoodRatio": "drops a label as soon as the noise in its errors cannot explain how far it is behind",
    "PairedTest": "drops a label when a paired test of its errors says so; for any loss",
    "Stages": "the paper's: all labels for a tenth of the draws, the best few for the rest",
    "Exhaustive": "every label sees every draw: what all other rules are judged by",
}


def rule_of(name: str, draws: int, num_candidates: int, inflation: float) -> Elimination:
    """A rule of :data:`RULES` as it is used for so many draws and candidates.

    Raises:
        ValueError: if there is no such rule, or it makes no sense of so few draws.
    """
    if name == "LikelihoodRatio":
        return LikelihoodRatio(inflation=inflation)
    if name == "PairedTest":
        return PairedTest()
    if name == "Stages":
        return Stages((max(1, draws // 10), draws), (5 if num_candidates >= 10 else (num_candidates + 1) // 2, 1))
    if name == "Exhaustive":
        return Exhaustive()
    raise UserError(unknown("rule", name, RULES))


class Network(Protocol):
    """One entry of the page's menu.

    Attributes:
        name: As it was given.
        kind: What it is, in a few words.
        classes: What it can be asked about; None for any labels.
        labels: What it is asked about at first.
        size: Height and width in pixels of what it sees.
        device: Where it runs.
    """

    name: str
    kind: str
    classes: Sequence[str] | None
    labels: Sequence[str]
    size: tuple[int, int]
    device: torch.device

    def classifier(self, labels: Sequence[str], rule: str, draws: int) -> DiffusionClassifier:
        """Decides between labels; raises ValueError if it cannot be asked about them."""

    def pixels(self, image: Image.Image) -> Tensor:
        """An image in RGB as it sees it: (C, H, W) in [-1, 1]."""


class TextToImage:
    """A text-to-image model, which any labels can be asked of.

    Args:
        name: Folder or Hub repository of a diffusers pipeline.
        template: Prompt; ``{}`` is the label.
        device: As in :func:`~lightning_diffclf.pipeline`.
        dtype: Likewise.
        revision: Branch, tag or commit of the repository.

    Raises:
        ValueError: if it cannot be loaded, or the template has no ``{}``.
    """

    classes: Sequence[str] | None = None

    def __init__(
        self,
        name: str = TINY,
        template: str = "a photo of a {}",
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
    ) -> None:
        self.name, self._template = name, template
        self.device, kind = placed(device, dtype)
        self._pipeline = load(name, revision, kind)
        self.labels: Sequence[str] = WORDS if name == TINY else ("cat", "dog", "horse")
        self._denoiser = self._asked(self.labels)
        self.size = self._denoiser.native_size
        about = "a tiny model of handwritten digits" if name == TINY else "text to image"
        self.kind = f"{about}; sees {self.size[0]} × {self.size[1]} pixels"

    def _asked(self, labels: Sequence[str]) -> PipelineDenoiser:
        return asked(self._pipeline, labels, self._template, keep_texts=True)

    def classifier(self, labels: Sequence[str], rule: str, draws: int) -> DiffusionClassifier:
        if list(labels) != list(self._denoiser.candidates.class_names):  # prompts of the last ones stay embedded
            self._denoiser = self._asked(labels)
        elimination = rule_of(rule, draws, len(labels), LATENT_INFLATION)
        recipe = replace(RECIPE, draws=draws, elimination=elimination)
        return DiffusionClassifier(self._denoiser, recipe, microbatch=MICROBATCH)

    def pixels(self, image: Image.Image) -> Tensor:
        return transform(*self.size)(image)


class ClassConditional:
    """A network with classes of its own, which can be asked about them, or some of them.

    Args:
        name: Checkpoint that ``fit`` wrote, or weights that others published, where these tell their family.
        vae: Autoencoder in place of its own.
        device: As in :func:`~lightning_diffclf.pipeline`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, or works on latents without an autoencoder.
    """

    def __init__(self, name: str, vae: str | None = None, device: str = "auto") -> None:
        self.name, self.device = name, placed(device)[0]
        self._network = network = open_network(name, self.device, vae)
        self.classes: Sequence[str] | None = network.module.candidates.names
        self.labels: Sequence[str] = network.module.candidates.names
        self.size = network.size
        height, width = self.size
        self.kind = f"trained on {len(self.labels):,} classes; sees {height} × {width} pixels" + ", grey" * (
            network.channels == 1
        )

    def classifier(self, labels: Sequence[str], rule: str, draws: int) -> DiffusionClassifier:
        known = list(self.labels)
        for position, label in enumerate(labels):
            if label not in known:
                raise UserError(f"labels: {unknown('class', label, known)}; expected some that it was trained on")
            if label in labels[:position]:
                raise UserError(f"labels: {label!r} occurs twice")
        recipe = replace(
            self._network.recipe,
            draws=draws,
            elimination=rule_of(rule, draws, len(labels), self._network.inflation),
            candidates=[known.index(label) for label in labels],
        )
        return DiffusionClassifier(self._network.module, recipe, microbatch=MICROBATCH)

    def pixels(self, image: Image.Image) -> Tensor:
        return self._network.prepare(image)
