import itertools

import pytest
import torch

from lightning_diffclf.data.stream import Endless, Positions, Share, evaluation_loader, training_loader


class FakeTrainer:
    """The few attributes of a Trainer that loaders ask for."""

    def __init__(self, rank=0, world_size=1, accumulate=1, step=0, max_steps=10):
        self.global_rank, self.world_size, self.accumulate_grad_batches = rank, world_size, accumulate
        self.global_step, self.max_steps = step, max_steps
        self.strategy = type("Strategy", (), {"root_device": torch.device("cpu")})()


def take(indices, positions):
    return list(zip(indices, positions, strict=True))


def steps_of(size, total, layout, steps, begin=0, workers=0):
    """What each optimizer step sees, put back into the order of one process."""
    world_size, accumulate = layout
    found = [[None] * total for _ in range(steps)]
    for rank in range(world_size):
        trainer = FakeTrainer(rank, world_size, accumulate, begin)
        batches = iter(training_loader(size, take, total, seed=3, trainer=trainer, num_workers=workers))
        for number, batch in enumerate(itertools.islice(batches, steps * accumulate)):
            found[number // accumulate][Share.of(trainer).rows(len(batch), number)] = batch
    return found


@pytest.mark.parametrize("layout", [(2, 1), (3, 1), (1, 2), (2, 3), (12, 1)])
def test_steps_do_not_depend_on_processes_and_accumulation(layout):
    assert steps_of(31, 12, layout, 7) == steps_of(31, 12, (1, 1), 7)


def test_steps_do_not_depend_on_workers_and_resuming():
    whole = steps_of(31, 12, (1, 1), 7)
    assert steps_of(31, 12, (1, 1), 7, workers=2) == whole
    assert steps_of(31, 12, (2, 2), 4, begin=3) == whole[3:]


def test_each_pass_has_each_image_once_in_another_order():
    seen = [one for step in steps_of(31, 12, (1, 1), 31) for one in step]
    assert [position for _, position in seen] == list(range(31 * 12))
    passes = [tuple(index for index, _ in seen[n * 31 : n * 31 + 31]) for n in range(12)]
    assert all(sorted(one) == list(range(31)) for one in passes)
    assert len(set(passes)) == len(passes)
    other = Endless(31, take, seed=4).__getitems__(range(31))
    assert tuple(index for index, _ in other) != passes[0]


def test_batch_sizes_must_divide():
    with pytest.raises(ValueError, match=r"batch_size: 256 .*multiple of 3 processes x 2 accumulated batches = 6"):
        training_loader(10, take, 256, 0, FakeTrainer(0, 3, 2))
    with pytest.raises(ValueError, match="max_steps: not set"):
        training_loader(10, take, 256, 0, FakeTrainer(max_steps=-1))
    with pytest.raises(ValueError, match="no images"):
        training_loader(0, take, 256, 0)
    with pytest.raises(ValueError, match="5 images for 7 processes"):
        evaluation_loader(range(5), 2, FakeTrainer(0, 7))
    with pytest.raises(TypeError):
        len(Positions(Share(), 0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_each_image_once(world_size):
    loaders = [
        evaluation_loader(range(5), 2, FakeTrainer(rank, world_size), collate=list) for rank in range(world_size)
    ]
    assert sorted(image for loader in loaders for batch in loader for image in batch) == list(range(5))
