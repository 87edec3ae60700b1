"""Training data without epochs: what an optimizer step sees depends on the seed and the step only.

Images are drawn without replacement, pass after pass, into one endless sequence. Optimizer step s takes positions
``s * batch_size`` … ``(s + 1) * batch_size - 1`` of it, whatever number of processes and accumulated batches share
them. So a run that is resumed, also on another number of processes, sees what it would have seen, and there is no state
to save but the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import lightning as L
import numpy as np
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from lightning_diffclf.errors import UserError


class Share(NamedTuple):
    """This process among those that train together.

    Attributes:
        rank: Its number.
        world_size: How many there are.
        accumulate: Batches of one process that make one optimizer step.
    """

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    @classmethod
    def of(cls, trainer: L.Trainer | None) -> Share:
        """That of a Trainer; one process alone without one."""
        if trainer is None:
            return cls()
        return cls(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)

    def batch_size(self, total: int) -> int:
        """Images in one batch of one process, where an optimizer step takes ``total``.

        Raises:
            ValueError: if that is no whole number.

        Example:
            >>> Share(rank=0, world_size=8, accumulate=2).batch_size(256)
            16
        """
        parts = self.world_size * self.accumulate
        if total % parts:
            raise UserError(
                f"batch_size: {total} for an optimizer step, expected a multiple of {self.world_size} processes "
                f"x {self.accumulate} accumulated batches = {parts}"
            )
        return total // parts

    def rows(self, batch_size: int, batch_idx: int) -> slice:
        """Which of the images of an optimizer step are in the ``batch_idx``-th batch of this process.

        Example:
            >>> [list(range(8))[Share(rank, 2, 2).rows(2, batch)] for rank in (0, 1) for batch in (0, 1)]
            [[0, 2], [4, 6], [1, 3], [5, 7]]
        """
        begin = (batch_idx % self.accumulate) * batch_size * self.world_size + self.rank
        return slice(begin, begin + batch_size * self.world_size, self.world_size)


class Positions(DistributedSampler[Any]):
    """The positions of one process in the endless sequence, from ``start`` on.

    A DistributedSampler so that Lightning keeps it. It has no length.

    Args:
        share: This process.
        start: First position of the next optimizer step.
    """

    def __init__(self, share: Share, start: int) -> None:
        self.rank, self.num_replicas = share.rank, share.world_size
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start + self.rank, self.num_replicas)

    def __len__(self) -> int:
        raise TypeError("an endless sequence has no length")

    def set_epoch(self, epoch: int) -> None:
        """Nothing: there are no epochs."""


class Endless(Dataset[Any]):
    """Finite data as an endless sequence, shuffled anew in each pass.

    Args:
        size: Number of images.
        take: Makes a batch of images: given their indices in the data and their positions in the sequence, which key
            whatever is random about them (flips, posterior samples), so that it does not depend on worker processes.
        seed: Key of the order.

    Raises:
        ValueError: if there are no images.

    Example:
        >>> endless = Endless(4, lambda indices, positions: indices, seed=0)
        >>> one_pass = endless.__getitems__([0, 1, 2, 3])
        >>> sorted(one_pass), one_pass == endless.__getitems__([4, 5, 6, 7])
        ([0, 1, 2, 3], False)
    """

    def __init__(self, size: int, take: Callable[[list[int], list[int]], Any], seed: int) -> None:
        if size < 1:
            raise UserError("data: no images to train on")
        self.size, self.take, self.seed = size, take, seed
        self._orders: dict[int, np.ndarray] = {}  # of the passes in use

    def _order(self, number: int) -> np.ndarray:
        if number not in self._orders:
            # A batch may reach from one pass into the next; earlier ones are not needed again.
            self._orders = {n: order for n, order in self._orders.items() if n == number - 1}
            self._orders[number] = np.random.default_rng([self.seed, number]).permutation(self.size)
        return self._orders[number]

    def __getitem__(self, position: int) -> Any:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Any:
        indices = [int(self._order(p // self.size)[p % self.size]) for p in positions]
        return self.take(indices, list(positions))


def training_loader(
    size: int,
    take: Callable[[list[int], list[int]], Any],
    batch_size: int,
    seed: int,
    trainer: L.Trainer | None = None,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Loader of one process for endless training.

    Args:
        size: Number of images.
        take: See :class:`Endless`.
        batch_size: Images in one optimizer step, over all processes and accumulated batches.
        seed: Key of the order.
        trainer: Says which step comes next, and how many processes there are; a single process at step 0 without one.
        num_workers: Processes that make batches.

    Raises:
        ValueError: if the batch size does not divide, or nothing says when training ends.
    """
    share = Share.of(trainer)
    return DataLoader(
        Endless(size, take, seed),
        batch_size=share.batch_size(batch_size),
        sampler=Positions(share, start=next_step(trainer) * batch_size),
        num_workers=num_workers,
        collate_fn=as_it_is,
        persistent_workers=num_workers > 0,
        pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
    )


def next_step(trainer: L.Trainer | None) -> int:
    """The optimizer step that training data begin with; Lightning's count of batches is put to its beginning.

    Lightning steps whenever the batches counted so far, which it restores with a checkpoint, are a multiple of
    ``accumulate_grad_batches``. Where they were counted with another accumulation, or where the checkpoint was written
    between two steps, the first step would come early: on a part of its images, and with the noise of others.

    Args:
        trainer: About to train, its loops restored; None for a single process at step 0.

    Raises:
        ValueError: if nothing says when training ends, or it is cut into epochs: each would begin with the same images.
    """
    if trainer is None:
        return 0
    share, step = Share.of(trainer), int(trainer.global_step)
    if trainer.max_steps < 0:
        raise UserError("trainer.max_steps: not set, expected a number of steps: training data have no epochs")
    limit = trainer.limit_train_batches
    if isinstance(limit, int) and limit < trainer.max_steps * share.accumulate and trainer.max_epochs != 1:
        raise UserError(f"trainer.limit_train_batches: {limit}, expected none: training data have no epochs")
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    missing = step * share.accumulate - progress.total.processed
    for counts in (progress.total, progress.current):
        for event in ("ready", "started", "processed", "completed"):
            setattr(counts, event, getattr(counts, event) + missing)
    return step


def evaluation_loader(
    data: Dataset[Any],
    batch_size: int,
    trainer: L.Trainer | None = None,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Loader of one process for evaluation: in order, each image on one process, none twice.

    Args:
        data: What to evaluate.
        batch_size: Images in a batch of one process.
        trainer: Says how many processes there are; one without.
        num_workers: Processes that read images.
        collate: Makes a batch of what ``data`` gives; its ``__getitems__`` has done so already if omitted.

    Raises:
        ValueError: if there are fewer images than processes: one without any would make the others wait.
    """
    share = Share.of(trainer)
    if len(data) < share.world_size:  # type: ignore[arg-type]
        count = len(data)  # type: ignore[arg-type]
        raise UserError(f"data: {count} images for {share.world_size} processes, expected at least one for each")
    sampler = UnrepeatedDistributedSampler(data, num_replicas=share.world_size, rank=share.rank, shuffle=False)
    return DataLoader(
        data,
        batch_size=batch_size,  # by name: Lightning makes the loader anew for predict
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate or as_it_is,
    )


def some_images(
    data: Dataset[Any],
    count: int,
    batch_size: int,
    num_workers: int = 0,
    collate: Callable[[Any], Any] | None = None,
) -> DataLoader[Any]:
    """Loader of ``count`` images picked at random, the same ones each time, in their order; of all if there are fewer.

    Args:
        data: The images.
        count: How many at most.
        batch_size: Images in a batch.
        num_workers: Processes that read images.
        collate: As of :func:`evaluation_loader`.
    """
    size = len(data)  # type: ignore[arg-type]
    chosen = np.sort(np.random.default_rng(0).permutation(size)[:count])  # evenly spaced ones may miss classes in turn
    some = Subset(data, chosen.tolist())
    return DataLoader(some, batch_size=batch_size, num_workers=num_workers, collate_fn=collate or as_it_is)


def as_it_is(batch: Any) -> Any:
    """Collation of what is a batch already."""
    return batch
