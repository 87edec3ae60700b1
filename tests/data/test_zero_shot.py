import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torchvision import datasets

from lightning_diffclf.data.public_sets import CATS, PUBLIC_SETS
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import UserError
from lightning_diffclf.modules.conditions import conditions


def folder(root, classes, each=3, size=(12, 10)):
    rng = np.random.default_rng(0)
    for c in classes:
        (root / c).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / c / f"{i}.png")
    return str(root)


def module(root, **settings) -> ZeroShotDataModule:
    data = ZeroShotDataModule(root=root, size=8, num_workers=0, **settings)
    data.setup()
    return data


def test_a_folder_for_each_class(tmp_path):
    data = module(folder(tmp_path, ["dog", "cat"]), eval_batch_size=4)
    assert data.class_names == ["cat", "dog"]
    batches = list(data.test_dataloader())
    assert torch.cat([b["label"] for b in batches]).tolist() == [0, 0, 0, 1, 1, 1]
    assert [i for b in batches for i in b["id"]] == list(range(6))
    assert batches[0]["image"].shape == (4, 3, 8, 8)
    assert ZeroShotDataModule(root=str(tmp_path), class_names=["Katze", "Hund"]).class_names == ["Katze", "Hund"]
    with pytest.raises(ValueError, match="class_names: 1, expected 2"):
        _ = ZeroShotDataModule(root=str(tmp_path), class_names=["Katze"]).class_names


def test_subsets_keep_the_ids(tmp_path):
    root = folder(tmp_path / "data", ["a", "b", "c"], each=5)
    (tmp_path / "subset.txt").write_text("3\n14\n7\n")
    assert [row["id"] for row in module(root, subset=str(tmp_path / "subset.txt")).test] == [3, 14, 7]
    some = module(root, per_class=2, seed=1).test
    assert [some[i]["label"] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert some.positions == module(root, per_class=2, seed=1).test.positions
    assert some.positions != module(root, per_class=2, seed=2).test.positions
    for text, found in (("99\n", "99"), ("x\n", "x"), ("", ""), ("1\n1\n", "")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=rf"subset: .*{found}.*expected different ones of 0 … 14"):
            module(root, subset=str(tmp_path / "bad.txt"))
    with pytest.raises(FileNotFoundError, match="subset: no file"):
        module(root, subset=str(tmp_path / "none.txt"))


def test_imagenet_by_wordnet_id_and_by_number(tmp_path):
    wordnet = ImageNetInfo().label_names()
    data = module(folder(tmp_path / "a", [wordnet[7], wordnet[3]]), name="imagenet")
    assert sorted(data.source.imagenet) == [[3], [7]]
    assert set(data.class_names) == {"tiger shark", "cock"}
    for position, label in ((0, 0), (3, 1)):
        assert data.source[position][1] == label
    numbered = module(folder(tmp_path / "v2", ["10", "2", "0"], each=1), name="imagenet")
    assert numbered.source.imagenet == [[0], [2], [10]]
    assert [row["label"] for row in numbered.test] == [0, 1, 2]
    assert [path.parent.name for path, _ in numbered.source.files] == ["0", "2", "10"]
    with pytest.raises(ValueError, match=r"folder 'cats' in .* is no class of ImageNet"):
        module(folder(tmp_path / "x", ["cats"]), name="imagenet")


def test_objectnet_without_its_frame(tmp_path):
    folder(tmp_path / "images", ["air_freshener", "alarm_clock", "backpack"], each=2, size=(20, 24))
    with pytest.raises(FileNotFoundError, match="which belongs to ObjectNet"):
        module(str(tmp_path), name="objectnet")
    (tmp_path / "mappings").mkdir()
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Alarm clock": "analog clock; digital clock", "Backpack": "backpack"}
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    data = module(str(tmp_path), name="objectnet")
    assert data.class_names == ["Alarm clock", "Backpack"]
    assert [row["label"] for row in data.test] == [0, 0, 1, 1]
    assert data.source[0][0].size == (20, 16)
    # the 1,000 classes by way of ObjectNet's own numbers of them, which are not torchvision's
    with pytest.raises(FileNotFoundError, match="imagenet_to_label_2012_v2"):
        data.network_classes  # noqa: B018
    (tmp_path / "mappings" / "imagenet_to_label_2012_v2").write_text("backpack\ndigital clock\nanalog clock\n")
    (tmp_path / "mappings" / "pytorch_to_imagenet_2012_id.json").write_text('{"409": 2, "530": 1, "414": 0}')
    assert data.network_classes == [[409, 530], [414]]
    asked = conditions(1000, None, data)
    assert asked.rows.tolist() == [409, 530, 414]
    assert asked.candidates.classes == (0, 0, 1)
    assert asked.candidates.names == ("Alarm clock (409)", "Alarm clock (530)", "Backpack")
    (tmp_path / "mappings" / "pytorch_to_imagenet_2012_id.json").write_text('{"409": 2}')
    with pytest.raises(ValueError, match="is no class in"):
        data.network_classes  # noqa: B018


def test_torchvisions_sets_open_as_torchvision_has_them(tmp_path):
    """Real files in torchvision's formats, made here: CIFAR-10, and the names that prompts need."""
    import hashlib
    import pickle

    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (20, 3072), dtype=np.uint8)
    content = pickle.dumps({"data": images, "labels": [i % 10 for i in range(20)]})
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (base / "test_batch").write_bytes(content)
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    data = ZeroShotDataModule("cifar10", str(tmp_path), size=32, num_workers=0)
    with pytest.raises(FileNotFoundError, match="no images of 'cifar10' in "):
        data.setup()  # checksums of the published files
    digest = hashlib.md5(content).hexdigest()
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.CIFAR10, "test_list", [["test_batch", digest]])
        patch.setattr(datasets.CIFAR10, "train_list", [])
        patch.setattr(datasets.CIFAR10, "meta", meta)
        data.setup()
    assert data.class_names == names
    row = data.test[13]
    assert (row["label"], row["id"]) == (3, 13)
    expected = images[13].reshape(3, 32, 32) / 127.5 - 1
    np.testing.assert_allclose(row["image"], expected, atol=1e-6)


def test_a_download_that_fails_says_what_to_do(tmp_path, monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("urllib.request._opener", None)  # which remembers the proxies that there were
    data = ZeroShotDataModule("pets", str(tmp_path), size=32, download=True)
    with pytest.raises(UserError, match=r"^data: torchvision did not get the images of 'pets' \(.*refused.*\); check"):
        data.setup()
    with pytest.raises(UserError, match=r"did not get the training images of 'pets'"):
        data.train_dataloader()


def test_names_of_pets_have_their_species():
    class Pets:
        classes = ("Abyssinian", "American Bulldog", "Pug", "Sphynx")

    names = PUBLIC_SETS["pets"].names(Pets())
    assert names == ["Abyssinian cat", "American Bulldog", "Pug dog", "Sphynx cat"]
    assert len(CATS) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cifar"}, "data: 'cifar', expected 'folder', 'webdataset' or one of"),
        ({"eval_batch_size": 0}, "eval_batch_size: 0"),
        ({"per_class": 0}, "per_class: 0"),
        ({"per_class": 1, "subset": "x"}, "no subset file beside it"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ZeroShotDataModule(**settings)


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data: no folder .*/none', expected one with a folder of images"):
        module(str(tmp_path / "none"))
    for name, where in (("imagenet", "WordNet id .image-net.org, an account."), ("objectnet", "objectnet.dev")):
        with pytest.raises(FileNotFoundError, match=rf"data: no folder .*, expected .*{where}"):
            ZeroShotDataModule(name, str(tmp_path / "none"), size=32).setup()
    with pytest.raises(ValueError, match="has no folders, expected one for each class"):
        module(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match=r"cat' has no image"):
        module(str(tmp_path))
    for part in ("train", "test"):
        (tmp_path / "divided" / part / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"the parts of a data set \('test', 'train'\), .* such as those in '.*/test'"):
        module(str(tmp_path / "divided"))


def shards(folder, count=7, per_shard=3):
    from webdataset import ShardWriter

    rng = np.random.default_rng(0)
    with ShardWriter(f"{folder}/val-%06d.tar", maxcount=per_shard, verbose=0) as writer:
        for i in range(count):
            pixels = Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype=np.uint8))
            writer.write({"__key__": f"image{i:03d}", "png": pixels, "cls": i % 2})
    return str(folder)


def test_shards_of_webdataset(tmp_path):
    root = shards(tmp_path)
    for pattern in (root, f"{root}/val-{{000000..000002}}.tar"):
        data = module(pattern, name="webdataset", class_names=["cat", "dog"], eval_batch_size=3)
        batches = list(data.test_dataloader())
        assert [i.rpartition("/")[2] for b in batches for i in b["id"]] == [f"image{i:03d}" for i in range(7)]
        assert batches[0]["id"][0] == "val-000000/image000"
        assert torch.cat([b["label"] for b in batches]).tolist() == [0, 1, 0, 1, 0, 1, 0]
        assert batches[0]["image"].shape == (3, 3, 8, 8)
    many = ZeroShotDataModule("webdataset", root, size=8, num_workers=2, class_names=["cat", "dog"])
    many.setup()
    assert sorted(i.rpartition("/")[2] for b in many.test_dataloader() for i in b["id"]) == [
        f"image{i:03d}" for i in range(7)
    ]
    with pytest.raises(FileNotFoundError, match=r"no shard .*val-000003.tar"):
        module(f"{root}/val-{{000000..000003}}.tar", name="webdataset")
    with pytest.raises(ValueError, match="class_names: none given"):
        _ = ZeroShotDataModule("webdataset", root).class_names
    with pytest.raises(ValueError, match="expected no subset and no per_class"):
        ZeroShotDataModule("webdataset", root, per_class=3)


def test_shards_without_labels_are_named(tmp_path):
    from webdataset import ShardWriter

    with ShardWriter(f"{tmp_path}/x-%06d.tar", verbose=0) as writer:
        writer.write({"__key__": "lonely", "png": Image.new("RGB", (9, 9))})
    with pytest.raises(ValueError, match=r"sample lonely in .*expected an image \(jpg, png, …\) and cls"):
        list(module(str(tmp_path), name="webdataset").test_dataloader())


class Network:
    native_size = (8, 12)


def test_the_size_is_the_modules_own_unless_given(tmp_path):
    root = folder(tmp_path, ["a", "b"])
    own, given, other = (ZeroShotDataModule(root=root, size=size, num_workers=0) for size in (None, (8, 12), 8))
    own.setup()  # without a module
    assert own.test[0]["image"].shape == (3, 512, 512)
    for data in (own, given, other):
        data.trainer = SimpleNamespace(lightning_module=Network())
        data.setup()
    assert [tuple(data.test[0]["image"].shape) for data in (own, given, other)] == [(3, 8, 12), (3, 8, 12), (3, 8, 8)]
    assert own.identity() == given.identity() != other.identity()


@pytest.mark.parametrize(("size", "said"), [(8, 8), ((8, 8), 8), ((8, 12), [8, 12])])
def test_the_identity_has_the_size(size, said, tmp_path):
    data = ZeroShotDataModule(root=folder(tmp_path, ["a"]), size=size)
    assert data.identity()["size"] == said


def test_training_images_are_those_of_the_set_prepared_as_its_test_images(tmp_path):
    """ImageNet's are beside its validation set; an optimizer step is the same however it is divided."""
    wordnet = ImageNetInfo().label_names()
    folder(tmp_path / "train", wordnet[3:5], each=5)
    root = folder(tmp_path / "val", wordnet[3:5], each=2)
    data = module(root, name="imagenet", batch_size=5, flip=True)
    assert (data.num_classes, data.image_shape) == (2, (3, 8, 8))
    batches = iter(data.train_dataloader())
    seen = [next(batches), next(batches)]
    assert sorted(i for batch in seen for i in batch["id"]) == list(range(10))  # one pass
    trained = module(str(tmp_path / "train"), name="imagenet").test
    mirrored = 0
    for batch in seen:
        for image, label, i in zip(batch["image"], batch["label"], batch["id"], strict=True):
            own = trained[i]["image"]
            assert label == trained[i]["label"]
            mirrored += not torch.equal(image, own)
            assert torch.allclose(image, own, atol=1e-6) or torch.allclose(image, own.flip(-1), atol=0.02)
    assert 0 < mirrored < 10
    with pytest.raises(ValueError, match=r"ZeroShotDataModule has no training images of 'folder' in .*, or a set that"):
        module(root).train_dataloader()
    (tmp_path / "train" / wordnet[4]).rename(tmp_path / "train" / wordnet[5])
    with pytest.raises(ValueError, match=r"data: training images of classes \['tiger shark', 'electric ray'\], but"):
        data.train_dataloader()
