import json
import pickle
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from lightning_diffclf.data.latents import Latents, LatentsIndex, LatentsWriter, is_latents
from lightning_diffclf.files import read_checked_json

INDEX = LatentsIndex("photos", [4, 8, 11], (2, 3, 3), 24, "some/vae", "abc", 0.5, 0.1, ["cat", "dog"])


def moments(seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(11, 2, 4, 3, 3)).astype(np.float32)
    values[:, :, 2:] = 0.1 + abs(values[:, :, 2:])  # standard deviations
    return values


LABELS = np.stack([np.arange(11) % 2, 100 + np.arange(11)], axis=1)


def written(folder, chunks=(0, 1, 2), index=INDEX):
    LatentsWriter.create(folder, index)
    writer = LatentsWriter(folder)
    for chunk in chunks:
        begin, end = writer.chunks[chunk]
        writer.write(chunk, moments()[begin:end], LABELS[begin:end])
    return writer


def complete(folder):
    assert list(written(folder).verify()) == [0, 1, 2]
    return Latents(str(folder))


def test_evaluation_sees_means_as_networks_do(tmp_path):
    latents = complete(tmp_path)
    assert len(latents) == 11
    batch = latents.__getitems__([3, 0, 10])
    expected = (moments()[[3, 0, 10], 0, :2].astype(np.float16).astype(np.float32) - 0.1) * 0.5
    np.testing.assert_allclose(batch["image"].numpy(), expected, rtol=1e-6)
    assert (batch["label"].tolist(), batch["id"].tolist()) == ([1, 0, 0], [103, 100, 110])
    torch.testing.assert_close(latents[10]["image"], batch["image"][2])


def test_training_samples_the_posterior_and_mirror_images(tmp_path):
    latents = complete(tmp_path)
    indices = [5] * 20_000
    drawn = latents.sample(indices, [(0, position) for position in range(len(indices))])["image"].numpy() / 0.5 + 0.1
    image, mirror = moments()[5]
    pooled_mean = (image[:2] + mirror[:2]) / 2
    pooled_variance = (image[2:] ** 2 + mirror[2:] ** 2) / 2 + ((image[:2] - mirror[:2]) / 2) ** 2
    error = np.sqrt(pooled_variance / len(indices))
    assert (abs(drawn.mean(0) - pooled_mean) < 5 * error + 1e-3).all()
    np.testing.assert_allclose(drawn.var(0), pooled_variance, rtol=0.05)
    upright = latents.sample(indices, [(0, position) for position in range(len(indices))], flip=False)["image"]
    np.testing.assert_allclose((upright.numpy() / 0.5 + 0.1).mean(0), image[:2], atol=0.06)
    # a draw depends on its key alone
    again = latents.sample([5, 5], [(0, 7), (1, 7)])["image"].numpy() / 0.5 + 0.1
    np.testing.assert_allclose(again[0], drawn[7], rtol=1e-5, atol=1e-6)
    assert abs(again[1] - drawn[7]).max() > 0.01


def test_it_goes_on_where_it_was_stopped(tmp_path):
    written(tmp_path, chunks=(0, 2))
    assert is_latents(tmp_path)
    with pytest.raises(ValueError, match="is not complete; finish it with `diffclf encode`"):
        Latents(str(tmp_path))
    LatentsWriter.create(tmp_path, INDEX)  # what is there stays
    writer = LatentsWriter(tmp_path)
    assert [writer.is_done(chunk) for chunk in range(3)] == [True, False, True]
    with pytest.raises(ValueError, match=r"1 of 3 chunks .* missing or damaged, such as images 4 … 7; encode again"):
        list(writer.verify())
    writer.write(1, moments()[4:8], LABELS[4:8])
    assert list(writer.verify()) == [0, 1, 2]
    np.testing.assert_array_equal(Latents(str(tmp_path))._moments, moments().astype(np.float16))


def test_damage_is_found_and_written_anew(tmp_path):
    writer = written(tmp_path)
    with open(tmp_path / "moments.npy", "rb+") as file:
        file.seek(-3, 2)
        file.write(b"\x01")
    writer = LatentsWriter(tmp_path)
    with pytest.raises(ValueError, match="such as images 8 … 10"):
        list(writer.verify())
    assert [writer.is_done(chunk) for chunk in range(3)] == [True, True, False]
    writer.write(2, moments()[8:], LABELS[8:])
    assert len(list(writer.verify())) == 3


@pytest.mark.parametrize(
    ("name", "value"), [("vae", "other/vae"), ("size", 32), ("chunk_ends", [4, 8]), ("scaling", 1.0)]
)
def test_a_folder_of_other_latents_is_refused(tmp_path, name, value):
    written(tmp_path)
    with pytest.raises(ValueError, match=f"holds others .*{name}: "):
        LatentsWriter.create(tmp_path, replace(INDEX, **{name: value}))


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("words")
    with pytest.raises(ValueError, match="is not empty"):
        LatentsWriter.create(tmp_path, INDEX)
    with pytest.raises(FileNotFoundError, match=r"no index.json"):
        Latents(str(tmp_path))
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Latents(str(tmp_path))


def test_wrong_values_are_refused(tmp_path):
    writer = written(tmp_path, chunks=())
    with pytest.raises(ValueError, match=r"chunk 0 is \(3, 2, 4, 3, 3\), expected \(4, 2, 4, 3, 3\)"):
        writer.write(0, moments()[:3], LABELS[:3])
    with pytest.raises(ValueError, match="not finite in float16"):
        writer.write(0, moments()[:4] * 1e6, LABELS[:4])


def test_files_that_do_not_fit_the_index_are_refused(tmp_path):
    complete(tmp_path)
    values = read_checked_json(tmp_path / "index.json")
    (tmp_path / "index.json").write_text(json.dumps(values | {"chunk_ends": [4, 8]}))
    with pytest.raises(ValueError, match="files of shapes"):
        Latents(str(tmp_path))
    (tmp_path / "index.json").write_text(json.dumps(values))
    with open(tmp_path / "moments.npy", "rb+") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match="is damaged"):
        Latents(str(tmp_path))


def test_workers_open_the_files_themselves(tmp_path):
    latents = complete(tmp_path)
    sent = pickle.dumps(latents)
    assert len(sent) < 2000
    torch.testing.assert_close(pickle.loads(sent)[3], latents[3])


def test_the_index_is_read_as_written(tmp_path):
    INDEX.write(tmp_path)
    assert asdict(LatentsIndex.read(tmp_path)) == asdict(INDEX)
