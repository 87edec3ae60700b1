"""One decision, told as it is made: what each draw brought, who has won, where in the picture."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_diffclf.app.networks import Network
from lightning_diffclf.classifier import Classification, DiffusionClassifier, Landed
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.images import decode_image
from lightning_diffclf.errors import UserError
from lightning_diffclf.progress import listening
from lightning_diffclf.results.error_maps import error_map
from lightning_diffclf.results.one_image import data_uri, error_map_picture

Event = dict[str, Any]
"""What is told, as JSON has it; ``kind`` says what it is."""

MAP_DRAWS = 16

MOST_DRAWS = 10_000


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        picture: An image file.
        labels: Labels with commas or line breaks between them; empty for all classes of the network.
        rule: Name of the rule.
        draws: Draws at most.
        error_map: Whether to show where in the picture the winner is better than its closest rival.
    """

    picture: bytes
    labels: str
    rule: str
    draws: int
    error_map: bool = True


def labels_of(text: str, network: Network) -> list[str]:
    """What is asked about.

    Raises:
        ValueError: if there are fewer than two.
    """
    labels = [label.strip() for line in text.splitlines() for label in line.split(",") if label.strip()]
    if not labels and network.classes is not None:
        return list(network.classes)
    if len(labels) < 2:
        found = f"only {labels[0]!r}" if labels else "none"
        raise UserError(f"labels: {found}, expected at least two, with commas between them")
    return labels


def decide(network: Network, question: Question, tell: Callable[[Event], None]) -> None:
    """Decide, and tell it event by event.

    The kinds are ``progress``, ``asked``, ``landed`` (:class:`~lightning_diffclf.classifier.Landed`), ``decided`` and
    ``map``.

    Args:
        network: Whom to ask.
        question: What to ask.
        tell: Takes events; it may raise, which ends the decision.

    Raises:
        ValueError: if the question makes no sense, before any network call.
    """
    if not 1 <= question.draws <= MOST_DRAWS:
        raise UserError(f"draws: {question.draws:,}, expected 1 to {MOST_DRAWS:,}")
    labels = labels_of(question.labels, network)
    if not question.picture:
        raise UserError("picture: none given, expected an image file")
    image = decode_image(io.BytesIO(question.picture), "picture")
    classifier = network.classifier(labels, question.rule, question.draws)
    pixels = network.pixels(image)
    names, draws = classifier.denoiser.candidates.names, len(classifier.timesteps_S)
    position = {int(k): i for i, k in enumerate(classifier.recipe.candidates or range(len(names)))}
    tell(
        {
            "kind": "asked",
            "names": [names[k] for k in position],
            "draws": draws,
            "weights": classifier.terms.weights_S.tolist(),
            "picture": data_uri("png", png_of(pixels)),
        }
    )

    def watch(landed: Landed) -> None:
        errors = [[_number(value) for value in errors_P] for errors_P in landed.errors_RP.tolist()]
        who = [position[k] for k in landed.candidates_P.tolist()]
        tell({"kind": "landed", "first": landed.first, "candidates": who, "errors": errors, "nfe": landed.nfe})

    with listening(lambda what, done, total: tell({"kind": "progress", "what": what, "done": done, "total": total})):
        images, start = pixels[None].to(network.device), time.perf_counter()
        run = classifier.run(watch)
        run.add(images, content_ids(images))
        [result] = run.finish()
        tell(_decided(result, position, time.perf_counter() - start))
        if question.error_map and result.candidate is not None and len(result.ranking) > 1:
            tell({"kind": "map"} | _map(classifier, result, images[0]))


def _decided(result: Classification, position: dict[int, int], seconds: float) -> Event:
    draws = dict.fromkeys(position.values(), 0)  # of those that a search left out
    draws |= {position[k]: n for k, n in zip(result.candidates_K.tolist(), result.draws_K.tolist(), strict=True)}
    return {
        "kind": "decided",
        "winner": None if result.candidate is None else position[result.candidate],
        "probabilities": dict(result.top(len(position))),
        "draws": [draws[i] for i in range(len(position))],
        "nfe": result.nfe,
        "seconds": seconds,
    }


def _map(classifier: DiffusionClassifier, result: Classification, image: Tensor) -> Event:
    """Where the winner predicts the noise better (red) or worse (blue) than its closest rival."""
    first, second = (int(result.candidates_K[i]) for i in result.ranking[:2])
    winner, rival = error_map(classifier, image, result.image_id, [first, second], MAP_DRAWS)
    names = classifier.denoiser.candidates.names
    calls = 2 * min(MAP_DRAWS, len(classifier.timesteps_S))
    picture = data_uri("png", error_map_picture((rival - winner).numpy()))
    return {"picture": picture, "winner": names[first], "rival": names[second], "nfe": calls}


def png_of(pixels: Tensor) -> bytes:
    """Pixels (1 or 3, H, W) in [-1, 1] as a PNG."""
    file = io.BytesIO()
    image: Image.Image = functional.to_pil_image(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    image.save(file, "PNG")
    return file.getvalue()


def _number(value: float) -> float | None:
    """A number that JSON has."""
    return value if math.isfinite(value) else None


def scenes_of_digits(labels: Sequence[int] = range(10)) -> list[bytes]:
    """For each label one of the handwritten test digits, in the middle of 8 × 16 pixels, as PNG."""
    from lightning_diffclf.data.digit_scenes import HEIGHT, WIDTH, one_digit
    from lightning_diffclf.data.digits import DigitsDataModule

    data = DigitsDataModule()
    data.setup("test")
    digits, known = data.test.parts["image"], data.test.parts["label"].tolist()
    chosen = torch.stack([digits[known.index(label)] for label in labels])
    middle = torch.full((len(chosen),), (WIDTH - HEIGHT) // 2)
    return [png_of(scene) for scene in one_digit(chosen, middle)]
