"""What a batch may look like: the one place that takes them apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from lightning_diffclf.errors import UserError, WrongType


class Batch(NamedTuple):
    """Images (B, C, H, W), class labels (B,) int64 or None, ids (B) or None; what else a batch may bring.

    ``candidates``: a list of candidates for each image, where they differ. ``noise_keys``: ids to take the noise from,
    where images are to see the same draws. ``groups``: what each image belongs to with others that are like it (a
    patient, a Winoground group), so that intervals take them for less than as many independent images.
    """

    images: Tensor
    labels: Tensor | None
    ids: Sequence[int | str] | None
    candidates: Sequence[Sequence[int]] | None = None
    noise_keys: Sequence[int | str] | None = None
    groups: Sequence[int | str] | None = None


def unpack(batch: Any) -> Batch:
    """Take a batch apart: a mapping with ``image`` and what else :class:`Batch` has, or (images, labels[, ids]).

    Or images alone.

    Raises:
        TypeError: if the batch is none of these.

    Example:
        >>> import torch
        >>> unpack((torch.zeros(2, 1, 8, 8), torch.tensor([3, 5]))).labels
        tensor([3, 5])
    """
    if isinstance(batch, Tensor):
        return Batch(batch, None, None)
    if isinstance(batch, Mapping) and "image" in batch:
        others = batch.get("candidates"), _listed(batch.get("noise_key")), _listed(batch.get("group"))
        return Batch(batch["image"], batch.get("label"), _listed(batch.get("id")), *others)
    if isinstance(batch, Sequence) and 1 <= len(batch) <= 3 and isinstance(batch[0], Tensor):
        images, labels, ids = [*batch, None, None][:3]
        return Batch(images, labels, _listed(ids))
    keys = f" with keys {sorted(batch)}" if isinstance(batch, Mapping) else ""
    raise WrongType(
        f"batch: {type(batch).__name__}{keys}, expected a mapping with 'image' (and 'label', 'id'), "
        "or (images, labels[, ids]), or images alone"
    )


def _listed(ids: Any) -> list[int | str] | None:
    return ids.tolist() if isinstance(ids, Tensor) else None if ids is None else list(ids)


def content_ids(images: Tensor) -> list[str]:
    """Ids for images that come without: a digest of their values, so that results still do not depend on order."""
    return [hashlib.blake2b(one.numpy().tobytes(), digest_size=12).hexdigest() for one in images.detach().float().cpu()]


class DistinctIds:
    """Ids of the images that one process sees, batch by batch: each image has one of its own.

    An id that comes again is refused at once: two images would be one in the results, or one image would be paid for
    twice, as where each worker of a loader reads all data. Images without ids that look the same are numbered.
    """

    def __init__(self) -> None:
        self._times: Counter[str] = Counter()

    def __call__(self, ids: Sequence[int | str] | None, images: Tensor) -> list[int | str]:
        """Ids (B) of images (B, C, H, W): ``ids``, or digests of their values.

        Raises:
            UserError: if one of ``ids`` was there before.
        """
        found: list[int | str] = []
        for image_id in content_ids(images) if ids is None else ids:
            self._times[str(image_id)] += 1  # as results have them
            times = self._times[str(image_id)]
            if times > 1 and ids is not None:
                raise UserError(
                    f"image {image_id!r}: its id has come before, expected an id of its own for each image, and each "
                    "image once (of an iterable data set, from one of its workers)"
                )
            found.append(image_id if times == 1 else f"{image_id}-{times}")
        return found


def check_pixels(images: Tensor) -> None:
    """Raise ValueError unless all values are pixels in [-1, 1]; waits for the device."""
    low, high = (float(v) for v in images.detach().aminmax())
    if not (low >= -1.001 and high <= 1.001):  # also refuses NaN
        raise UserError(f"images: values in [{low:.4g}, {high:.4g}], expected pixels in [-1, 1]")
