"""Parquet files of others: as much memory as a few images, whatever they claim; nothing that they name is opened."""

import builtins
import io
import json
import resource

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lightning_diffclf.data.parquet import ParquetDataModule, ParquetImages
from lightning_diffclf.errors import UserError
from tests.security.test_images import png


def picture(side: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_one_image_a_hundred_thousand_times_is_read_a_few_at_a_time(tmp_path):
    """Two megabytes, of which a reader makes a hundred gigabytes if it wants all of them."""
    image, count = picture(600), 100_000
    column = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([image]))
    table = pa.table({"image": column, "label": np.zeros(count, np.int64)})
    pq.write_table(table, tmp_path / "bomb.parquet", store_schema=False)
    assert (tmp_path / "bomb.parquet").stat().st_size < 3_000_000
    source = ParquetImages([tmp_path / "bomb.parquet"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes
    assert source[100][0].size == (600, 600)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def test_a_picture_of_a_billion_pixels(tmp_path):
    pq.write_table(pa.table({"image": [png(30_000, 30_000)], "label": [0]}), tmp_path / "bomb.parquet")
    with pytest.raises(UserError, match=r"row 0 of .* cannot be read .*pixels"):
        ParquetImages([tmp_path / "bomb.parquet"]).__getitem__(0)


def test_a_path_in_a_file_is_not_opened(tmp_path, monkeypatch):
    file = tmp_path / "one.parquet"
    (tmp_path / "secret.png").write_bytes(picture(8))
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}]
    pq.write_table(pa.table({"image": rows, "label": [0]}), file)
    source = ParquetImages([file])

    def opened(*args, **settings):
        raise AssertionError(f"opened {args}")

    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(UserError, match="has no bytes in column 'image'"):
        source.__getitem__(0)


@pytest.mark.parametrize(
    "metadata",
    [b"\xff\xfe", b"[" * 100_000, b'{"info": {"features": {"label": {"names": 3}}}}', b'{"info": []}', b"null"],
    ids=range(5),
)
def test_metadata_that_make_no_sense_name_no_classes(metadata, tmp_path):
    table = pa.table({"image": [picture(8)], "label": [0]}).replace_schema_metadata({b"huggingface": metadata})
    pq.write_table(table, tmp_path / "one.parquet")
    assert ParquetImages([tmp_path / "one.parquet"]).classes == []
    with pytest.raises(UserError, match="class_names: none given"):
        _ = ParquetDataModule(str(tmp_path / "one.parquet")).source


def test_names_are_text(tmp_path):
    features = json.dumps({"info": {"features": {"label": {"names": ["<b>", 7, None]}}}})
    table = pa.table({"image": [picture(8)], "label": [0]}).replace_schema_metadata({"huggingface": features})
    pq.write_table(table, tmp_path / "one.parquet")
    assert ParquetImages([tmp_path / "one.parquet"]).classes == ["<b>", "7", "None"]
