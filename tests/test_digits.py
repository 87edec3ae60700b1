import hashlib
import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_diffclf.data.digit_scenes import DigitScenesDataModule
from lightning_diffclf.data.digits import DigitPairsDataModule, DigitsDataModule, DigitTriplesDataModule
from lightning_diffclf.errors import UserError
from tests.trainers import FakeTrainer


def module(world_size: int = 1, rank: int = 0, step: int = 0, **settings) -> DigitsDataModule:
    data = DigitsDataModule(**settings)
    data.trainer = FakeTrainer(rank, world_size, step=step)
    data.setup()
    return data


def ids(loader, batches: int | None = None) -> list[int]:
    return [i for batch in itertools.islice(loader, batches) for i in batch["id"].tolist()]


def test_the_split_is_fixed_disjoint_and_stratified():
    pixels, digits = load_digits(return_X_y=True)
    data = module()
    train, test = data.train.parts, data.test.parts
    assert (len(data.train), len(data.test)) == (1437, 360)
    assert set(train["id"].tolist()) | set(test["id"].tolist()) == set(range(1797))
    for part in (train, test):
        assert (part["image"].min(), part["image"].max()) == (-1, 1)
        rows = part["id"].numpy()
        np.testing.assert_array_equal(part["image"].reshape(-1, 64).numpy(), (pixels[rows] / 8 - 1).astype(np.float32))
        np.testing.assert_array_equal(part["label"].numpy(), digits[rows])
    assert max(abs(torch.bincount(test["label"]) / 360 - torch.bincount(train["label"]) / 1437)) < 0.003
    assert test["id"][:3].tolist() == module().test.parts["id"][:3].tolist()


def test_training_order_depends_on_seed_and_step_only():
    torch.manual_seed(0)
    first = ids(module(batch_size=479).train_dataloader(), 3)
    torch.manual_seed(1)
    assert ids(module(batch_size=479).train_dataloader(), 3) == first
    assert ids(module(batch_size=479, step=3).train_dataloader(), 3) != first
    assert ids(module(batch_size=479, step=2).train_dataloader(), 1) == first[2 * 479 :]
    assert ids(module(batch_size=479, seed=1).train_dataloader(), 3) != first
    assert sorted(first) == sorted(module().train.parts["id"].tolist())


def test_digits_may_be_left_out():
    whole, data = module(), module(left_out=[7, 2])
    assert data.class_names == tuple("01345689")
    assert data.num_classes == 8
    for part in ("train", "test"):
        parts, all_parts = getattr(data, part).parts, getattr(whole, part).parts
        kept = ~torch.isin(all_parts["label"], torch.tensor([2, 7]))
        assert parts["id"].tolist() == all_parts["id"][kept].tolist()
        digits = [int(data.class_names[c]) for c in parts["label"]]
        assert digits == all_parts["label"][kept].tolist()
    batches = list(data.predict_dataloader())
    assert all("label" not in batch for batch in batches)
    outside = load_digits(return_X_y=True)[1][[i for batch in batches for i in batch["id"].tolist()]]
    assert sorted(set(outside.tolist())) == [2, 7]
    assert len(outside) == (load_digits(return_X_y=True)[1][:, None] == [2, 7]).sum()
    for wrong in ([1, 1], [10], list(range(10))):
        with pytest.raises(UserError, match=r"left_out: .*, expected different digits, fewer than ten"):
            DigitsDataModule(left_out=wrong)


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_share_without_repeats(world_size):
    loaders = [module(world_size, rank) for rank in range(world_size)]
    evaluated = [i for data in loaders for i in ids(data.test_dataloader())]
    assert sorted(evaluated) == sorted(loaders[0].test.parts["id"].tolist())
    loaders = [module(world_size, rank, batch_size=42) for rank in range(world_size)]
    trained = [i for data in loaders for i in ids(data.train_dataloader(), 34)]  # 1,428 of 1,437
    assert len(set(trained)) == len(trained) == 34 * 42


def test_batches():
    batch = next(iter(module(batch_size=5).train_dataloader()))
    assert batch["image"].shape == (5, 1, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert {batch["label"].dtype, batch["id"].dtype} == {torch.int64}
    with pytest.raises(ValueError, match="eval_batch_size: 0"):
        DigitsDataModule(eval_batch_size=0)


# --- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_are_two_digits_of_the_same_split():
    pixels, digits = load_digits(return_X_y=True)
    scans = {row.tobytes(): digit for row, digit in zip((pixels / 8 - 1).astype(np.float32), digits, strict=True)}
    data, single = DigitPairsDataModule(train_pairs=700), DigitsDataModule()
    data.setup()
    single.setup()
    for pairs, scans_of in ((data.train, single.train), (data.test, single.test)):
        own = {image.numpy().tobytes() for image in scans_of.parts["image"]}
        image, label = pairs.parts["image"], pairs.parts["label"]
        assert image.shape[1:] == (1, 8, 16)
        for half, digit in ((image[..., :8], label // 10), (image[..., 8:], label % 10)):
            keys = [one.numpy().tobytes() for one in half.contiguous()]
            assert [scans[key] for key in keys] == digit.tolist()
            assert set(keys) <= own
    assert torch.bincount(data.train.parts["label"]).tolist() == [7] * 100
    assert torch.bincount(data.test.parts["label"]).tolist() == [5] * 100
    assert data.test.parts["id"].tolist() == list(range(500))


def test_pairs_are_fixed_and_diverse():
    first, second = DigitPairsDataModule(train_pairs=500), DigitPairsDataModule(train_pairs=500)
    for data in (first, second):
        data.setup()
        torch.manual_seed(1)
    assert torch.equal(first.train.parts["image"], second.train.parts["image"])
    assert len(torch.unique(first.train.parts["image"].flatten(1), dim=0)) > 495
    with pytest.raises(ValueError, match="test_pairs: 0, expected at least 1"):
        DigitPairsDataModule(test_pairs=0)


def test_pairs_are_those_of_the_published_benchmarks():
    data = DigitPairsDataModule(train_pairs=700, test_pairs=300)
    data.setup()
    digests = [
        hashlib.sha256(part.parts["image"].numpy().tobytes()).hexdigest()[:16] for part in (data.train, data.test)
    ]
    assert digests == ["ca5a77cfceab3b20", "2a43534a488310bb"]


# --- triples -------------------------------------------------------------------------------------------------------


def test_triples_are_three_digits_of_the_same_split():
    pixels, digits = load_digits(return_X_y=True)
    scans = {row.tobytes(): digit for row, digit in zip((pixels / 8 - 1).astype(np.float32), digits, strict=True)}
    data, single = DigitTriplesDataModule(train_triples=1500), DigitsDataModule()
    data.setup()
    single.setup()
    assert (len(data.train), len(data.test), data.num_classes) == (1500, 1000, 1000)
    for triples, scans_of in ((data.train, single.train), (data.test, single.test)):
        known = {image.numpy().tobytes() for image in scans_of.parts["image"]}
        parts = triples.parts
        assert parts["image"].shape[1:] == (1, 8, 24)
        for image, label in zip(parts["image"][:200], parts["label"].tolist(), strict=False):
            three = [image[:, :, column : column + 8].contiguous().numpy().tobytes() for column in (0, 8, 16)]
            assert set(three) <= known
            assert data.class_names[label] == "".join(str(scans[one]) for one in three)
    assert torch.bincount(data.test.parts["label"]).tolist() == [1] * 1000
    assert data.test.parts["id"].tolist() == list(range(1000))


def test_bad_numbers_of_triples():
    with pytest.raises(ValueError, match="train_triples: 0"):
        DigitTriplesDataModule(train_triples=0)
    with pytest.raises(ValueError, match="test_triples: -1"):
        DigitTriplesDataModule(test_triples=-1)


@pytest.mark.parametrize("data", [DigitsDataModule(), DigitPairsDataModule(900), DigitScenesDataModule()])
def test_images_to_learn_from_are_none_of_those_that_are_evaluated(data):
    data.setup("test")
    (test, *_), (train, *_) = data.test_dataloader(), data.training_images(50)
    assert train["image"].shape == (50, *test["image"].shape[1:])
    scans = data.test.parts["image"].flatten(1)
    assert torch.cdist(train["image"].flatten(1), scans).min() > 0.1
