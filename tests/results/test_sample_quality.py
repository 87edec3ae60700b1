import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.special import softmax
from torchmetrics.image.fid import FrechetInceptionDistance

from lightning_diffclf.data.images import published_crop
from lightning_diffclf.results import sample_quality as module
from lightning_diffclf.results.sample_quality import (
    Features,
    Reference,
    check_writable,
    digest_of,
    features_of,
    find_pictures,
    inception,
    is_kept,
    joined,
    load_reference,
    precision_recall,
    sample_quality,
    save_reference,
)


def drawn(count, shift=0.0, seed=0, width=6):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(9).normal(size=(6, width))
    values = rng.normal(size=(count, 6)) @ mixing + shift
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(rng.normal(size=(count, 4)) * 3).float())


@pytest.mark.parametrize("chunk", [7, 2048])
def test_fid_is_the_distance_of_two_gaussians(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    generated, real = drawn(300, shift=0.5), drawn(200, seed=1)
    a, b = generated.values.double().numpy(), real.values.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    reference = Reference.of(real.values)
    np.testing.assert_allclose(reference.covariance.numpy(), cov_b, rtol=1e-12)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    found = sample_quality(generated, reference)
    assert found.fid == pytest.approx(expected, rel=1e-9)
    assert (found.images, found.reference_images) == (300, 200)
    assert 0 <= sample_quality(real, reference).fid < 1e-9


class Same(torch.nn.Module):
    num_features = 40

    def forward(self, features):
        return features


def test_fid_is_that_of_torchmetrics_with_fewer_images_than_features():
    generated, real = (drawn(count, shift, seed, width=40) for count, shift, seed in ((30, 0.5, 0), (25, 0, 1)))
    theirs = FrechetInceptionDistance(feature=Same()).set_dtype(torch.float64)
    theirs.update(real.values.double(), real=True)
    theirs.update(generated.values.double(), real=False)
    found = sample_quality(generated, Reference.of(real.values))
    assert found.fid == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_inception_score(recwarn):
    reference = Reference.of(drawn(100, seed=1).values)
    state = torch.random.get_rng_state()
    found = sample_quality(drawn(1000), reference)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found == sample_quality(drawn(1000), reference)
    p = softmax(drawn(1000).logits.double().numpy(), axis=1)
    whole = np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())
    assert found.inception_score == pytest.approx(whole, rel=0.03)  # splits see their own means
    sure = Features(drawn(1000).values, 100 * torch.eye(4).repeat(250, 1))
    assert sample_quality(sure, reference).inception_score == pytest.approx(4, rel=0.05)
    assert sample_quality(drawn(9), reference).inception_score is None
    assert not recwarn.list


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


def test_precision_and_recall_are_of_as_many_images_as_can_be_compared(monkeypatch):
    monkeypatch.setattr(module, "PUBLISHED", 20)
    generated, real = drawn(41, shift=1.5), drawn(60, seed=1)
    found = sample_quality(generated, Reference.of(real.values))
    assert found.reference_images == 60
    assert (found.precision, found.recall) == precision_recall(generated.values[::3], real.values[::3])
    whole = np.cov(real.values.double().numpy(), rowvar=False)
    np.testing.assert_allclose(Reference.of(real.values).covariance.numpy(), whole)


def test_a_reference_without_features(tmp_path):
    generated, real = drawn(40, shift=0.5), drawn(60, seed=1)
    np.savez(tmp_path / "r.npz", mu=real.values.numpy().mean(0), sigma=np.cov(real.values.numpy(), rowvar=False), x=0)
    found = sample_quality(generated, load_reference(tmp_path / "r.npz"))
    assert found.fid == pytest.approx(sample_quality(generated, Reference.of(real.values)).fid, rel=1e-5)
    assert (found.reference_images, found.precision, found.recall) == (None, None, None)
    with pytest.raises(ValueError, match="reference: features of 6 values, expected 7"):
        sample_quality(drawn(40, width=7), Reference.of(real.values))


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
    return pooled[:, :5], pooled[:, :3] / 50


def test_features_do_not_depend_on_batches(tmp_path):
    paths = find_pictures(str(pictures(tmp_path / "a")))
    one, five = (joined(list(features_of(paths, small_extractor, size))) for size in (1, 5))
    torch.testing.assert_close(one.values, five.values)
    first = np.asarray(Image.open(paths[0]))
    assert one.values[0, 0] == pytest.approx(first[:4, :5, 0].mean())
    assert len(one.values) == 12


def test_images_of_several_sizes_are_cropped_or_refused(tmp_path):
    paths = find_pictures(str(pictures(tmp_path / "a", sizes=((10, 8), (6, 14)))))
    with pytest.raises(ValueError, match=r"001.png' has 6 x 14 pixels, '.*000.png' 10 x 8, expected one size; --size"):
        list(features_of(paths, small_extractor))
    found = joined(list(features_of(paths, small_extractor, size=4)))
    second = np.asarray(published_crop(Image.open(paths[1]), 4))
    assert found.values[1, 0] == pytest.approx(second[:2, :2, 0].mean())


def test_references_are_kept(tmp_path):
    folder = str(pictures(tmp_path / "a"))
    digest = digest_of(find_pictures(folder), folder, None)
    reference, path = Reference.of(drawn(20).values), tmp_path / "kept.npz"
    assert not is_kept(path, digest)
    save_reference(reference, digest, path)
    again = load_reference(path)
    for name in ("mean", "covariance", "values"):
        assert torch.equal(getattr(again, name), getattr(reference, name))
    assert again.count == 20
    assert is_kept(path, digest)
    assert digest == digest_of(find_pictures(folder), folder, None)
    assert not is_kept(path, digest_of(find_pictures(folder), folder, 256))
    os.utime(tmp_path / "a" / "003.png", ns=(1, 1))
    assert not is_kept(path, digest_of(find_pictures(folder), folder, None))


def test_files_that_are_no_reference(tmp_path):
    save_reference(Reference.of(drawn(20).values), "1", tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for bad in (b"", b"half", content[:500], (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "bad.npz").write_bytes(bad)
        with pytest.raises(ValueError, match=r"reference: '.*bad.npz' cannot be read"):
            load_reference(tmp_path / "bad.npz")
    with pytest.raises(ValueError, match=r"reference: '.*none.npz' cannot be read"):
        load_reference(tmp_path / "none.npz")
    for arrays in ({"arr_0": np.zeros(3)}, {"mu": np.zeros(3), "sigma": np.zeros((2, 2))}):
        np.savez(tmp_path / "other.npz", **arrays)
        with pytest.raises(ValueError, match="has no mean and covariance, expected mu"):
            load_reference(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=r"stats: '.*other.npz' was not written by diffclf fid"):
        is_kept(tmp_path / "other.npz", "1")
    with pytest.raises(ValueError, match=r"nothing can be kept in .*; give another file as --stats"):
        check_writable(tmp_path / "no folder" / "a.npz")


class Harmful:
    def __reduce__(self):
        return open, ("harmed", "w")


def test_mistakes_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no image"):
        find_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        find_pictures("nowhere")
    with pytest.raises(ValueError, match=r"3 in .* expected at least 4"):
        find_pictures(str(pictures(tmp_path / "three", count=3)))
    with pytest.raises(ValueError, match=r"weights: no file 'nothing.pth', expected weights-inception"):
        inception("nothing.pth", torch.device("cpu"))
    (tmp_path / "text.pth").write_bytes(b"no weights")
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"a": torch.zeros(1)}, "other.pth")
    torch.save([1], "list.pth")
    torch.save(Harmful(), "harmful.pth")
    for name in ("text", "empty", "other", "list", "harmful"):
        with pytest.raises(ValueError, match=rf"weights: '{name}.pth' has no Inception network"):
            inception(f"{name}.pth", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"\(not a file of tensors alone\), expected weights-inception"):
        inception("harmful.pth", torch.device("cpu"))
    assert not (tmp_path / "harmed").exists()
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ValueError, match=r"torch-fidelity is not installed; pip install 'lightning-diffclf\[fid\]'"):
        inception(None, torch.device("cpu"))
