import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from lightning_diffclf.commands import run
from lightning_diffclf.data.imagenet import ImageNetDataModule
from lightning_diffclf.data.images import open_image, published_crop
from lightning_diffclf.modules.conditions import conditions
from tests.photos import autoencoder, photos
from tests.trainers import FakeTrainer

WNIDS = ImageNetInfo().label_names()


def data_of(train, val, trainer=None, stage="fit", **settings):
    settings = {"size": 16, "batch_size": 6, "eval_batch_size": 4, "num_workers": 0} | settings
    data = ImageNetDataModule(str(train), str(val), **settings)
    data.trainer = trainer
    data.setup(stage)
    return data


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same photos as folders, shards and latents."""
    root = tmp_path_factory.mktemp("forms")
    photos(root / "photos", classes=("ant", "bee", "cat"), each=5, size=(24, 20))
    autoencoder(root / "vae")
    run("shards", ["--data", str(root / "photos"), "--out", str(root / "shards"), "--images_per_shard", "4"])
    for source in ("photos", "shards"):
        run(
            "encode",
            f"--data {root / source} --out {root / f'latents_of_{source}'} --size 16 --vae {root / 'vae'} "
            "--accelerator cpu --batch_size 4 --num_workers 2".split(),
        )
    return root


def evaluated(data):
    batches = list(data.val_dataloader())
    images = torch.cat([batch["image"] for batch in batches])
    labels = [label for batch in batches for label in batch["label"].tolist()]
    ids = [int(i) for batch in batches for i in batch["id"]]
    return {i: (image, label) for i, image, label in zip(ids, images, labels, strict=True)}


def test_the_published_crop():
    # worked out by hand: 100 x 60 is halved to 50 x 30, as 60 >= 2 * 20 (30 is not), then resized to 33 x 20
    pixels = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    half = np.floor(pixels.reshape(30, 2, 50, 2, 3).mean((1, 3)) + 0.5).astype(np.uint8)
    expected = Image.fromarray(half).resize((33, 20), Image.Resampling.BICUBIC).crop((6, 0, 26, 20))
    found = published_crop(image, 20)
    assert found.size == (20, 20)
    assert (
        np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int)).max() <= 3
    )  # Pillow rounds between passes
    assert published_crop(image.resize((7, 9)), 20).size == (20, 20)


def test_folders_shards_and_latents_evaluate_alike(forms):
    folders, shards = (evaluated(data_of(forms / name, forms / name)) for name in ("photos", "shards"))
    assert set(folders) == set(shards) == set(range(15))
    for i, (image, label) in folders.items():
        assert torch.equal(image, shards[i][0])
        assert label == shards[i][1] == i // 5
        path = sorted((forms / "photos" / "ant").parent.glob("*/*.png"))[i]
        pixels = np.asarray(published_crop(open_image(path), 16))
        np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)
    vae = autoencoder(forms / "again")
    with torch.no_grad():
        for name in ("latents_of_photos", "latents_of_shards"):
            latents = evaluated(data_of(forms / name, forms / name))
            assert {i: label for i, (_, label) in latents.items()} == {i: label for i, (_, label) in folders.items()}
            for i, (latent, _) in latents.items():
                mean = vae.encode(folders[i][0][None]).latent_dist.mean[0]
                torch.testing.assert_close(latent, (mean - 0.1) * 0.5, rtol=2e-3, atol=2e-3)


def test_images_to_learn_from_are_seen_as_those_that_are_evaluated(forms, tmp_path):
    for name in ("photos", "shards", "latents_of_photos"):
        data = data_of(forms / name, forms / name, FakeTrainer(1, 2), stage="test")  # whatever the rank
        expected, found = evaluated(data_of(forms / name, forms / name)), {}
        for batch in data.training_images(9):
            images = zip(batch["id"], batch["image"], batch["label"], strict=True)
            found |= {int(i): (image, int(label)) for i, image, label in images}
        assert len(found) == (15 if name == "shards" else 9)
        assert all(
            torch.equal(image, expected[i][0]) and label == expected[i][1] for i, (image, label) in found.items()
        )
    photos(tmp_path / "others", classes=("ant", "bee"), each=2)
    with pytest.raises(ValueError, match=r"2 classes in '.*others', 3 in '.*photos', expected the same ones"):
        data_of(tmp_path / "others", forms / "photos", stage="test").training_images(9)
    with pytest.raises(FileNotFoundError, match="nothing"):
        data_of(tmp_path / "nothing", forms / "photos", stage="test").training_images(9)


@pytest.mark.parametrize("name", ["photos", "latents_of_photos"])
def test_training_batches_depend_on_the_step_only(forms, name):
    whole = list(itertools.islice(data_of(forms / name, forms / name).train_dataloader(), 6))
    workers = list(itertools.islice(data_of(forms / name, forms / name, num_workers=2).train_dataloader(), 6))
    for a, b in zip(whole, workers, strict=True):
        assert torch.equal(a["image"], b["image"])
        assert list(a["id"]) == list(b["id"])
    first_pass = [int(i) for batch in whole for i in batch["id"]][:15]
    assert sorted(first_pass) == list(range(15))
    # every other image is mirrored, and an image not always alike
    of_image = {}
    for batch in itertools.islice(data_of(forms / name, forms / name).train_dataloader(), 40):
        for i, image in zip(batch["id"], batch["image"], strict=True):
            of_image.setdefault(int(i), []).append(image)
    assert all(any(not torch.equal(images[0], one) for one in images) for images in of_image.values())
    if name == "photos":
        plain = {i: image for i, (image, _) in evaluated(data_of(forms / name, forms / name)).items()}
        kinds = [torch.equal(image, plain[i]) for i, images in of_image.items() for image in images]
        mirrored = [torch.equal(image, plain[i].flip(2)) for i, images in of_image.items() for image in images]
        assert all(a or b for a, b in zip(kinds, mirrored, strict=True))
        assert 80 < sum(kinds) < 160  # of 240


def test_shards_train(forms):
    batches = itertools.islice(data_of(forms / "shards", forms / "photos", buffer=3).train_dataloader(), 10)
    batch = list(batches)[-1]
    assert batch["image"].shape == (6, 3, 16, 16)
    assert all(label == i // 5 for label, i in zip(batch["label"].tolist(), batch["id"], strict=True))


def imagenet_like(root, rows):
    photos(root, classes=[WNIDS[row] for row in rows], each=1)
    return root


def test_parts_of_imagenet_restrict_the_candidates(tmp_path):
    rows = [3, 7, 900]
    data = data_of(tmp_path, imagenet_like(tmp_path / "a", rows), stage="test")
    by_wnid = sorted(rows, key=lambda row: WNIDS[row])
    assert data.network_classes == [[row] for row in by_wnid]
    asked = conditions(1000, None, data)
    assert asked.rows.tolist() == by_wnid
    assert asked.candidates.classes == (0, 1, 2)
    assert list(asked.candidates.names) == data.class_names
    shards = tmp_path / "shards"
    run("shards", ["--data", str(tmp_path / "a"), "--out", str(shards)])
    packed = data_of(tmp_path, shards, stage="test")
    assert packed.network_classes == data.network_classes
    assert packed.class_names == data.class_names
    # a network for these classes alone is asked about all of its classes
    assert conditions(3, None, data).rows is None
    with pytest.raises(ValueError, match="classes up to 900 of the network, but it has 5"):
        conditions(5, None, data)


def test_bad_settings(tmp_path, forms):
    for settings, message in (
        ({"batch_size": 0}, "batch_size: 0, expected at least 1"),
        ({"skip_bad": 1.0}, "skip_bad: 1.0, expected a share"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageNetDataModule(**settings)
    with pytest.raises(FileNotFoundError, match=r"no 'nowhere', expected a folder .*diffclf shards.*diffclf encode"):
        data_of("nowhere", forms / "photos")
    with pytest.raises(ValueError, match="are of images of 16 pixels, expected 32"):
        data_of(forms / "latents_of_photos", forms / "photos", size=32)
    (tmp_path / "flat").mkdir()
    with pytest.raises(ValueError, match="has no folders, expected one for each class"):
        data_of(tmp_path / "flat", forms / "photos")


def test_encoding_says_what_is_wrong(forms, tmp_path):
    def encode(data, out, **settings):
        settings = {"size": 16, "vae": forms / "vae", "accelerator": "cpu"} | settings
        run("encode", ["--data", str(data), "--out", str(out), *(f"--{k}={v}" for k, v in settings.items())])

    with pytest.raises(ValueError, match="size: 20, expected a multiple of the autoencoder's 8"):
        encode(forms / "photos", tmp_path / "out", size=20)
    with pytest.raises(ValueError, match="are latents already"):
        encode(forms / "latents_of_photos", tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds others .*size: 16 there, 24 here"):
        encode(forms / "photos", forms / "latents_of_photos", size=24)
    with pytest.raises(ValueError, match=r"vae: no folder 'no/such', and the Hub did not give it"):
        encode(forms / "photos", tmp_path / "out", vae="no/such")
    photos(tmp_path / "bad", each=2, size=(20, 20))
    (tmp_path / "bad" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"1.png' cannot be read"):
        encode(tmp_path / "bad", tmp_path / "out", num_workers=0)
    (tmp_path / "bad" / "dog" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"holds others .*chunk_ends"):
        encode(tmp_path / "bad", tmp_path / "out", num_workers=0)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["complete"] is False
