import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_diffclf.commands import run
from lightning_diffclf.data.image_folder import ClassFolders, ImageFolderDataModule, divide
from lightning_diffclf.data.images import covering_crop, open_image
from tests.photos import autoencoder, photos
from tests.trainers import FakeTrainer

CLASSES = ("cat", "dog", "owl")


def data_of(root, trainer=None, stage=None, **settings) -> ImageFolderDataModule:
    settings = {"size": 8, "batch_size": 6, "eval_batch_size": 4, "num_workers": 0} | settings
    data = ImageFolderDataModule(str(root), **settings)
    data.trainer = trainer
    data.setup(stage)
    return data


def ids(loader, batches=None) -> list[str]:
    return [i for batch in itertools.islice(loader, batches) for i in batch["id"]]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "photos"
    photos(folder, CLASSES, each=20)
    return folder


@pytest.fixture
def given(tmp_path):
    """Folders train, val and test; val knows two of the three classes only."""
    for part, classes, each in (("train", CLASSES, 4), ("val", ("dog", "owl"), 2), ("test", CLASSES, 3)):
        photos(tmp_path / "given" / part, classes, each=each)
    return tmp_path / "given"


# --- parts ---------------------------------------------------------------------------------------------------------


def test_parts_are_shares_of_each_class_by_file_name(root, tmp_path):
    data = data_of(root, val_share=0.1, test_share=0.25)
    parts = {part: dict(data.source(part).files) for part in ("train", "val", "test")}
    assert sorted(str(path) for part in parts.values() for path in part) == sorted(map(str, root.glob("*/*.png")))
    for part, each in (("train", 13), ("val", 2), ("test", 5)):
        assert np.bincount(list(parts[part].values())).tolist() == [each] * 3
        assert all(path.parent.name == CLASSES[label] for path, label in parts[part].items())
    # the same files elsewhere, with other contents, are divided alike; another file moves few of the others
    photos(tmp_path / "again", CLASSES, each=21, size=(20, 20))
    again = data_of(tmp_path / "again", val_share=0.1, test_share=0.25)
    moved = {i for i in ids(data.test_dataloader()) if i not in ids(again.test_dataloader())}
    assert len(moved) <= 3
    (tmp_path / "again" / "cat" / "20.png").unlink()
    (tmp_path / "again" / "dog" / "20.png").unlink()
    (tmp_path / "again" / "owl" / "20.png").unlink()
    same = data_of(tmp_path / "again", val_share=0.1, test_share=0.25)
    assert ids(same.test_dataloader()) == ids(data.test_dataloader())
    assert ids(same.val_dataloader()) == ids(data.val_dataloader())


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [((0.1, 0.1), 3, (1, 1, 1)), ((0, 0.5), 2, (1, 0, 1)), ((0, 1), 1, (0, 0, 1)), ((0.5, 0.5), 3, (0, 1, 2))],
)
def test_small_classes_have_an_image_in_each_part(shares, count, expected, tmp_path):
    photos(tmp_path / "few", ("a",), each=count)
    parts = divide(ClassFolders(str(tmp_path / "few")), *shares)
    found = tuple(len(parts[name]) for name in ("train", "val", "test"))
    assert sum(found) == count
    assert found == expected or sorted(found) == sorted(expected)


def test_one_part_may_serve_as_both(root, given):
    data = data_of(root, val_share=0)
    assert ids(data.val_dataloader()) == ids(data.test_dataloader())
    shutil.rmtree(given / "test")
    data = data_of(given)
    assert ids(data.val_dataloader()) == ids(data.test_dataloader())
    assert len(ids(data.val_dataloader())) == 4


def test_given_parts_are_taken_as_they_are(given):
    data = data_of(given)
    assert (data.class_names, data.num_classes, data.image_shape) == (list(CLASSES), 3, (3, 8, 8))
    assert [len(data.source(part)) for part in ("train", "val", "test")] == [12, 4, 9]
    batch = next(iter(data.val_dataloader()))
    assert batch["id"] == ["dog/0.png", "dog/1.png", "owl/0.png", "owl/1.png"]
    assert batch["label"].tolist() == [1, 1, 2, 2]  # numbered as in train, though there is no cat


def test_another_folder_is_numbered_as_the_network_was_trained(root, given):
    data = data_of(given / "val", stage="test", classes=list(CLASSES), val_share=0, test_share=1)
    assert next(iter(data.test_dataloader()))["label"].tolist() == [1, 1, 2, 2]
    with pytest.raises(ValueError, match=r"folder 'cat' in .* is no class that was trained, expected one of \['dog'"):
        data_of(root, classes=["dog", "owl"])


# --- images --------------------------------------------------------------------------------------------------------


def test_images_of_any_size_and_mode(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    folder = tmp_path / "own" / "a"
    folder.mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "grey.png")
    Image.fromarray(pixels).convert("RGB").save(folder / "rgb.png")
    Image.fromarray(pixels).resize((31, 17)).convert("P").save(folder / "palette.gif")
    grey, rgb = (
        {
            i: image
            for batch in data_of(
                tmp_path / "own", None, "test", channels=channels, val_share=0, test_share=1
            ).test_dataloader()
            for i, image in zip(batch["id"], batch["image"], strict=True)
        }
        for channels in (1, 3)
    )
    expected = torch.tensor(pixels / 127.5 - 1, dtype=torch.float32)
    for name in ("a/grey.png", "a/rgb.png"):
        torch.testing.assert_close(grey[name], expected[None])
        torch.testing.assert_close(rgb[name], expected.expand(3, 8, 8))
    assert grey["a/palette.gif"].shape == (1, 8, 8)


def test_images_that_are_no_squares(root):
    data = data_of(root, size=[6, 10])
    [batch, *_] = data.test_dataloader()
    assert data.image_shape == (3, 6, 10)
    source = data.source("test")
    expected = covering_crop(open_image(source.files[0][0]), 6, 10)
    np.testing.assert_allclose(batch["image"][0].permute(1, 2, 0).numpy(), np.asarray(expected) / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_do_not_depend_on_processes(root, world_size):
    def trained(processes):
        loaders = [
            iter(data_of(root, FakeTrainerOf(rank, processes), "fit", flip=True).train_dataloader())
            for rank in range(processes)
        ]
        steps = [[next(loader) for loader in loaders] for _ in range(3)]
        return [
            {i: image for batch in step for i, image in zip(batch["id"], batch["image"], strict=True)} for step in steps
        ]

    for one, several in zip(trained(1), trained(world_size), strict=True):
        assert len(one) == 6
        assert one.keys() == several.keys()
        assert all(torch.equal(one[i], several[i]) for i in one)
    evaluated = [
        i
        for rank in range(world_size)
        for i in ids(data_of(root, FakeTrainerOf(rank, world_size), "test").test_dataloader())
    ]
    assert sorted(evaluated) == sorted(ids(data_of(root).test_dataloader()))


class FakeTrainerOf(FakeTrainer):
    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0


def test_flips_are_optional(root):
    plain, flipped = (data_of(root, flip=flip).train_dataloader() for flip in (False, True))
    kinds = []
    for a, b in itertools.islice(zip(plain, flipped, strict=True), 10):
        assert a["id"] == b["id"]
        for one, other in zip(a["image"], b["image"], strict=True):
            assert torch.equal(other, one) or torch.equal(other, one.flip(2))
            kinds.append(torch.equal(other, one))
    assert 15 < sum(kinds) < 45  # of 60


def test_latents_made_of_the_parts(given):
    vae = given.parent / "vae"
    autoencoder(vae)
    for part in ("train", "test"):
        options = {"data": given / part, "out": given.parent / "latents" / part, "size": 8, "vae": vae}
        run("encode", [*(f"--{name}={value}" for name, value in options.items()), "--accelerator=cpu"])
    data = data_of(given.parent / "latents")
    assert (data.image_shape, data.class_names) == ((4, 1, 1), list(CLASSES))
    assert len(data.latents("fit")) == 2
    assert next(iter(data.train_dataloader()))["image"].shape == (6, 4, 1, 1)
    assert data.source("val") is data.source("test")
    with pytest.raises(ValueError, match="are of images of 8 pixels, expected 16"):
        data_of(given.parent / "latents", size=16)
    with pytest.raises(ValueError, match="are latents, expected a folder that has those of 'train' and 'val'"):
        data_of(given.parent / "latents" / "train")


def test_small_images_are_enlarged_with_a_warning(root, capfd):
    data = data_of(root, stage="test", size=11)
    assert capfd.readouterr().err.startswith("warning: 6 of 6 images are enlarged to 11 x 11, such as ")
    assert next(iter(data.test_dataloader()))["image"].shape == (4, 3, 11, 11)
    data_of(root, stage="test", size=10)
    assert capfd.readouterr().err == ""


# --- what is wrong -------------------------------------------------------------------------------------------------


def test_damaged_images_are_named_and_training_skips_some(root, tmp_path, capfd):
    shutil.copytree(root, tmp_path / "bad")
    data = data_of(tmp_path / "bad")
    of_train, of_test = data.source("train").files[3][0], data.source("test").files[0][0]
    cut = of_train.read_bytes()
    of_train.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{of_train.name}' cannot be read .*1 of 48 images are damaged.*skip_bad"):
        data_of(tmp_path / "bad", stage="fit")
    data = data_of(tmp_path / "bad", stage="fit", skip_bad=0.05)
    batches = list(itertools.islice(data.train_dataloader(), 8))  # a pass
    assert all(batch["image"].shape == (6, 3, 8, 8) for batch in batches)
    assert sorted(set(ids(batches))) == sorted(
        data.source("train").id_of(i) for i in range(48) if data.source("train").files[i][0] != of_train
    )
    assert f"{of_train.name}' cannot be read" in capfd.readouterr().err
    of_train.write_bytes(cut[:60])  # its head is whole
    with pytest.raises(ValueError, match=rf"{of_train.name}' cannot be read"):
        list(itertools.islice(data_of(tmp_path / "bad", stage="fit").train_dataloader(), 8))
    of_test.write_bytes(b"no image")
    with pytest.raises(ValueError, match=rf"{of_test.name}' cannot be read"):
        data_of(tmp_path / "bad", stage="test", skip_bad=0.5)


def test_what_is_wrong_with_folders(root, given, tmp_path):
    def fails(where, message, error=ValueError, **settings):
        with pytest.raises(error, match=message):
            data_of(where, **settings)

    fails(tmp_path / "nowhere", "no folder .*nowhere', expected one with a folder of images", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "empty' has no folders, expected one for each class")
    shutil.copytree(root, tmp_path / "own")
    (tmp_path / "own" / "yak").mkdir()
    fails(tmp_path / "own", "own/yak' has no image, expected files ending in")
    Image.new("RGB", (9, 9)).save(tmp_path / "own" / "yak" / "1.png")
    fails(tmp_path / "own", r"class 'yak' in .*own' has 1 images, expected at least 3, one for each part")
    fails(root, "data: class 'yak' has no image in .*photos', expected some to train on", classes=[*CLASSES, "yak"])
    photos(tmp_path / "one", ("a",))
    data = data_of(tmp_path / "one")
    with pytest.raises(ValueError, match=r"only one folder, 'a', in .*one', expected two or more: one for each class"):
        data.num_classes  # noqa: B018
    photos(given / "val" / "x", ("y",))
    fails(given, "folder 'x' in .*val' is no class that was trained, expected one of")
    shutil.rmtree(given / "val" / "x")
    (given / "valid").mkdir()
    fails(given, "has 'valid' beside 'test', in which there are folders; expected either folders of classes, or")
    (given / "valid").rmdir()
    shutil.rmtree(given / "train")
    fails(given, r"has only \['val', 'test'\], expected 'train'")
    fails(given, r"has no 'train', expected it beside \['test', 'val'\]", stage="fit", classes=list(CLASSES))
    assert data_of(given, stage="test", classes=list(CLASSES)).num_classes == 3
    shutil.rmtree(given / "val")
    (given / "test").rename(given / "train")
    fails(given, "has only 'train', expected 'val' or 'test' as well")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size: 0, expected at least 1"),
        ({"size": [8]}, r"size: \[8\], expected a number, or height and width"),
        ({"size": [8, 0]}, "size: 0, expected at least 1"),
        ({"channels": 2}, r"channels: 2, expected 3 \(RGB\) or 1"),
        ({"classes": ["a", "a"]}, r"classes: \['a', 'a'\], expected different names"),
        ({"classes": []}, r"classes: \[\], expected different names"),
        ({"skip_bad": 1}, "skip_bad: 1, expected a share"),
        ({"val_share": 0, "test_share": 0}, "val_share, test_share: 0, 0, expected shares"),
        ({"val_share": 0.6, "test_share": 0.6}, "expected shares that are together above 0 and at most 1"),
        ({"val_share": -0.1}, "val_share, test_share: -0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ImageFolderDataModule(**settings)
