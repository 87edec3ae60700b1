"""How good generated images are: FID, Inception Score, precision and recall, from features of a network.

FID (Heusel et al. 2017) is the Fréchet distance between two Gaussians fitted to the features of generated and of real
images; the Inception Score (Salimans et al. 2016) is exp of the mean divergence of the classes of an image from those
of all, by torchmetrics. Precision is the share of generated images that lie on the manifold of the real ones,
recall the reverse, where a manifold is the union of balls around each point that reach to its k-th neighbour
(Kynkäänniemi et al. 2019).
"""

from __future__ import annotations

import hashlib
import math
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore

from lightning_diffclf.data.images import find_images, open_image, published_crop
from lightning_diffclf.errors import UserError, first_line
from lightning_diffclf.files import replacing

NEIGHBOURS = 3  # k of precision and recall, as published
CHUNK = 2048  # rows whose distances to all others are in memory at once
SPLITS = 10  # of the Inception Score, as usual
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # or pt_inception-…, the same file
MAX_ARRAY = 2**31  # bytes of an array in a file of references

PUBLISHED = 50_000  # images with which FID is reported; with few, it is biased upwards

Extractor = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W) uint8 to features (B, D) and class logits (B, C)."""


@dataclass(frozen=True)
class Features:
    """Features of a set of images: ``values`` (N, D) and ``logits`` (N, C), float32 on the CPU."""

    values: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Reference:
    """What is known of real images.

    Attributes:
        mean: Of their features (D,), float64.
        covariance: Of their features (D, D), float64.
        values: The features themselves (N, D), float32, of up to :data:`PUBLISHED` images evenly spread over all; None
            where only mean and covariance were published.
        count: Number of images; None if it is not known.
    """

    mean: Tensor
    covariance: Tensor
    values: Tensor | None = None
    count: int | None = None

    @classmethod
    def of(cls, values: Tensor) -> Reference:
        """Mean and unbiased covariance of features (N, D), N at least 2, and the features."""
        mean = values.mean(0, dtype=torch.float64)
        parts = (some.double() - mean for some in values.split(CHUNK))
        covariance = torch.zeros(len(mean), len(mean), dtype=torch.float64)
        for part in parts:
            covariance.addmm_(part.T, part)
        return cls(mean, covariance / (len(values) - 1), _some(values), len(values))


@dataclass(frozen=True)
class SampleQuality:
    """What :func:`sample_quality` finds.

    Attributes:
        images: Number of generated images.
        reference_images: Number of real images; None if it is not known.
        fid: Fréchet distance, 0 … ∞, lower is better.
        inception_score: 1 … number of classes, higher is better; None for fewer images than splits.
        precision: 0 … 1; None without the features of each real image.
        recall: 0 … 1; None without the features of each real image.
    """

    images: int
    reference_images: int | None
    fid: float
    inception_score: float | None
    precision: float | None
    recall: float | None


def _some(values: Tensor) -> Tensor:
    """Up to :data:`PUBLISHED` rows, evenly spread: more cannot be compared with each other."""
    return values[:: math.ceil(len(values) / PUBLISHED)].clone()


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
        raise UserError(f"weights: no file {weights!r}, expected {INCEPTION} of torch-fidelity")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("fid: torch-fidelity is not installed; pip install 'lightning-diffclf[fid]'") from error
    if weights is None:
        weights = _downloaded(URL_INCEPTION_V3)
    try:
        torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would unpickle anything
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
        )
    except (OSError, EOFError, RuntimeError, TypeError, UnpicklingError) as error:
        # PyTorch would advise to unpickle it nevertheless
        reason = "not a file of tensors alone" if isinstance(error, UnpicklingError) else first_line(error)
        raise UserError(
            f"weights: {weights!r} has no Inception network ({reason}), expected {INCEPTION} of torch-fidelity"
        ) from error
    network = network.eval().to(device)

    @torch.no_grad()
    def extract(images: Tensor) -> tuple[Tensor, Tensor]:
        values, logits = network(images.to(device))
        return values, logits

    return extract


def _downloaded(url: str) -> str:
    """Where a file of weights is, once it is there; its name ends in the beginning of its SHA-256, which is checked."""
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, UnpicklingError) as error:
        raise UserError(
            f"fid: the weights of the Inception network could not be downloaded ({first_line(error)}). Get {url} "
            "elsewhere and give the file as --weights"
        ) from error
    return str(Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name)


def find_pictures(folder: str) -> list[Path]:
    """Image files in a folder and below, in order.

    Raises:
        ValueError: if there are too few for precision and recall.
    """
    if not Path(folder).is_dir():
        raise UserError(f"images: no folder {folder!r}")
    found = find_images([folder])
    if len(found) <= NEIGHBOURS:
        raise UserError(f"images: {len(found)} in {folder!r}, expected at least {NEIGHBOURS + 1}")
    return found


def features_of(
    paths: Sequence[Path], extract: Extractor, batch_size: int = 64, size: int | None = None
) -> Iterator[Features]:
    """Features of images, batch by batch.

    Args:
        paths: Image files.
        extract: The network.
        batch_size: Images at once.
        size: Crop them to this many pixels, as images are that the published DiT networks are trained on; None to take
            them as they are.

    Raises:
        ValueError: if one cannot be read, or they are of several sizes.
    """

    def read(path: Path) -> Tensor:
        image = open_image(path)
        pixels = np.array(image if size is None else published_crop(image, size))
        return torch.from_numpy(pixels).permute(2, 0, 1)

    shape = None
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(paths), batch_size):
            images = list(pool.map(read, paths[first : first + batch_size]))
            shape = images[0].shape if shape is None else shape
            for path, image in zip(paths[first:], images, strict=False):
                if image.shape != shape:
                    (_, height, width), (_, *expected) = image.shape, shape
                    raise UserError(
                        f"images: {str(path)!r} has {width} x {height} pixels, {str(paths[0])!r} {expected[1]} x "
                        f"{expected[0]}, expected one size; --size crops real ones as for training"
                    )
            values, logits = extract(torch.stack(images))
            yield Features(values.float().cpu(), logits.float().cpu())


def joined(parts: Sequence[Features]) -> Features:
    """Several sets as one."""
    return Features(torch.cat([p.values for p in parts]), torch.cat([p.logits for p in parts]))


def sample_quality(generated: Features, real: Reference) -> SampleQuality:
    """All numbers, from features of generated and of real images.

    Raises:
        ValueError: if the features are not of the same network, or too few.
    """
    width, expected = len(real.mean), generated.values.shape[1]
    if width != expected:
        raise UserError(f"reference: features of {width} values, expected {expected}")
    precision = recall = None
    if real.values is not None:
        precision, recall = precision_recall(_some(generated.values), real.values)
    return SampleQuality(
        images=len(generated.values),
        reference_images=real.count,
        fid=frechet_distance(Reference.of(generated.values), real),
        inception_score=inception_score(generated.logits) if len(generated.logits) >= SPLITS else None,
        precision=precision,
        recall=recall,
    )


def frechet_distance(a: Reference, b: Reference) -> float:
    """Fréchet distance of two Gaussians (Dowson & Landau 1982), from their means and covariances.

    ``|mean_a - mean_b|² + tr(A + B - 2 (A^½ B A^½)^½)``. The product is symmetric, so its roots are real: those of
    ``A B``, which have the same trace, are not where there are fewer images than features.

    Example:
        >>> one = Reference(torch.zeros(2).double(), torch.eye(2).double())
        >>> frechet_distance(one, Reference(one.mean + 3, 4 * one.covariance))
        20.0
    """
    variances, axes = torch.linalg.eigh(a.covariance)
    root = axes * variances.clamp(min=0).sqrt() @ axes.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0)
    traces = a.covariance.trace() + b.covariance.trace() - 2 * product.sqrt().sum()
    return max(0.0, float((a.mean - b.mean).square().sum() + traces))


def inception_score(logits: Tensor) -> float:
    """Mean of the Inception Score over splits of logits (N, C); N is at least :data:`SPLITS`."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")  # they are ours
        score = InceptionScore(feature=_AsTheyAre(logits.shape[1]), splits=SPLITS)
        torch.manual_seed(0)  # the score shuffles images into its splits
        score.update(logits)
        return float(score.compute()[0])


def precision_recall(generated: Tensor, real: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall of generated features (N, D) with regard to real ones (M, D).

    Raises:
        ValueError: if there are no more images than ``neighbours``.
    """
    for name, features in (("generated", generated), ("real", real)):
        if len(features) <= neighbours:
            raise UserError(f"{name}: {len(features)} images, expected more than {neighbours}")
    return _share_inside(generated, real, neighbours), _share_inside(real, generated, neighbours)


def _share_inside(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """Share of points within the ball of any point of the manifold."""
    radii = torch.cat(
        # the nearest one is the point itself
        [torch.cdist(some, manifold).kthvalue(neighbours + 1, dim=1).values for some in manifold.split(CHUNK)]
    )
    inside = [(torch.cdist(some, manifold) <= radii).any(1) for some in points.split(CHUNK)]
    return float(torch.cat(inside).double().mean())


# --- references that are kept --------------------------------------------------------------------------------------


def digest_of(paths: Sequence[Path], folder: str, size: int | None) -> str:
    """A short name of what a folder's features depend on: its files, how they are cropped, and the network."""
    digest = hashlib.blake2b(f"inception-v3-compat {size}\n".encode(), digest_size=8)
    for path in paths:
        status = path.stat()
        digest.update(f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cache_file(folder: str) -> Path:
    """Where the reference of a folder is kept: beside it."""
    root = Path(folder).resolve()
    return root.with_name(f"{root.name}.fid.npz")


def check_writable(path: Path) -> None:
    """Raise ValueError if a file cannot be written, before there is something to write."""
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"reference: nothing can be kept in {str(path.parent)!r} ({error.strerror}); give another file as --stats"
        ) from error


def save_reference(reference: Reference, digest: str, path: Path) -> None:
    """Write a reference, whole or not at all; ``mu`` and ``sigma`` are named as in other implementations."""
    assert reference.values is not None
    assert reference.count is not None
    with replacing(path, "reference") as temporary, open(temporary, "wb") as file:
        np.savez(
            file,
            mu=reference.mean.numpy(),
            sigma=reference.covariance.numpy(),
            features=reference.values.numpy(),
            count=np.array(reference.count),
            digest=np.array(digest),
        )


def is_kept(path: Path, digest: str) -> bool:
    """Whether a file has the reference of a digest.

    Raises:
        ValueError: if it is another file, which must not be replaced.
    """
    if not path.is_file():
        return False
    found = _arrays(path, ["digest"])
    if "digest" not in found:
        raise UserError(f"stats: {str(path)!r} was not written by diffclf fid, expected another name")
    return str(found["digest"]) == digest


def load_reference(path: Path) -> Reference:
    """Read a reference: ours, or any file with ``mu`` and ``sigma``.

    Raises:
        ValueError: if the file cannot be read.
    """
    found = _arrays(path, ["mu", "sigma", "features", "count"])
    mu, sigma = found.get("mu"), found.get("sigma")
    if mu is None or sigma is None or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"reference: {str(path)!r} has no mean and covariance, expected mu (D,) and sigma (D, D)")
    values = torch.from_numpy(found["features"]) if "features" in found else None
    count = int(found["count"]) if "count" in found else None
    return Reference(torch.from_numpy(mu).double(), torch.from_numpy(sigma).double(), values, count)


def _arrays(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Those of the named arrays that a file has."""
    try:
        with np.load(path, allow_pickle=False) as file:
            large = [part.filename for part in file.zip.infolist() if part.file_size > MAX_ARRAY]
            if large:  # a compressed one may be a thousand times its file
                raise UserError(f"reference: {str(path)!r} has a {large[0]} of more than {MAX_ARRAY:,} bytes")
            return {name: file[name] for name in names if name in file.files}
    except UserError:
        raise
    except (OSError, EOFError, ValueError, BadZipFile, AttributeError, TypeError, zlib.error) as error:
        raise UserError(f"reference: {str(path)!r} cannot be read ({error})") from error
