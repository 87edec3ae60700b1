"""The folder of a run: kills, joins, and what can be wrong with it."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count, product
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_diffclf import DiffusionClassifier, Draws, files
from lightning_diffclf.errors import UserError
from lightning_diffclf.results import parts as parts_module
from lightning_diffclf.results.errors import ErrorsInfo, StoredErrors
from lightning_diffclf.results.parts import Parts
from lightning_diffclf.results.predictions import SCHEMA, Record, from_table, to_table, write_table
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import Store, claim, finish, merge
from lightning_diffclf.results.stored import read_table, scan
from tests.classifier.toys import Toy, some_images

ROOT = Path(__file__).parents[2]
SETTINGS = Settings({"draws": 6, "loss": "l2"}, {"candidate_classes": [0, 1, 2, 3, 4]})


def decisions(count: int, first: int = 0):
    classifier = DiffusionClassifier(Toy(), Draws(6), keep_errors=True)
    results = list(classifier(some_images(count), ids=range(first, first + count)))
    rows = [
        Record.of(r, range(5), classifier.terms.weights_S, label=i % 5, seconds=0.5, rank=0, thumbnail=b"RIFF")
        for i, r in enumerate(results)
    ]
    return classifier, results, rows


def fill(folder: Path, count: int, first: int = 0, settings: Settings = SETTINGS, **kwargs) -> Store:
    _, results, rows = decisions(count, first)
    store = Store(claim(folder, settings), settings, **kwargs)
    for row, result in zip(rows, results, strict=True):
        store.add(row, result)
    store.flush()
    return store


# --- writing and reading -------------------------------------------------------------------------------------------


def test_what_goes_in_comes_out(tmp_path):
    _, _, rows = decisions(7)
    rows[2] = replace(rows[2], label=None, prediction=None, margin=float("inf"))
    rows[3] = replace(rows[3], error_map=np.arange(6, dtype=np.float32).reshape(2, 3), thumbnail=None)
    for row, back in zip(rows, from_table(to_table(rows)), strict=True):
        for name in Record.__dataclass_fields__:
            a, b = getattr(row, name), getattr(back, name)
            np.testing.assert_array_equal(a, b) if isinstance(a, np.ndarray) else None
            assert isinstance(a, np.ndarray) or a == b, name


def test_parts_then_one_file(tmp_path):
    store = fill(tmp_path / "run", 7, flush_every=3)
    parts = sorted((tmp_path / "run" / "parts").iterdir())
    assert [len(pl.read_ipc(p)) for p in parts] == [3, 3, 1]
    before = read_table(tmp_path / "run")
    assert finish(tmp_path / "run", SETTINGS) == 7
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"settings.json", "predictions.parquet"}
    assert read_table(tmp_path / "run").equals(before)
    assert Store(tmp_path / "run", SETTINGS).finished == {str(i) for i in range(7)}
    assert store.finished == set()


def test_interrupted_finish_is_done_again(tmp_path):
    fill(tmp_path / "run", 4, flush_every=2)
    shutil.copytree(tmp_path / "run" / "parts", tmp_path / "kept")
    finish(tmp_path / "run", SETTINGS)
    table = read_table(tmp_path / "run")
    shutil.copytree(tmp_path / "kept", tmp_path / "run" / "parts")  # predictions were written, parts not removed
    assert finish(tmp_path / "run", SETTINGS) == 4
    assert read_table(tmp_path / "run").equals(table)
    assert not (tmp_path / "run" / "parts").exists()


def test_slow_images_are_written_after_a_minute(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    _, results, rows = decisions(3)
    store = Store(claim(tmp_path / "run", SETTINGS), SETTINGS, flush_every=1000)
    for row, result, now in zip(rows, results, (30.0, 61.0, 70.0), strict=True):
        clock[0] = now
        store.add(row, result)
    assert read_table(tmp_path / "run")["id"].to_pylist() == ["0", "1"]


def test_pandas_polars_and_duckdb_read_it_as_it_is(tmp_path):
    fill(tmp_path / "run", 5)
    finish(tmp_path / "run", SETTINGS)
    path = tmp_path / "run" / "predictions.parquet"
    expected = from_table(pq.read_table(path))
    frames = pd.read_parquet(path), pl.read_parquet(path).to_pandas(), duckdb.sql(f"select * from '{path}'").df()
    for frame in frames:
        assert frame["id"].tolist() == [row.id for row in expected]
        assert frame["prediction"].tolist() == [row.prediction for row in expected]
        np.testing.assert_allclose(np.stack(frame["scores_K"]), np.stack([row.scores_K for row in expected]))


# --- joining -------------------------------------------------------------------------------------------------------


def test_runs_merge_to_exact_counts(tmp_path):
    classifier, *_ = decisions(1)
    errors = ErrorsInfo.of(classifier)
    fill(tmp_path / "a", 5, flush_every=2, errors=errors)
    fill(tmp_path / "b", 4, first=5, errors=errors)
    finish(tmp_path / "b", SETTINGS)
    assert merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all") == 9
    table = read_table(tmp_path / "all")
    assert table["id"].to_pylist() == [str(i) for i in range(9)]
    assert [one.image_id for one in StoredErrors(tmp_path / "all" / "errors.parquet")] == table["id"].to_pylist()
    assert merge([tmp_path / "all", tmp_path / "a"], tmp_path / "all") == 9  # duplicates agree
    assert read_table(tmp_path / "all").equals(table)
    assert merge([tmp_path / "a"], tmp_path / "a") == 5  # a killed run becomes whole
    assert not (tmp_path / "a" / "parts").exists()


def test_merging_keeps_what_the_folder_had(tmp_path):
    classifier, *_ = decisions(1)
    errors = ErrorsInfo.of(classifier)
    fill(tmp_path / "all", 3, errors=errors)
    fill(tmp_path / "more", 2, first=3, errors=errors)
    assert merge([tmp_path / "more"], tmp_path / "all") == 5  # into the parts of a killed run
    fill(tmp_path / "last", 2, first=5, errors=errors)
    assert merge([tmp_path / "last"], tmp_path / "all") == 7  # into a whole
    ids = [str(i) for i in range(7)]
    assert read_table(tmp_path / "all")["id"].to_pylist() == ids
    assert [one.image_id for one in StoredErrors(tmp_path / "all" / "errors.parquet")] == ids
    assert not (tmp_path / "all" / "parts").exists()
    assert (tmp_path / "more" / "parts").is_dir()  # what is only read stays as it is


def test_merging_waits_for_no_reader_but_for_who_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.0)
    fill(tmp_path / "a", 2)
    with files.FolderLock(tmp_path / "a"):  # it is running
        assert merge([tmp_path / "a"], tmp_path / "all") == 2
        with pytest.raises(UserError, match=r"'.*a' is being written to by process"):
            merge([tmp_path / "all"], tmp_path / "a")
    assert merge([tmp_path / "all"], tmp_path / "a") == 2


# --- beside other processes ----------------------------------------------------------------------------------------


def test_finish_removes_only_what_it_read(tmp_path, monkeypatch):
    fill(tmp_path / "run", 3)

    def late(self, path, **settings):  # another process writes between reading and removing
        write(self, path, **settings)
        fill(tmp_path / "run", 2, first=3)

    write = Parts.write
    monkeypatch.setattr(Parts, "write", late)
    assert finish(tmp_path / "run", SETTINGS) == 3
    assert read_table(tmp_path / "run")["id"].to_pylist() == [str(i) for i in range(5)]


@pytest.mark.parametrize(
    ("reader", "steps"),
    [*product(["read_table", "scan", "merge"], [1, 3, 5, 7]), ("merge", 12), ("merge", 16)],  # these while it writes
)
def test_a_run_that_ends_while_it_is_read_is_whole(reader, steps, tmp_path, monkeypatch):
    """After any number of files were opened, the run ends: what was parts is in another file now."""
    classifier, *_ = decisions(1)
    run, stamp, opened = tmp_path / "run", parts_module._stamp, count(1)
    fill(run, 3, errors=ErrorsInfo.of(classifier))
    finish(run, SETTINGS)
    fill(run, 6, first=3, flush_every=2, errors=ErrorsInfo.of(classifier))

    def counting(path):
        if next(opened) == steps:
            finish(run, SETTINGS)
        return stamp(path)

    monkeypatch.setattr(parts_module, "_stamp", counting)
    ids = [str(i) for i in range(9)]
    if reader == "read_table":
        assert read_table(run)["id"].to_pylist() == ids
    elif reader == "scan":
        assert [i for table in scan(run, ["label"]) for i in table["id"].to_pylist()] == ids
    else:
        shown = []

        def watch():
            shown.clear()
            return lambda table: shown.extend(table["id"].to_pylist())

        assert merge([run], tmp_path / "all", watch) == 9
        assert shown == ids  # each once, also where writing began anew
        assert read_table(tmp_path / "all")["id"].to_pylist() == ids
        assert [one.image_id for one in StoredErrors(tmp_path / "all" / "errors.parquet")] == ids
    assert next(opened) > steps


def test_runs_are_read_in_pieces(tmp_path):
    fill(tmp_path / "run", 7, flush_every=3)
    tables = list(scan(tmp_path / "run", ["nfe", "label"]))
    assert [len(table) for table in tables] == [3, 3, 1]
    assert tables[0].column_names == ["id", "label", "nfe"]
    fill(tmp_path / "run", 9, flush_every=9)  # images again, and two more
    assert sorted(i for table in scan(tmp_path / "run", ["id"]) for i in table["id"].to_pylist()) == list("012345678")
    assert from_table(tables[2])[0].scores_K is None  # columns left out
    whole = pa.concat_tables(scan(tmp_path / "run"))
    assert whole.sort_by("id").equals(read_table(tmp_path / "run"))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 2**25])
@pytest.mark.parametrize("ids", [range(-4, 36), [f"{i * 7919 % 40:02d}x" for i in range(40)]])
def test_files_in_any_order_are_joined_by_id(ids, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(parts_module, "ROW_GROUP_BYTES", 1500)
    _, _, rows = decisions(5)
    mixed = np.random.default_rng(0).permutation(40)
    named = {str(ids[i]): replace(rows[i % 5], id=str(ids[i]), nfe=int(i)) for i in mixed}
    records, paths = list(named.values()), [tmp_path / f"{i}.parquet" for i in range(7)]
    for number, path in enumerate(paths):
        write_table(to_table(records[number::7] + records[:number]), path)  # and some in several files
    whole = Parts(paths, SCHEMA)
    assert len(whole) == 40
    whole.write(tmp_path / "whole.parquet")
    table = pq.read_table(tmp_path / "whole.parquet")
    key = int if isinstance(ids, range) else str
    assert table["id"].to_pylist() == sorted(named, key=key)
    for back in from_table(table):
        assert back.nfe == named[back.id].nfe
        np.testing.assert_array_equal(back.scores_K, named[back.id].scores_K)
    assert pa.concat_tables(whole.tables(["id"])).num_rows == 40


def test_what_is_known_of_files_is_not_read_again(monkeypatch, tmp_path):
    _, _, rows = decisions(5)
    paths, old = [tmp_path / f"{i}.parquet" for i in range(3)], to_table(rows[2:4]).drop_columns("rank")
    for path, table in zip(paths, (to_table(rows[:3]), old, to_table(rows[3:])), strict=True):
        write_table(table, path)
    opened, open_it = [], parts_module.opened
    monkeypatch.setattr(parts_module, "opened", lambda path, verify: opened.append(path) or open_it(path, verify))
    first = Parts(paths[:2], SCHEMA, kept=["rank"])
    assert pa.concat_tables(first.tables(["id", "rank"])).to_pydict() == {"id": [*"0123"], "rank": [0, 0, 0, None]}
    assert opened == paths[:2]
    shutil.copy(paths[2], paths[1])  # another file of that name
    again = Parts(paths, SCHEMA, known=first)
    assert opened == [*paths[:2], *paths[1:]]
    assert pa.concat_tables(again.tables(["id", "rank"])).to_pydict() == {"id": [*"01234"], "rank": [0] * 5}


def test_columns_that_older_files_lack_are_null(tmp_path):
    _, _, rows = decisions(4)
    write_table(to_table(rows[:2]).drop_columns("dims"), tmp_path / "old.parquet")
    write_table(to_table(rows[2:]), tmp_path / "new.parquet")
    Parts([tmp_path / "old.parquet", tmp_path / "new.parquet"], SCHEMA).write(tmp_path / "whole.parquet")
    assert pq.read_table(tmp_path / "whole.parquet")["dims"].to_pylist() == [None, None, 32, 32]


def test_errors_without_rows_do_not_count(tmp_path):
    classifier, *_ = decisions(1)
    fill(tmp_path / "run", 4, flush_every=2, errors=ErrorsInfo.of(classifier))
    rows = sorted(p for p in (tmp_path / "run" / "parts").iterdir() if ".errors" not in p.name)
    rows[1].unlink()  # killed between the two
    finish(tmp_path / "run", SETTINGS)
    assert [one.image_id for one in StoredErrors(tmp_path / "run" / "errors.parquet")] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prediction", 4, "image '1': found twice, with prediction"),
        ("label", 3, "image '1': found twice, with label 1 and 3"),
        ("nfe", 3, "image '1': found twice, with nfe"),
        ("scores_K", np.arange(5.0), "image '1': found twice, with different scores"),
        ("scores_K", np.arange(4.0), "image '1': found twice, with different scores"),
    ],
)
def test_duplicates_must_agree(name, value, message, tmp_path):
    _, results, rows = decisions(3)
    if name == "prediction":
        value = (rows[1].prediction + 1) % 5
    store = Store(claim(tmp_path / "run", SETTINGS), SETTINGS)
    for some in (rows, rows[1:]):
        for row, result in zip(some, results, strict=False):
            store.add(row, result)
        store.flush()
    assert len(read_table(tmp_path / "run")) == 3
    store.add(replace(rows[1], **{name: value}), results[1])
    store.flush()
    for read in (read_table, lambda run: list(scan(run)), lambda run: finish(run, SETTINGS)):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "run")


# --- what can be wrong ---------------------------------------------------------------------------------------------


def test_other_settings_are_named(tmp_path):
    fill(tmp_path / "run", 2)
    other = Settings({"draws": 9, "loss": "l2", "budget": 5})
    message = r"the run in '.*run' was made with other ones \(draws: 6 there, 9 here; budget: None there, 5 here\)"
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", other)
    fill(tmp_path / "other", 2, settings=other)
    with pytest.raises(ValueError, match=r"'.*other' was made with other ones \(draws: 9 there, 6 here"):
        merge([tmp_path / "run", tmp_path / "other"], tmp_path / "all")
    assert not (tmp_path / "all").exists()
    foreign = next((tmp_path / "other" / "parts").iterdir())
    shutil.copy(foreign, tmp_path / "run" / "parts")
    with pytest.raises(ValueError, match=rf"{foreign.name}' belongs to a run with other settings"):
        read_table(tmp_path / "run")


def test_a_truncated_part_is_named(tmp_path):
    fill(tmp_path / "run", 4, flush_every=2)
    first, second = sorted((tmp_path / "run" / "parts").iterdir())
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=rf"{first.name}' cannot be read .*remove it, and its images will be evaluated"
    ):
        Store(tmp_path / "run", SETTINGS)
    first.unlink()
    assert Store(tmp_path / "run", SETTINGS).finished == {"2", "3"}
    assert second.is_file()


def test_errors_that_are_damaged_or_missing_are_told_with_what_helps(tmp_path):
    classifier = decisions(1)[0]
    fill(tmp_path / "run", 4, flush_every=2, errors=ErrorsInfo.of(classifier))
    errors, _ = sorted((tmp_path / "run" / "parts").glob("*.errors.parquet"))
    content = bytearray(errors.read_bytes())
    content[len(content) // 2] ^= 1
    errors.write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{errors.name}' cannot be read .*in place of .errors.parquet\), and their images"
    ):
        finish(tmp_path / "run", SETTINGS)
    shutil.copytree(tmp_path / "run", tmp_path / "less")
    (tmp_path / "less" / "parts" / errors.name).unlink()
    with pytest.warns(UserWarning, match="errors.parquet has the errors of 2 of 4 images only"):
        finish(tmp_path / "less", SETTINGS)
    errors.unlink()
    errors.with_name(errors.name.replace(".errors.parquet", ".arrow")).unlink()
    assert Store(tmp_path / "run", SETTINGS).finished == {"2", "3"}
    fill(tmp_path / "run", 2, errors=ErrorsInfo.of(classifier))
    assert finish(tmp_path / "run", SETTINGS) == len(StoredErrors(tmp_path / "run" / "errors.parquet")) == 4


def test_damaged_settings_are_told_rather_than_another_folder_taken(tmp_path):
    fill(tmp_path / "run", 2)
    path = tmp_path / "run" / "settings.json"
    path.write_bytes(path.read_bytes().replace(b"l2", b"l3"))
    with pytest.raises(UserError, match="was changed or damaged"):
        claim(tmp_path / "run", SETTINGS, next_free=True)
    assert not (tmp_path / "run-2").exists()


def test_no_run_and_no_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no settings.json in '.*nothing'"):
        read_table(tmp_path / "nothing")
    claim(tmp_path / "empty", SETTINGS)
    assert read_table(tmp_path / "empty").num_rows == 0
    with pytest.raises(ValueError, match="merge: no image in"):
        merge([tmp_path / "empty"], tmp_path / "all")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken/settings.json' cannot be read"):
        Settings.read(tmp_path / "broken")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "predictions.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"old' holds \['predictions.parquet'\] without settings.json"):
        claim(tmp_path / "old", SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file' is a file, expected a folder"):
        claim(tmp_path / "file", SETTINGS)
    with pytest.raises(ValueError, match="flush_every: 0"):
        Store(tmp_path / "empty", SETTINGS, flush_every=0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"output: '.*run' cannot be written"):
        claim(tmp_path / "run", SETTINGS)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"output: '.*file/run' cannot be written"):
        claim(tmp_path / "file" / "run", SETTINGS)


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk to fill: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_loses_nothing_that_was_written(tiny_disk):
    _, results, rows = decisions(3)
    store = Store(claim(tiny_disk / "run", SETTINGS), SETTINGS, flush_every=1)
    store.add(rows[0], results[0])
    big = replace(rows[1], thumbnail=os.urandom(100_000))
    with pytest.raises(OSError, match=r"cannot be written \(.*No space left.*what was written before is complete"):
        store.add(big, results[1])
    assert read_table(tiny_disk / "run")["id"].to_pylist() == ["0"]
    assert not list((tiny_disk / "run").glob("**/*.tmp"))
    fresh = Store(claim(tiny_disk / "run", SETTINGS), SETTINGS, flush_every=1)
    fresh.add(rows[2], results[2])
    assert read_table(tiny_disk / "run")["id"].to_pylist() == ["0", "2"]


# --- kills ---------------------------------------------------------------------------------------------------------

NOT_COMPARED = {"seconds", "rank", "error_map"}  # of the run, not of the decision


@pytest.mark.ddp
@pytest.mark.timeout(900)
def test_kills_at_any_moment_lose_at_most_a_part(tmp_path):
    """A real run, killed 20 times at random moments on 1 and 2 processes in turn, ends as an undisturbed one."""
    images, kills, flush_every = 400, 20, 3
    command = [sys.executable, "tests/scripts/evaluate_killed.py", images, kills, flush_every, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left = json.loads((tmp_path / "left.json").read_text())  # finished images after each kill
    assert len(left) == kills
    assert left == sorted(left)
    assert len(set(left)) > 2  # kills came in the middle: how many depends on what else the machine does
    assert 0 < left[-1] < images
    runs = tmp_path / "killed", tmp_path / "undisturbed"
    found, expected = (pq.read_table(run / "predictions.parquet").to_pydict() for run in runs)
    for name, values in expected.items():
        if name in ("scores_K", "differences_K", "margin"):
            np.testing.assert_allclose(np.array(found[name]), np.array(values), rtol=1e-5, atol=1e-9)
        elif name == "trail":
            for a, b in zip(found[name], values, strict=True):
                assert (a["draws"], a["classes"]) == (b["draws"], b["classes"])
                for line, other in zip(a["behind"], b["behind"], strict=True):
                    np.testing.assert_allclose(line, other, rtol=1e-4, atol=1e-6)
        elif name not in NOT_COMPARED:
            assert found[name] == values, name
    metrics = [json.loads((run / "metrics.json").read_text())["metrics"] for run in runs]
    for name, value in metrics[1].items():
        if "second" not in name:
            assert metrics[0][name] == pytest.approx(value, rel=1e-5), name
    assert [one.image_id for one in StoredErrors(runs[0] / "errors.parquet")] == expected["id"]
    assert not (runs[0] / "parts").exists()


def test_a_kill_costs_at_most_flush_every_images(tmp_path):
    _, results, rows = decisions(10)
    script = tmp_path / "killed.py"
    script.write_text(
        "import os, pickle, signal, sys\n"
        "from pathlib import Path\n"
        "from lightning_diffclf.results.store import Settings, Store, claim\n"
        f"rows, results = pickle.loads(Path({str(tmp_path / 'rows.pkl')!r}).read_bytes())\n"
        "settings = Settings({'a': 1})\n"
        f"store = Store(claim(Path({str(tmp_path / 'run')!r}), settings), settings, flush_every=4)\n"
        "for row, result in zip(rows, results):\n"
        "    store.add(row, result)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "rows.pkl").write_bytes(pickle.dumps((rows, results)))
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert read_table(tmp_path / "run").num_rows == 8
