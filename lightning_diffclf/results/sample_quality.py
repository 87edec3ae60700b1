"""How good generated images are: FID, Inception Score, precision and recall, from features of a network.

FID (Heusel et al. 2017) is the Fréchet distance between two Gaussians fitted to the features of generated and of real
images; the Inception Score (Salimans et al. 2016) is exp of the mean divergence of the classes of an image from those
of all; both are torchmetrics'. Precision is the share of generated images that lie on the manifold of the real ones,
recall the reverse, where a manifold is the union of balls around each point that reach to its k-th neighbour
(Kynkäänniemi et al. 2019).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from lightning_diffclf.data.images import find_images, open_image

NEIGHBOURS = 3  # k of precision and recall, as published
CHUNK = 2048  # rows whose distances to all others are in memory at once
SPLITS = 10  # of the Inception Score, as usual
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = 50_000  # images with which FID is reported; with few, it is biased upwards

Extractor = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W) uint8 to features (B, D) and class logits (B, C)."""


@dataclass(frozen=True)
class Features:
    """Features of a set of images: ``values`` (N, D) and ``logits`` (N, C), float32 on the CPU."""

    values: Tensor
    logits: Tensor


@dataclass(frozen=True)
class SampleQuality:
    """What :func:`sample_quality` finds.

    Attributes:
        images: Number of generated images.
        reference_images: Number of real images.
        fid: Fréchet distance, 0 … ∞, lower is better.
        inception_score: 1 … number of classes, higher is better; None for fewer images than splits.
        precision: 0 … 1.
        recall: 0 … 1.
    """

    images: int
    reference_images: int
    fid: float
    inception_score: float | None
    precision: float
    recall: float


class _AsTheyAre(nn.Module):
    """Tells torchmetrics that features are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


def inception(weights: str | None, device: torch.device) -> Extractor:
    """The Inception network that FID is defined with: its 2,048 pooled features and its 1,008 logits.

    Args:
        weights: The file :data:`INCEPTION` of torch-fidelity; downloaded if omitted.
        device: Where it runs.

    Raises:
        ValueError: if torch-fidelity is not installed, or the weights cannot be had.
    """
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"weights: no file {weights!r}, expected {INCEPTION} of torch-fidelity")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    except ImportError as error:
        raise ValueError("fid: torch-fidelity is not installed; pip install 'lightning-diffclf[fid]'") from error
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"fid: the weights of the Inception network could not be had ({str(error).splitlines()[0]}). Download "
            f"{INCEPTION} from the releases of torch-fidelity and give it as --weights"
        ) from error
    network = network.eval().to(device)

    @torch.no_grad()
    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        values, logits = network(images.to(device))
        return values, logits

    return extract


def find_pictures(folder: str) -> list[Path]:
    """Image files in a folder and below, in order.

    Raises:
        ValueError: if there are fewer than 2.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"images: no folder {folder!r}")
    found = find_images([folder])
    if len(found) < 2:
        raise ValueError(f"images: {len(found)} in {folder!r}, expected at least 2")
    return found


def features_of(paths: Sequence[Path], extract: Extractor, batch_size: int = 64) -> Iterator[Features]:
    """Features of images, batch by batch. Images of different sizes do not share a batch.

    Raises:
        ValueError: if one cannot be read.
    """
    waiting: list[Tensor] = []

    def done() -> Features:
        values, logits = extract(torch.stack(waiting))
        waiting.clear()
        return Features(values.float().cpu(), logits.float().cpu())

    for path in paths:
        image = torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1)
        if waiting and (len(waiting) == batch_size or image.shape != waiting[0].shape):
            yield done()
        waiting.append(image)
    if waiting:
        yield done()


def joined(parts: Sequence[Features]) -> Features:
    """Several sets as one."""
    return Features(torch.cat([p.values for p in parts]), torch.cat([p.logits for p in parts]))


def sample_quality(generated: Features, real: Features) -> SampleQuality:
    """All numbers, from features of generated and of real images."""
    width = generated.values.shape[1]
    fid = FrechetInceptionDistance(feature=_AsTheyAre(width)).set_dtype(torch.float64)
    for features, is_real in ((real, True), (generated, False)):
        for values in features.values.double().split(CHUNK):
            fid.update(values, real=is_real)
    score = None
    if len(generated.logits) >= SPLITS:
        inception_score = InceptionScore(feature=_AsTheyAre(generated.logits.shape[1]), splits=SPLITS)
        state = torch.random.get_rng_state()
        torch.manual_seed(0)  # the score shuffles images into its splits
        inception_score.update(generated.logits)
        score = float(inception_score.compute()[0])
        torch.random.set_rng_state(state)
    precision, recall = precision_recall(generated.values, real.values)
    return SampleQuality(len(generated.values), len(real.values), float(fid.compute()), score, precision, recall)


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall of generated features (N, D) with regard to real ones (M, D).

    Raises:
        ValueError: if there are no more images than ``neighbours``.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= neighbours:
            raise ValueError(f"{name}: {len(features)} images, expected more than {neighbours}")
    return _share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points within the ball of any point of the manifold."""
    radii = torch.cat(
        # the nearest one is the point itself
        [torch.cdist(some, manifold).kthvalue(neighbours + 1, dim=1).values for some in manifold.split(CHUNK)]
    )
    inside = [(torch.cdist(some, manifold) <= radii).any(1) for some in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


# --- features that are kept ----------------------------------------------------------------------------------------


def cache_file(paths: Sequence[Path], folder: str) -> Path:
    """Where features of a folder's images are kept: beside it, under a name that changes with any of its files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    root = Path(folder).resolve()
    return root.with_name(f"{root.name}.features-{digest.hexdigest()}.npz")


def save_features(features: Features, path: Path) -> None:
    """Write features, whole or not at all."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        np.savez(file, values=features.values.numpy(), logits=features.logits.numpy())
    os.replace(temporary, path)


def load_features(path: Path) -> Features:
    """Read features.

    Raises:
        ValueError: if the file cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return Features(torch.from_numpy(file["values"]), torch.from_numpy(file["logits"]))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"reference: {str(path)!r} cannot be read ({error}); remove it") from error
