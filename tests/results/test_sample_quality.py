import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.special import softmax

from lightning_diffclf.commands import fid
from lightning_diffclf.results import sample_quality as module
from lightning_diffclf.results.sample_quality import (
    Features,
    cache_file,
    features_of,
    find_pictures,
    inception,
    joined,
    precision_recall,
    sample_quality,
)


def drawn(count, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(6, 6))
    values = rng.normal(size=(count, 6)) @ mixing + shift
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(rng.normal(size=(count, 4)) * 3).float())


def test_fid_is_the_distance_of_two_gaussians():
    generated, real = drawn(300, shift=0.5), drawn(200, seed=1)
    a, b = generated.values.double().numpy(), real.values.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    found = sample_quality(generated, real)
    assert found.fid == pytest.approx(expected, rel=1e-6)
    assert (found.images, found.reference_images) == (300, 200)
    assert sample_quality(real, real).fid == pytest.approx(0, abs=1e-6)


def test_inception_score():
    found = sample_quality(drawn(1000), drawn(100, seed=1))
    p = softmax(drawn(1000).logits.double().numpy(), axis=1)
    whole = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert found.inception_score == pytest.approx(whole, rel=0.03)  # splits see their own means
    sure = Features(drawn(1000).values, 100 * torch.eye(4).repeat(250, 1))
    assert sample_quality(sure, drawn(100)).inception_score == pytest.approx(4, rel=0.05)
    assert sample_quality(drawn(9), drawn(20)).inception_score is None


def by_brute_force(points, manifold, k):
    distances = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
    radii = np.sort(distances, axis=1)[:, k]
    return (np.linalg.norm(points[:, None] - manifold[None], axis=2) <= radii).any(1).mean()


@pytest.mark.parametrize("chunk", [7, 2048])
def test_precision_and_recall(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    generated, real = drawn(40, shift=1.5).values, drawn(60, seed=1).values
    precision, recall = precision_recall(generated, real)
    assert precision == pytest.approx(by_brute_force(generated.numpy(), real.numpy(), 3))
    assert recall == pytest.approx(by_brute_force(real.numpy(), generated.numpy(), 3))
    assert 0 < precision < 1
    assert 0 < recall < 1
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 1000, real) == (0, 0)
    with pytest.raises(ValueError, match="real: 3 images, expected more than 3"):
        precision_recall(generated, real[:3])


def pictures(folder, count=12, seed=0, sizes=((10, 8),)):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def small_extractor(images):
    """A network of no depth: means of parts of the image."""
    assert images.dtype == torch.uint8
    pooled = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
    return pooled[:, :5] / 50, pooled[:, :3] / 50


def test_features_do_not_depend_on_batches(tmp_path):
    paths = find_pictures(str(pictures(tmp_path / "a", sizes=((10, 8), (6, 6)))))
    one, five = (joined(list(features_of(paths, small_extractor, size))) for size in (1, 5))
    torch.testing.assert_close(one.values, five.values)
    assert len(one.values) == 12


def test_the_command_keeps_features_of_the_reference(tmp_path, monkeypatch, capsys):
    seen = []

    def counting(images):
        seen.append(len(images))
        return small_extractor(images)

    monkeypatch.setattr(fid, "inception", lambda weights, device: counting)
    generated, real = pictures(tmp_path / "generated"), pictures(tmp_path / "real", count=15, seed=1)
    command = [str(generated), f"--reference={real}", "--json"]
    fid.fid_command(command)
    first = capsys.readouterr()
    assert sum(seen) == 12 + 15
    assert "warning: FID of 12 images" in first.err
    fid.fid_command(command)
    assert sum(seen) == 12 + 15 + 12
    assert capsys.readouterr().out.splitlines()[-1] == first.out.splitlines()[-1]
    kept = cache_file(find_pictures(str(real)), str(real))
    fid.fid_command([str(generated), f"--reference={kept}"])
    assert "inception score" in capsys.readouterr().out
    (real / "000.png").unlink()  # other images, other features
    fid.fid_command(command)
    assert sum(seen) == 12 + 15 + 12 + 12 + 12 + 14
    kept.write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be read"):
        fid.fid_command([str(generated), f"--reference={kept}"])


def test_mistakes_are_told(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no image"):
        find_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        find_pictures("nowhere")
    with pytest.raises(ValueError, match=r"1 in .* expected at least 2"):
        find_pictures(str(pictures(tmp_path / "one", count=1)))
    with pytest.raises(ValueError, match=r"weights: no file 'nothing.pth', expected pt_inception"):
        inception("nothing.pth", torch.device("cpu"))
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"could not be had .* give it as --weights"):
        inception(str(tmp_path / "bad.pth"), torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"torch-fidelity is not installed; pip install 'lightning-diffclf\[fid\]'"):
        inception(None, torch.device("cpu"))
