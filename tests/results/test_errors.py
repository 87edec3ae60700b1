"""errors.parquet: what goes in comes out, in parts, in order, and after an error."""

import json
from dataclasses import replace

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_diffclf import DiffusionClassifier, DiffusionClassifierCallback, Draws, Stages
from lightning_diffclf.results import errors as module
from lightning_diffclf.results import parts
from lightning_diffclf.results.errors import INFO_KEY, ErrorsInfo, ErrorsWriter, StoredErrors, merge_errors
from lightning_diffclf.results.parts import Parts
from lightning_diffclf.results.predictions import Record, to_table, write_table
from lightning_diffclf.results.stored import read_table
from tests.classifier.toys import Toy, some_images
from tests.gaussians import CLASSES, Gaussians, Samples, loader


def classify(count, ids=None, draws=5, candidates=None, **settings):
    classifier = DiffusionClassifier(Toy(), Draws(draws), keep_errors=True, **settings)
    return classifier, list(classifier(some_images(count), ids, candidates))


def write(path, classifier, results, labels=None, distances=False) -> StoredErrors:
    writer = ErrorsWriter(path, ErrorsInfo.of(classifier), distances)
    for result, label in zip(results, labels or [None] * len(results), strict=True):
        writer.add(result, label)
    writer.close()
    return StoredErrors(path)


def equal(image, result, label=None):
    assert (image.image_id, image.label) == (str(result.image_id), label)
    np.testing.assert_array_equal(image.candidates_K, result.candidates_K)
    np.testing.assert_array_equal(image.draws_K, result.draws_K)
    assert image.nfe == result.nfe
    np.testing.assert_array_equal(image.errors_SK, result.errors_KS.T)
    if image.distances_SP is not None:
        row, column = np.triu_indices(len(result.candidates_K), 1)
        np.testing.assert_allclose(image.distances_SP, result.distances_SKK.numpy()[:, row, column], rtol=2e-3)


@pytest.mark.parametrize("group_bytes", [1, 200, 2**24])
@pytest.mark.parametrize("distances", [False, True])
def test_what_goes_in_comes_out(group_bytes, distances, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", group_bytes)
    lists = [[0, 1, 2], [4], [3, 1], [4, 2, 0, 1], [2, 3]]
    classifier, results = classify(5, ["a", 7, "c", "ü", -1], candidates=lists, keep_distances=distances)
    labels = [0, None, 3, 4, None]
    stored = write(tmp_path / "e.parquet", classifier, results, labels, distances)
    assert len(stored) == 5
    assert stored.has_distances == distances
    for image, result, label in zip(stored, results, labels, strict=True):
        equal(image, result, label)
        assert (image.distances_SP is not None) == distances
        assert image.errors_SK.dtype == np.float32
    assert all(image.distances_SP is None for image in stored.images(distances=False))
    assert (pq.ParquetFile(tmp_path / "e.parquet").num_row_groups > 1) == (group_bytes < 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["e.parquet"]


def test_eliminated_candidates_are_nan(tmp_path):
    classifier, results = classify(3, elimination=Stages((2, 5), (2, 1)))
    for image, result in zip(write(tmp_path / "e.parquet", classifier, results), results, strict=True):
        equal(image, result)
        assert sorted(image.draws_K) == [2, 2, 2, 5, 5]
        assert (np.isfinite(image.errors_SK).sum(0) == image.draws_K).all()


def test_the_file_says_what_it_holds_in_plain_json_and_lists(tmp_path):
    """Readable with pyarrow alone."""
    classifier, results = classify(2, [5, 6], draws=4, keep_distances=True, budget=1000)
    write(tmp_path / "e.parquet", classifier, results, [1, 2], distances=True)
    table = pq.read_table(tmp_path / "e.parquet")
    info = json.loads(table.schema.metadata[INFO_KEY])
    timesteps = classifier.timesteps_S
    assert info == {
        "loss": "l2",
        "seed": 0,
        "draws": 4,
        "ensemble": "best",
        "antithetic": False,
        "dims": 32,
        "timesteps_S": timesteps.tolist(),
        "log_snr_S": classifier.denoiser.schedule.log_snr(timesteps).tolist(),
        "names": ["c0", "c1", "c2", "c3", "c4"],
        "classes": [0, 1, 2, 3, 4],
        "elimination": "Exhaustive()",
        "weights": "uniform",
        "budget": 1000,
    }
    assert table.schema.field("errors").type == pa.list_(pa.float32())
    assert table.schema.field("distances").type == pa.list_(pa.float16())
    rows = table.to_pydict()
    assert rows["id"] == ["5", "6"]
    assert rows["label"] == [1, 2]
    assert rows["errors"][1] == results[1].errors_KS.T.reshape(-1).tolist()  # draw by draw
    assert len(rows["distances"][0]) == 4 * 10
    roots = results[0].distances_SKK[0, 0, 1:3].float().sqrt().tolist()
    assert rows["distances"][0][:2] == pytest.approx(roots, rel=1e-3)


def test_every_error_costs_at_most_its_four_bytes(tmp_path):
    classifier, results = classify(40, draws=50)
    write(tmp_path / "e.parquet", classifier, results)
    column = pq.ParquetFile(tmp_path / "e.parquet").metadata.row_group(0).column(5)
    assert column.path_in_schema == "errors.list.element"
    assert column.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert column.total_compressed_size < 40 * 50 * 5 * 4


@pytest.mark.parametrize("chunk_bytes", [1, 3000, 2**28])
@pytest.mark.parametrize("ids", [[30, 4, 100, -2, 7, 11], ["b", "a", "10", "9", "z", "c"]])
def test_parts_merge_in_the_order_of_predictions(ids, chunk_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 300)
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 300)
    monkeypatch.setattr(parts, "CHUNK_BYTES", chunk_bytes)
    classifier, results = classify(6, ids, keep_distances=True)
    shares = [results[::2], [], results[1::2]]  # a rank without an image
    errors, records = [tmp_path / f"{rank}.parquet" for rank in range(3)], []
    for rank, share in enumerate(shares[::-1]):
        write(errors[rank], classifier, share, list(range(len(share))), distances=True)
        rows = [
            Record.of(r, range(6), classifier.terms.weights_S, label, seconds=0, rank=rank)
            for label, r in enumerate(share)
        ]
        records.append(tmp_path / f"records {rank}.parquet")
        write_table(to_table(rows), records[-1])
    assert merge_errors(errors, tmp_path / "e.parquet") == 6
    Parts(records).write(tmp_path / "p.parquet")
    expected = pq.read_table(tmp_path / "p.parquet").to_pydict()
    stored = StoredErrors(tmp_path / "e.parquet")
    assert [image.image_id for image in stored] == expected["id"]
    assert [image.label for image in stored] == expected["label"]
    by_id = {str(r.image_id): r for r in results}
    for image in stored:
        equal(image, by_id[image.image_id], image.label)
    assert stored.info.dims == 32
    assert merge_errors([tmp_path / "e.parquet", *errors], tmp_path / "e.parquet") == 6  # interrupted and done again
    for image in StoredErrors(tmp_path / "e.parquet"):
        equal(image, by_id[image.image_id], image.label)


def test_parts_without_any_image_merge(tmp_path):
    classifier, _ = classify(1)
    for rank in range(2):
        write(tmp_path / f"{rank}.parquet", classifier, [])
    assert merge_errors([tmp_path / "0.parquet", tmp_path / "1.parquet"], tmp_path / "e.parquet") == 0
    assert len(StoredErrors(tmp_path / "e.parquet")) == 0


def test_results_without_errors_are_refused(tmp_path):
    classifier, results = classify(1)
    with pytest.raises(ValueError, match="image 0: no distances_SKK, expected a classifier that keeps them"):
        ErrorsWriter(tmp_path / "e.parquet", ErrorsInfo.of(classifier), distances=True).add(results[0], None)
    without = next(iter(DiffusionClassifier(Toy(), Draws(2))(some_images(1))))
    with pytest.raises(ValueError, match="no errors_KS"):
        ErrorsWriter(tmp_path / "e.parquet", ErrorsInfo.of(classifier)).add(without, None)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*none\.parquet'"):
        StoredErrors(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.parquet' cannot be read"):
        StoredErrors(tmp_path / "text.parquet")
    write_table(to_table([]), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="holds no errors, expected what keep_errors writes"):
        StoredErrors(tmp_path / "p.parquet")


# --- the callback -----------------------------------------------------------------------------------------------------


def trainer(*callbacks, **more):
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(callbacks=list(callbacks), **settings, **more)


@pytest.mark.parametrize("distances", [False, True])
def test_the_callback_writes_the_errors_beside_the_predictions(distances, tmp_path):
    out = tmp_path / "out"
    callback = DiffusionClassifierCallback(
        draws=6, microbatch=16, output_dir=str(out), keep_errors=True, keep_distances=distances
    )
    trainer(callback).test(Gaussians(), loader(11), verbose=False)
    stored, predictions = StoredErrors(out / "errors.parquet"), pq.read_table(out / "predictions.parquet").to_pydict()
    assert [image.image_id for image in stored] == predictions["id"] == [str(100 + i) for i in range(11)]
    assert [image.label for image in stored] == predictions["label"]
    for image, scores_K in zip(stored, predictions["scores_K"], strict=True):
        np.testing.assert_allclose(image.errors_SK.astype(np.float64).mean(0), scores_K, rtol=1e-9)
        assert (image.distances_SP is not None) == distances
    assert stored.info.dims == 9
    assert stored.info.names == tuple(f"class {k}" for k in range(CLASSES))
    assert callback.results == []  # what is in the folder is not in memory
    assert not list(out.glob("*rank*")) + list(out.glob("*.tmp"))


def test_predict_keeps_errors_without_labels_and_fit_keeps_none(tmp_path):
    callback = DiffusionClassifierCallback(draws=2, output_dir=str(tmp_path / "out"), keep_errors=True)
    trainer(callback).predict(Gaussians(), loader(3, labelled=False))
    assert [image.label for image in StoredErrors(tmp_path / "out" / "errors.parquet")] == [None] * 3
    fitting = DiffusionClassifierCallback(draws=2, output_dir=str(tmp_path / "fit"), keep_errors=True)
    trainer(fitting, max_steps=1).fit(Gaussians(), loader(4), loader(4))
    assert fitting.metrics["images"] == 4
    assert not (tmp_path / "fit").exists()


def test_errors_of_what_was_decided_before_an_error_are_kept(tmp_path):
    data = Samples(8)
    data.labels[6] = 99
    out = tmp_path / "out"
    callback = DiffusionClassifierCallback(draws=4, microbatch=16, output_dir=str(out), keep_errors=True)
    with pytest.raises(ValueError, match="label: 99"):
        trainer(callback).test(Gaussians(), DataLoader(data, 4), verbose=False)
    [errors] = (out / "parts").glob("*.errors.parquet")
    kept = [image.image_id for image in StoredErrors(errors)]
    assert kept == read_table(out)["id"].to_pylist() == ["100", "101", "102", "103"]


def test_an_error_in_the_network_loses_nothing_that_was_decided(tmp_path):
    fails_at = 6

    class Fails(Gaussians):
        calls = 0

        def predict(self, x_t, t, candidate):
            self.calls += 1
            if self.calls == fails_at:
                raise RuntimeError("out of memory")
            return super().predict(x_t, t, candidate)

    out = tmp_path / "out"
    callback = DiffusionClassifierCallback(draws=4, microbatch=16, output_dir=str(out), keep_errors=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(callback).test(Fails(), loader(8, batch_size=8), verbose=False)
    [errors] = (out / "parts").glob("*.errors.parquet")
    assert [image.image_id for image in StoredErrors(errors)] == read_table(out)["id"].to_pylist() == ["100", "101"]
    again = DiffusionClassifierCallback(draws=4, microbatch=16, output_dir=str(out), keep_errors=True, error_maps=0)
    fails_at, module = 0, Fails()
    trainer(again).test(module, loader(8, batch_size=8), verbose=False)
    assert module.calls == -(-6 * 4 * CLASSES // 16)  # for the other six
    assert [image.image_id for image in StoredErrors(out / "errors.parquet")] == [str(100 + i) for i in range(8)]
    assert not (out / "parts").exists()


def test_distances_need_errors_and_errors_a_folder():
    with pytest.raises(ValueError, match=r"keep_distances: .*expected keep_errors as well"):
        DiffusionClassifierCallback(keep_distances=True)
    gaussians = Gaussians()
    with pytest.raises(ValueError, match="keep_errors: no folder to write to, expected output_dir as well"):
        trainer(DiffusionClassifierCallback(draws=1, keep_errors=True)).test(gaussians, loader(2), verbose=False)
    assert not gaussians.autocast_seen


def test_distances_of_all_sizes_come_back(tmp_path):
    """Candidates that nearly agree are those that the rules must tell apart."""
    classifier, results = classify(1, draws=8, keep_distances=True)
    distances_SKK = 10.0 ** torch.arange(-8, 8, 2).view(-1, 1, 1) * (1 + torch.rand(8, 5, 5))
    result = replace(results[0], distances_SKK=distances_SKK)
    (image,) = write(tmp_path / "e.parquet", classifier, [result], None, True)
    row, column = np.triu_indices(5, 1)
    np.testing.assert_allclose(image.distances_SP, distances_SKK.numpy()[:, row, column], rtol=2e-3)


def test_errors_come_back_bit_by_bit(tmp_path):
    classifier, results = classify(1, draws=4)
    results[0].errors_KS[0, 1], results[0].errors_KS[2, 3] = torch.nan, torch.inf
    (image,) = write(tmp_path / "e.parquet", classifier, results)
    assert image.errors_SK.tobytes() == results[0].errors_KS.T.contiguous().numpy().tobytes()
