"""Files that were damaged are refused, or say what they said: never other numbers in silence."""

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws
from lightning_diffclf.callbacks.checkpoint_io import AtomicCheckpointIO
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.errors import ErrorsInfo, ErrorsWriter, StoredErrors, merge_errors
from lightning_diffclf.results.seal import sealed_file
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.stored import PREDICTIONS, read_table
from tests.classifier.toys import Toy, some_images
from tests.fuzz.mutations import damaged, rounds
from tests.results.made_up import made_up_rows, made_up_run

number = itertools.count()


def digest(value) -> str:
    """A name of plain values, tensors and arrays."""
    if isinstance(value, torch.Tensor):
        return digest(value.detach().contiguous().view(-1).numpy())
    if isinstance(value, np.ndarray):
        return hashlib.sha256(
            f"{value.dtype} {value.shape}".encode() + np.ascontiguousarray(value).tobytes()
        ).hexdigest()
    if isinstance(value, dict):
        return digest([[digest(key), digest(one)] for key, one in value.items()])
    if isinstance(value, (list, tuple)):
        return hashlib.sha256(" ".join(map(digest, value)).encode()).hexdigest()
    return hashlib.sha256(repr(value).encode()).hexdigest()


def checkpoint(folder: Path) -> tuple[bytes, Callable[[bytes], str]]:
    model = ClassConditionalDiT(
        input_size=8, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=10, latents=False,
        learn_sigma=False,
    )  # fmt: skip
    saved = {"state_dict": model.state_dict(), "global_step": 7, "hyper_parameters": dict(model.hparams)}
    AtomicCheckpointIO().save_checkpoint(saved, folder / "whole.ckpt")

    def read(content: bytes) -> str:
        path = folder / f"{next(number)}.ckpt"
        path.write_bytes(content)
        try:
            return digest(AtomicCheckpointIO().load_checkpoint(path))
        finally:
            path.unlink()

    return (folder / "whole.ckpt").read_bytes(), read


def predictions(folder: Path) -> tuple[bytes, Callable[[bytes], str]]:
    run = made_up_run(folder / "run", made_up_rows(20, 5), 5)
    settings = Settings.read(run)

    def read(content: bytes) -> str:
        path = run / PREDICTIONS
        path.unlink()  # so that it is another file
        keep = run / f"keep{next(number)}"
        path.write_bytes(content)
        table = read_table(run, settings)
        path.rename(keep)
        keep.replace(path)
        return digest(table.to_pydict())

    return (run / PREDICTIONS).read_bytes(), read


def errors(folder: Path) -> tuple[bytes, Callable[[bytes], str]]:
    classifier = DiffusionClassifier(Toy(), Draws(5), keep_errors=True, keep_distances=True)
    writer = ErrorsWriter(folder / "whole.parquet", ErrorsInfo.of(classifier), distances=True)
    for label, result in enumerate(classifier(some_images(6))):
        writer.add(result, label)
    writer.close()

    def read(content: bytes) -> str:
        path = folder / f"{next(number)}.parquet"
        path.write_bytes(content)
        try:
            stored = StoredErrors(path)
            rows = [[getattr(one, name) for name in vars(one)] for one in stored]
            return digest([stored.info.to_json(), rows])
        finally:
            path.unlink()

    return (folder / "whole.parquet").read_bytes(), read


@pytest.mark.parametrize("make", [checkpoint, predictions, errors])
def test_no_damage_becomes_other_numbers(make, tmp_path):
    content, read = make(tmp_path)
    expected = read(content)
    rng = np.random.default_rng(0)
    refused = 0
    for attempt in range(rounds(60)):
        broken = damaged(content, rng)
        try:
            found = read(broken)
        except UserError:
            refused += 1
        else:
            assert found == expected, f"attempt {attempt} is read as something else"
    assert refused > 0.8 * rounds(60)


def test_the_seal_is_of_every_byte_and_others_can_read_it(tmp_path):
    content, read = errors(tmp_path)
    path = tmp_path / "whole.parquet"
    with sealed_file(path):
        pass
    with pq.ParquetFile(path) as file:
        assert file.metadata.metadata[b"diffclf_crc32"] != b"0" * 8
        assert file.read().num_rows == 6
    for place in range(0, len(content), 97):
        broken = bytearray(content)
        broken[place] ^= 1
        with pytest.raises(UserError):
            read(bytes(broken))
    merge_errors([path], tmp_path / "merged.parquet")
    with sealed_file(tmp_path / "merged.parquet"):
        pass
    with pq.ParquetFile(tmp_path / "merged.parquet") as file:
        assert b"diffclf_crc32" in file.metadata.metadata


def test_files_of_earlier_versions_have_no_seal_and_are_read(tmp_path):
    content, read = errors(tmp_path)
    table = pq.read_table(tmp_path / "whole.parquet")
    metadata = {name: value for name, value in table.schema.metadata.items() if name != b"diffclf_crc32"}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "old.parquet")
    assert read((tmp_path / "old.parquet").read_bytes()) == read(content)


def test_a_small_file_of_many_rows_does_not_fill_the_memory(tmp_path):
    run = made_up_run(tmp_path / "run", made_up_rows(5, 5), 5)
    million = pa.table({"id": pa.array(["a"]).take(pa.array(np.zeros(1_000_000, dtype=np.int64)))})
    with pq.ParquetWriter(run / "bomb.parquet", pa.schema([("id", pa.string())]), compression="zstd") as out:
        for _ in range(30):
            out.write_table(million)
    (run / "bomb.parquet").replace(run / PREDICTIONS)
    assert (run / PREDICTIONS).stat().st_size < 2**18
    for read in (lambda: read_table(run), lambda: StoredErrors(run / PREDICTIONS)):
        with pytest.raises(UserError, match="claims to hold 30,000,000 values"):
            read()


@pytest.mark.parametrize(
    "values", [b"", b"3", b"{}", b"[" * 100_000, b'{"draws": 1}', json.dumps({"loss": 1, "draws": 1, "x": 2}).encode()]
)
def test_errors_with_strange_descriptions_are_one_error(values, tmp_path):
    errors(tmp_path)
    table = pq.read_table(tmp_path / "whole.parquet")
    pq.write_table(table.replace_schema_metadata({b"diffclf": values}), tmp_path / "strange.parquet")
    with pytest.raises(UserError, match="cannot be read"):
        StoredErrors(tmp_path / "strange.parquet")
    info = {b"diffclf": table.schema.metadata[b"diffclf"]}
    pq.write_table(table.drop_columns(["errors"]).replace_schema_metadata(info), tmp_path / "less.parquet")
    with pytest.raises(UserError, match="holds no errors"):
        StoredErrors(tmp_path / "less.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="no Parquet file"):
        StoredErrors(tmp_path / "text.parquet")
