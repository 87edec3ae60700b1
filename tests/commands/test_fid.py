import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_diffclf.cli import main
from lightning_diffclf.results.sample_quality import find_pictures


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The Inception network, with random weights: its own are not needed to see that all is put together rightly."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            for i, p in enumerate(p for p in self.parameters() if p.dim() > 1):
                torch.nn.init.kaiming_normal_(p, generator=torch.Generator().manual_seed(i))

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save({}, path)
    torch.save(Untrained("untrained", ["2048"], feature_extractor_weights_path=path).state_dict(), path)
    return str(path)


def pictures(folder: Path, count, seed, top, sizes=((24, 24),)):
    (folder / "some").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        pixels = rng.integers(0, top, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "some" / f"{i:03d}.png")
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return pictures(tmp_path / "generated", 11, 0, 256), pictures(tmp_path / "real", 8, 1, 200)


def run(capsys, monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["diffclf", "fid", *map(str, args)])
    main()
    said = capsys.readouterr()
    return json.loads(said.out.splitlines()[-1]), said.err


def fails(capsys, monkeypatch, *args):
    with pytest.raises(SystemExit) as caught:
        run(capsys, monkeypatch, *args)
    capsys.readouterr()
    return str(caught.value)


def test_it_is_torchmetrics_on_the_same_images(folders, weights, capsys, monkeypatch):
    generated, real = folders
    found, err = run(capsys, monkeypatch, generated, "--reference", real, "--weights", weights, "--json")
    # images are resized without antialiasing in the network that FID is defined with
    theirs = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights, antialias=False)
    for folder in folders:
        images = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in find_pictures(folder)])
        theirs.update(images.permute(0, 3, 1, 2), real=folder == real)
    assert found["fid"] == pytest.approx(float(theirs.compute()), rel=1e-5)
    assert found["fid"] > 0.1
    assert (found["images"], found["reference_images"]) == (11, 8)
    assert "with 8 images FID is larger than with 50,000" in err
    assert 1 <= found["inception_score"] < 1008


def test_the_reference_is_read_once(folders, weights, capsys, monkeypatch, tmp_path):
    generated, real = folders
    command = [generated, "--reference", real, "--weights", weights, "--json"]
    first, _ = run(capsys, monkeypatch, *command)
    picture = tmp_path / "real" / "some" / "002.png"
    status = picture.stat()
    picture.write_bytes(bytes(status.st_size))  # no image any more, and nobody looks
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert run(capsys, monkeypatch, *command)[0] == first
    os.utime(picture)  # another image: read again
    assert "002.png' cannot be read" in fails(capsys, monkeypatch, *command)
    # the mean and covariance in the file are enough for FID
    with np.load(tmp_path / "real.fid.npz") as file:
        np.savez(tmp_path / "published.npz", mu=file["mu"], sigma=file["sigma"])
    command = [generated, "--reference", tmp_path / "published.npz", "--weights", weights]
    found, _ = run(capsys, monkeypatch, *command, "--json")
    assert found == first | {"reference_images": None, "precision": None, "recall": None}


def test_real_images_are_cropped(folders, weights, capsys, monkeypatch, tmp_path):
    generated, _ = folders
    photos = pictures(tmp_path / "photos", 4, 1, 256, sizes=((30, 20), (20, 40)))
    command = [generated, "--reference", photos, "--weights", weights, "--json"]
    assert "expected one size; --size" in fails(capsys, monkeypatch, *command)
    assert not (tmp_path / "photos.fid.npz").exists()
    stats = tmp_path / "kept.npz"
    assert run(capsys, monkeypatch, *command, "--size", 16, "--stats", stats)[0]["reference_images"] == 4
    assert stats.is_file()
    assert not (tmp_path / "photos.fid.npz").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device=nonsense"], "error: device: 'nonsense' cannot be used"),
        (["--batch_size=0"], "error: batch_size: 0, expected at least 1"),
        (["--size=0"], "error: size: 0, expected at least 1"),
        (["--weights=none.pth"], "error: weights: no file 'none.pth', expected weights-inception"),
        (["--stats=/proc/none.npz"], "error: reference: nothing can be kept in '/proc'"),
        (["--reference=none"], "error: images: no folder 'none'"),
        (["--reference=none.npz"], "error: reference: 'none.npz' cannot be read"),
        (["--reference=none.npz", "--size=8"], "error: size: 8 needs a folder of real images, found 'none.npz'"),
    ],
)
def test_mistakes_are_told(given, message, folders, weights, capsys, monkeypatch):
    generated, real = folders
    assert fails(capsys, monkeypatch, generated, f"--reference={real}", *given).startswith(message)
