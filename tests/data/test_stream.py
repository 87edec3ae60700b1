import itertools
from collections import defaultdict

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_diffclf import ClassConditionalDiT
from lightning_diffclf.data.digits import DigitsDataModule, InMemoryImages
from lightning_diffclf.data.stream import Endless, Positions, Share, evaluation_loader, some_images, training_loader
from tests.trainers import FakeTrainer


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


# --- resuming, with Lightning's own count of batches ------------------------------------------------------------------


class Recorder(L.Callback):
    """Writes the loss of each batch, with the step that it is part of, to a file of each process."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches  # Lightning has divided it
        with open(self.folder / f"losses{trainer.global_rank}", "a") as file:
            file.write(f"{self.step} {loss!r}\n")


def fit(folder, max_steps, accumulate, processes=1, ckpt_path=None, callbacks=(), **kwargs):
    """Train a tiny DiT; the mean loss of each step, how many batches made it, and the weights."""
    folder.mkdir()
    module = ClassConditionalDiT(
        input_size=8, in_channels=1, num_classes=10, hidden_size=16, depth=1, num_heads=2, latents=False, warmup_steps=4
    )
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="auto" if processes == 1 else "ddp_fork",
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        default_root_dir=folder,
        callbacks=[Recorder(folder), *callbacks],
        **{"enable_checkpointing": False, "limit_val_batches": 0} | kwargs,
    )
    trainer.fit(module, DigitsDataModule(batch_size=48), ckpt_path=ckpt_path)
    of_step = defaultdict(list)
    for rank in range(processes):
        for line in (folder / f"losses{rank}").read_text().splitlines():
            step, loss = line.split()
            of_step[int(step)].append(float(loss))
    assert {len(losses) for losses in of_step.values()} == {processes * accumulate}
    return [sum(losses) / len(losses) for _, losses in sorted(of_step.items())], module.state_dict()


def saving(folder):
    return {"enable_checkpointing": True, "callbacks": [ModelCheckpoint(folder, "first", every_n_train_steps=3)]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("runs") / "undisturbed", 6, 1)


@pytest.mark.parametrize(
    ("before", "after"),  # (accumulate, processes)
    [((1, 1), (2, 1)), ((2, 1), (1, 1)), ((3, 1), (2, 1)), ((2, 1), (4, 1)), ((1, 1), (2, 2))],
    ids=lambda layout: "accumulate {}, processes {}".format(*layout),
)
def test_a_run_resumed_with_another_accumulation_has_the_same_losses(undisturbed, tmp_path, before, after):
    losses, weights = undisturbed
    first, _ = fit(tmp_path / "first", 3, *before, **saving(tmp_path))
    assert first == pytest.approx(losses[:3], rel=1e-5)
    second, resumed = fit(tmp_path / "second", 6, *after, ckpt_path=tmp_path / "first.ckpt")
    assert second == pytest.approx(losses[3:], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4)


class Stop(Exception):
    pass


class StopAtBatch(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 7:
            raise Stop


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_run_resumed_from_between_two_steps_begins_the_step_anew(undisturbed, tmp_path, accumulate):
    """A validation, and with it a checkpoint, in the middle of the third step of three batches."""
    checkpoint = ModelCheckpoint(tmp_path, "first", save_top_k=1)
    settings = {"val_check_interval": 7, "limit_val_batches": 1, "enable_checkpointing": True}
    with pytest.raises(Stop):
        fit(tmp_path / "first", 3, 3, callbacks=[checkpoint, StopAtBatch()], **settings)
    losses, weights = undisturbed
    second, resumed = fit(tmp_path / "second", 6, accumulate, ckpt_path=tmp_path / "first.ckpt")
    assert second == pytest.approx(losses[2:], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-3, atol=1e-4)


def test_endless_data_are_not_cut_into_epochs(tmp_path):
    with pytest.raises(ValueError, match="limit_train_batches: 3, expected none: training data have no epochs"):
        fit(tmp_path / "cut", 6, 1, limit_train_batches=3)
    assert len(fit(tmp_path / "one", 3, 2, limit_train_batches=6)[0]) == 3


def test_some_images_are_the_same_ones_each_time_and_of_all_classes():
    labels = torch.arange(1000) % 10
    data = InMemoryImages(torch.zeros(1000, 1, 1, 1), labels, torch.arange(1000))
    found = list(some_images(data, 200, batch_size=30))
    ids = torch.cat([batch["id"] for batch in found])
    assert [len(batch["id"]) for batch in found] == [30] * 6 + [20]
    assert len(set(ids.tolist())) == 200
    assert torch.equal(ids, ids.sort().values)
    assert torch.equal(ids, torch.cat([batch["id"] for batch in some_images(data, 200, batch_size=200)]))
    assert torch.bincount(labels[ids]).min() > 10
    assert len(torch.cat([batch["id"] for batch in some_images(data, 5000, batch_size=300)])) == 1000
