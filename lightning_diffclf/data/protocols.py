"""What a data module may say besides its batches (:class:`~.batch.Batch`), and what it may ask: each is optional.

A data module that has the members of one of these protocols is asked for them by whom its docstring names. Check with
``isinstance``, which looks at names only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_diffclf.data.latents import Latents
from lightning_diffclf.data.prompts import PromptSet

DEFAULT_SIZE = (512, 512)  # Stable Diffusion's


@runtime_checkable
class HasClassNames(Protocol):
    """Asked by zero-shot networks, which make prompts of the names, and by the report."""

    @property
    def class_names(self) -> Sequence[str] | None:
        """Name of each class; None or empty if unknown."""
        ...


@runtime_checkable
class HasNumClasses(Protocol):
    """Asked by networks with classes of their own before training."""

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the training data; None if unknown."""
        ...


@runtime_checkable
class HasImageShape(Protocol):
    """Asked by the command line, where the settings of a network leave open what it works on."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image or a latent of the training data."""
        ...


@runtime_checkable
class HasNetworkClasses(Protocol):
    """Asked by networks with classes of their own, where the data have fewer (ImageNet-A, ObjectNet)."""

    @property
    def network_classes(self) -> list[list[int]] | None:
        """The network's classes that make up each class of the data; None if they are the same."""
        ...


@runtime_checkable
class HasPrompts(Protocol):
    """Asked by zero-shot networks; stands in place of their own prompts."""

    @property
    def prompt_set(self) -> PromptSet:
        """Every candidate with its prompt."""
        ...


@runtime_checkable
class HasLatents(Protocol):
    """Asked by networks on latents, to check shape and autoencoder before long work."""

    def latents(self, stage: str | None) -> Sequence[Latents]:
        """The folders of latents that a stage reads."""
        ...


@runtime_checkable
class HasTrainingImages(Protocol):
    """Asked by an evaluation whose proposal learns (:class:`~.classifier.search.FittedSearch`)."""

    def training_images(self, count: int) -> DataLoader[Any]:
        """Labelled images to learn from, on one process: not those that are evaluated, but prepared as they are.

        Args:
            count: At most so many: of more, some of all classes, the same ones each time. A loader that gives more is
                read until there are enough.

        Returns:
            Loader of batches with labels, as :func:`~.batch.unpack` takes them; not shuffled.
        """
        ...


@runtime_checkable
class HasNativeSize(Protocol):
    """A network, rather than a data module: asked by data modules that were given no size."""

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that it was trained on."""
        ...


@runtime_checkable
class HasPreparation(Protocol):
    """A network that wants images prepared in its own way: asked by data modules that were given no size."""

    @property
    def preparation(self) -> Callable[[Image.Image], Tensor]:
        """Takes an RGB image to (3, H, W), float32 in [-1, 1]; has an ``identity()``."""
        ...


def own_preparation(size: object, trainer: object) -> Callable[[Image.Image], Tensor] | None:
    """How the network of a Trainer wants images, where no ``size`` was given; None where it does not say."""
    network: object = getattr(trainer, "lightning_module", None)
    return network.preparation if size is None and isinstance(network, HasPreparation) else None


def own_size(size: tuple[int, int] | None, trainer: object) -> tuple[int, int]:
    """Height and width of images: as given, else as the network of a Trainer was trained on, else 512."""
    network: object = getattr(trainer, "lightning_module", None)
    return size or (network.native_size if isinstance(network, HasNativeSize) else DEFAULT_SIZE)


class Decided(Protocol):
    """The decision on one image, as far as the numbers of a data set may need it.

    Its id, and for each of its K candidates: index, mean error, and number of draws seen, (K,) each.
    """

    @property
    def id(self) -> str: ...

    @property
    def candidates_K(self) -> np.ndarray: ...

    @property
    def scores_K(self) -> np.ndarray: ...

    @property
    def draws_K(self) -> np.ndarray: ...


@runtime_checkable
class HasGroups(Protocol):
    """Asked by the evaluation where batches do not say ``group``: images of a patient, frames of a film, say."""

    def group_of(self, image_id: int | str) -> int | str | None:
        """What an image belongs to with others that are like it, so that intervals know; None if it stands alone."""
        ...


@runtime_checkable
class NeedsEveryDraw(Protocol):
    """Asked by the evaluation before it begins."""

    needs_every_draw: bool
    """Whether errors are compared across images or candidates, so that elimination and budget are refused."""


@runtime_checkable
class HasScore(Protocol):
    """Asked by the evaluation when all images are decided."""

    def score(self, rows: Sequence[Decided]) -> dict[str, float]:
        """Numbers of the data set's own, by name; none if no image of it counts."""
        ...
