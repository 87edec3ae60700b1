"""Tiny sets in the layout in which the Hub keeps them."""

import io
import json
import pickle

import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.data import parquet
from lightning_diffclf.data.parquet import ParquetDataModule, ParquetImages, find_parquet
from tests.baselines.evaluation import evaluate
from tests.baselines.tiny_clip import write_clip

NAMES = ["cat", "dog", "snowy owl"]
LABELS = [0, 1, 2, 1, 0, 2, 2]


def picture(number):
    """An image whose first pixel is its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    pixels[0, 0] = number
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path, numbers, labels, names=NAMES, image="image", **settings):
    """As ``datasets`` writes a split: images as bytes and path, labels, and its features in the metadata."""
    rows = [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers]
    table = pa.table({image: rows, "label": labels})
    features = {image: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    if names is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **settings)


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "set/data/train-00000-of-00001.parquet", [90], [0])
    write(tmp_path / "set/data/test-00000-of-00002.parquet", range(5), LABELS[:5], row_group_size=2)
    write(tmp_path / "set/data/test-00001-of-00002.parquet", range(5, 7), LABELS[5:])
    return tmp_path / "set"


def test_images_labels_and_names_come_with_the_data(root, tmp_path):
    data = ParquetDataModule(str(root), eval_batch_size=2, num_workers=0)
    rows, report = evaluate(tmp_path / "out", ZeroShotCLIP(write_clip(tmp_path / "clip"), "a {}"), data)
    assert dict(zip(map(int, rows["id"]), rows["label"], strict=True)) == dict(enumerate(LABELS))
    assert report["settings"]["class_names"] == NAMES
    assert data.class_names == NAMES
    assert len(ParquetDataModule(str(root), per_class=1)._positions()) == 3


def test_training_takes_the_split_for_it(root):
    batch = next(iter(ParquetDataModule(str(root), size=8, batch_size=2, num_workers=0).train_dataloader()))
    assert batch["label"].tolist() == [0, 0]  # the only one, in two passes
    assert batch["image"].shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="is one file, expected a folder or repository with one for 'train' too"):
        ParquetDataModule(str(root / "data/test-00000-of-00002.parquet"), size=8).train_dataloader()


def test_rows_in_any_order_and_in_workers(root, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH", 1)  # row groups have two rows
    source = ParquetImages(find_parquet(str(root), "test"))
    assert (len(source), source.targets, source.classes) == (7, LABELS, NAMES)
    for index in (0, 1, 2, 6, 3, 3, 0, 5, 4):
        image, label = source[index]
        assert image.getpixel((0, 0)) == (index,) * 3
        assert label == LABELS[index]
    again = pickle.loads(pickle.dumps(source))
    assert again[4][0].tobytes() == source[4][0].tobytes()


def test_labels_that_are_names_and_images_that_are_bytes(tmp_path):
    rows = [picture(i) for i in range(3)]
    pq.write_table(pa.table({"img": rows, "fine": ["owl", "cat", "owl"]}), tmp_path / "one.parquet")
    data = ParquetDataModule(str(tmp_path / "one.parquet"), image="img", label="fine", class_names=["a cat", "an owl"])
    assert (data.source.targets, data.class_names) == ([1, 0, 1], ["a cat", "an owl"])
    assert data.source[2][0].getpixel((0, 0)) == (2, 2, 2)


def test_which_files_are_of_a_split(tmp_path):
    for name in ("a/test/0000.parquet", "b/test/0000.parquet", "a/train/0000.parquet", "a/latest/0000.parquet"):
        write(tmp_path / name, [1], [0])

    def found(**how):
        return [path.relative_to(tmp_path).as_posix() for path in find_parquet(str(tmp_path), **how)]

    assert found(split="test") == ["a/test/0000.parquet", "b/test/0000.parquet"]
    assert found(split="test", config="b") == ["b/test/0000.parquet"]
    with pytest.raises(FileNotFoundError, match=r"no Parquet files of split 'val' \(config None\); found \['a/latest"):
        found(split="val")


def test_the_hub_is_asked_for_one_split(root, monkeypatch):
    asked = []

    def download(name, **how):
        asked.append((name, how["repo_type"], how["revision"], how["allow_patterns"]))
        if name == "who/nothing":
            raise OSError("404 Client Error\nmore")
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(find_parquet("who/what", "test", revision="refs/convert/parquet")) == 2
    assert asked == [("who/what", "dataset", "refs/convert/parquet", ["*test*.parquet", "*test/*.parquet"])]
    with pytest.raises(FileNotFoundError, match=r"did not give a data set of that name \(404 Client Error\)"):
        find_parquet("who/nothing", "test")


def test_what_cannot_be_read(root, tmp_path, monkeypatch):
    def refused(message, path, error=ValueError, **columns):
        with pytest.raises(error, match=message):
            ParquetDataModule(str(path), **columns).source.__getitem__(0)

    file = tmp_path / "one.parquet"
    refused("it has no column 'picture', but 'image', 'label'", root, image="picture")
    write(file, [1], [3])
    refused("labels 3 … 3 of 1 images .*, expected some of 0 … 2", file)
    write(file, [1], [-1])
    refused("labels -1 … -1", file)
    write(file, [1], [0], names=None)
    refused("class_names: none given, and .* does not say what its labels are called", file)
    write(file, [1], [0.5])
    refused("is double with 0 empty values, expected whole numbers or names", file)
    write(file, [1, 2], [0, None])
    refused("with 1 empty values", file)
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [0]}), file)
    refused("row 0 of .* has no bytes in column 'image', expected an image in the file itself", file, class_names=["a"])
    pq.write_table(pa.table({"image": [b"no image"], "label": [0]}), file)
    refused("image: row 0 of .* cannot be read", file, class_names=["a"])
    file.write_bytes(b"PAR1 and no more PAR1")
    refused("one.parquet' cannot be read", file)
    write(file, [1], [0])
    file.write_bytes(file.read_bytes()[:-50])
    refused("one.parquet' cannot be read", file)
    monkeypatch.setattr(parquet, "MAX_ROWS", 6)
    refused("7 rows, expected at most 6", root)
    monkeypatch.setattr(parquet, "MAX_GROUP", 10)
    refused("row group 0 of more than 10 bytes", tmp_path / "set/data/train-00000-of-00001.parquet")
