"""How much of a loader a rank has to count, and which part of the data a run."""

from __future__ import annotations

import hashlib
from typing import Any

import lightning as L
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_diffclf.errors import UserError

BATCH_LIMITS = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}


def the_loader(trainer: L.Trainer, name: str) -> Any:
    """The one loader of an evaluation that all ranks can classify.

    Args:
        trainer: The Trainer that evaluates.
        name: Who asks, for errors.

    Raises:
        UserError: if there are several, or weights are sharded.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise UserError(
            f"{name}: weights are sharded ({type(trainer.strategy).__name__}), but each process makes its own "
            "number of network calls; evaluate with ddp, and set fit_images to 0 in training"
        )
    loaders = {"test": trainer.test_dataloaders, "predict": trainer.predict_dataloaders}.get(
        trainer.state.fn or "", trainer.val_dataloaders
    )
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    if len(loaders) != 1:
        raise UserError(f"dataloaders: {len(loaders)}, expected one to classify")
    return loaders[0]


def batches_within_limit(trainer: L.Trainer, loader: Any) -> int | None:
    """How many batches of ``loader`` this rank would see under the Trainer's limit; None if there is no limit."""
    assert trainer.state.fn is not None
    limit = getattr(trainer, BATCH_LIMITS[trainer.state.fn])
    if isinstance(limit, int):
        return limit
    return None if limit == 1.0 else int(limit * len(loader))


def is_last_batch(trainer: L.Trainer) -> bool:
    """Whether the batch at hand is the last one of an evaluation, also where nobody knew how many there would be."""
    loops: dict[str, Any] = {
        "fit": trainer.fit_loop.epoch_loop.val_loop,
        "validate": trainer.validate_loop,
        "test": trainer.test_loop,
        "predict": trainer.predict_loop,
    }
    assert trainer.state.fn is not None
    return bool(loops[trainer.state.fn].batch_progress.is_last_batch)


def parse_part(text: str) -> tuple[int, int]:
    """``i/n`` as (i, n).

    Raises:
        ValueError: unless 1 <= i <= n.
    """
    number, _, count = str(text).partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"part: {text!r}, expected i/n with i in 1 … n, such as 3/8")
    return int(number), int(count)


def in_part(image_id: int | str, number: int, count: int) -> bool:
    """Whether an image is in the ``number``-th of ``count`` parts: by its id alone, so parts are disjoint and complete.

    Example:
        >>> [sum(in_part(image_id, number, 4) for image_id in range(1000)) for number in (1, 2, 3, 4)]
        [252, 240, 272, 236]
    """
    digest = hashlib.blake2b(str(image_id).encode(), digest_size=8, key=b"part").digest()
    return int.from_bytes(digest, "little") % count == number - 1


def images_on_this_rank(loader: Any, rank: int, world_size: int, cap: int | None) -> int | None:
    """How many images of ``loader`` this rank has to count, so that all ranks together count each image once.

    A DistributedSampler gives every world_size-th image to a rank and pads short shards at their end with images
    that other ranks have too: what comes after the number returned here is such padding.

    Args:
        loader: A DataLoader.
        rank: This process.
        world_size: Number of processes.
        cap: Images over all ranks at most; None for no limit.

    Returns:
        Number of images, None if unknown (an iterable data set, which must shard itself without repeats).

    Raises:
        ValueError: if several ranks would all see the same images, or images are dropped.
    """
    share = None if cap is None else len(range(rank, cap, world_size))
    sampler, dataset = getattr(loader, "sampler", None), getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return share
    if isinstance(sampler, DistributedSampler):
        if sampler.drop_last and len(sampler.dataset) % sampler.num_replicas:  # type: ignore[arg-type]
            raise UserError("dataloader: its DistributedSampler drops images (drop_last), expected all of them")
        count = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    elif world_size > 1 and isinstance(sampler, (SequentialSampler, RandomSampler)):
        raise UserError(
            f"dataloader: each of {world_size} ranks would see all images; set use_distributed_sampler or shard it"
        )
    else:
        count = len(dataset)  # type: ignore[arg-type]
    return count if share is None else min(count, share)
