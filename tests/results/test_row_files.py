"""Parts of a run: what others read of them, what damage is found, and what a part of others may not claim."""

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from lightning_diffclf.errors import UserError
from lightning_diffclf.results.parts import Parts
from lightning_diffclf.results.predictions import SCHEMA, from_table, to_table, write_table
from lightning_diffclf.results.row_files import MARK, _crc, _footer, opened, write_part
from lightning_diffclf.results.seal import Damaged
from tests.fuzz.mutations import damaged
from tests.results.made_up import made_up_rows

TABLE = to_table(list(made_up_rows(12, 5)))


def read(path: Path, names: list[str] = SCHEMA.names) -> pa.Table:
    with opened(path) as file:
        return file.read(0, [SCHEMA.field(name) for name in names])


def sealed(whole: bytes) -> bytes:
    """An Arrow file of others, with a good checksum."""
    view = memoryview(whole)
    place = _footer(view)
    return whole[:place] + MARK + b"%08x" % _crc(view[:place], view[place:]) + whole[place:]


def arrow_file(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as out:
        out.write_table(table)
    return sink.getvalue().to_pybytes()


def test_a_part_says_what_a_parquet_file_says_and_programs_of_others_read_it(tmp_path):
    write_part(TABLE.replace_schema_metadata({b"a": b"b"}), tmp_path / "one.arrow")
    write_table(TABLE, tmp_path / "one.parquet")
    assert read(tmp_path / "one.arrow").equals(TABLE)
    assert read(tmp_path / "one.arrow").equals(read(tmp_path / "one.parquet"))
    some = ["id", "scores_K", "trail", "thumbnail"]
    assert read(tmp_path / "one.arrow", some).equals(TABLE.select(some))
    with opened(tmp_path / "one.arrow") as file:
        assert file.schema.metadata == {b"a": b"b"}
    assert pl.read_ipc(tmp_path / "one.arrow")["id"].to_list() == TABLE["id"].to_pylist()
    assert pd.read_feather(tmp_path / "one.arrow")["nfe"].tolist() == TABLE["nfe"].to_pylist()
    assert [row.id for row in from_table(read(tmp_path / "one.arrow"))] == TABLE["id"].to_pylist()


def test_some_columns_do_not_keep_the_whole_in_memory(tmp_path):
    thumbnails = pa.array([b"\xff" * 1_000_000] * len(TABLE), pa.binary())
    write_part(TABLE.set_column(SCHEMA.get_field_index("thumbnail"), "thumbnail", thumbnails), tmp_path / "one.arrow")
    before = pa.total_allocated_bytes()
    found = read(tmp_path / "one.arrow", ["id", "label"])
    assert pa.total_allocated_bytes() - before < 10_000
    assert found.equals(TABLE.select(["id", "label"]))


def test_every_byte_counts(tmp_path):
    write_part(TABLE, tmp_path / "whole.arrow")
    whole = (tmp_path / "whole.arrow").read_bytes()
    path = tmp_path / "broken.arrow"
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(Damaged):
            read(path)
    for size in (0, 5, 24, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(Damaged):
            read(path)


def test_damage_with_a_good_checksum_is_an_error_or_a_table(tmp_path):
    rng, usual, path = np.random.default_rng(0), arrow_file(TABLE), tmp_path / "broken.arrow"
    refused = 0
    for _ in range(400):
        try:
            path.write_bytes(sealed(damaged(usual, rng)))
            read(path).to_pydict()
        except (Damaged, pa.ArrowException, OSError, KeyError, UnicodeDecodeError):
            refused += 1
    assert refused > 100


def test_what_would_fill_the_memory_is_refused(tmp_path):
    path, many = tmp_path / "bomb.arrow", 30_000_000
    zeros = TABLE.slice(0, 1).set_column(SCHEMA.get_field_index("thumbnail"), "thumbnail", pa.array([bytes(many)]))
    path.write_bytes(sealed(arrow_file(zeros, compression="zstd")))
    assert path.stat().st_size < 2**18
    with pytest.raises(Damaged, match="it is compressed"):
        read(path)
    path.write_bytes(sealed(arrow_file(pa.table({"id": pa.nulls(many)}))))
    with pytest.raises(Damaged, match="its id are of type null, expected string"):
        read(path, ["id"])
    with opened(path) as file, pytest.raises(Damaged, match="claims to hold 30,000,000 rows"):
        file.read(0, list(file.schema))
    coded = TABLE.set_column(0, "id", TABLE["id"].dictionary_encode())
    path.write_bytes(sealed(arrow_file(coded)))
    with pytest.raises(Damaged, match="expected"):
        read(path)


@pytest.mark.parametrize("column", ["other", "id"])
def test_a_part_of_others_with_strange_columns_is_one_error(column, tmp_path):
    ids = pa.chunked_array([["a", "b"]])
    path = tmp_path / "strange.arrow"
    path.write_bytes(sealed(arrow_file(pa.Table.from_arrays([ids, ids], [column, column]))))
    with pytest.raises(UserError, match=r"strange.arrow' cannot be read .*remove it"):
        Parts([path], SCHEMA)
