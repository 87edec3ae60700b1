"""The pipeline with the tiny model that the repository ships: real weights, real digits."""

import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path

import pytest
import torch
from PIL import Image

import lightning_diffclf
from lightning_diffclf import Exhaustive
from lightning_diffclf.data.digit_scenes import WORDS, DigitScenesDataModule

MODEL = str(Path(__file__).parents[1] / "assets" / "sd_digits")


@pytest.fixture(scope="module")
def classify():
    return lightning_diffclf.pipeline(MODEL, labels=list(WORDS), templates="a photo of a {}", draws=24, device="cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three images (3, 3, H, W) in [-1, 1], what they show, and their files."""
    data, folder = DigitScenesDataModule(), tmp_path_factory.mktemp("scenes")
    data.setup()
    images, files = data.test.parts["image"][:3], []
    for i, image in enumerate(images):
        pixels = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        files.append(folder / f"{i}.png")
    return images, [WORDS[int(c)] for c in data.test.parts["label"][:3]], files


@pytest.fixture
def address(scenes):
    """Where the files are served."""
    handler = partial(Quiet, directory=str(scenes[2][0].parent))
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class Quiet(SimpleHTTPRequestHandler):
    log_message = BaseHTTPRequestHandler.log_error = lambda *_: None


def same(first, second):
    assert [one["label"] for one in first] == [one["label"] for one in second]
    assert [one["score"] for one in first] == pytest.approx([one["score"] for one in second], rel=1e-3, abs=1e-9)


def test_every_kind_of_image_has_the_answer(classify, scenes, address):
    images, words, files = scenes
    several = classify(list(files))
    assert [found[0]["label"] for found in several] == words
    for found in several:
        assert sorted(one["label"] for one in found) == sorted(WORDS)
        scores = [one["score"] for one in found]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1)
    expected = several[1]
    bytes_CHW = ((images[1] + 1) * 127.5).round().byte()
    for image in (files[1], str(files[1]), Image.open(files[1]), f"{address}/1.png", bytes_CHW):
        found = classify(image)
        same(found, expected)
    batch = classify(torch.stack([bytes_CHW, bytes_CHW]).float() / 127.5 - 1)
    assert len(batch) == 2
    same(batch[0], expected)
    [two] = classify([files[1]], top_k=2)
    same(two, expected[:2])
    assert classify([]) == []


def test_other_sizes_are_cropped_as_files_are(classify, scenes):
    assert classify.size == (8, 16)
    tall = torch.full((3, 16, 16), 0.5)
    tall[:, 4:12] = scenes[0][0]
    same(classify(tall), classify(scenes[0][0]))
    grey = torch.full((1, 4, 16), 0.25)
    torch.testing.assert_close(classify.pixels(grey), torch.full((3, 8, 16), 0.25))


def test_the_recipe_by_keyword():
    found = lightning_diffclf.pipeline(MODEL, ["a_b", "c"], draws=5, elimination=Exhaustive(), microbatch=7)
    assert (found.classifier.recipe.draws, found.classifier.microbatch) == (5, 7)
    assert found.classifier.denoiser.candidates.class_names == ["a_b", "c"]
    assert found.classifier.denoiser.prompts == ["a photo of a a b.", "a photo of a c."]


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        ("none.png", FileNotFoundError, "no file 'none.png'"),
        (3, TypeError, "int"),
        ([3], TypeError, "image: int, expected a PIL image"),
        (torch.zeros(2, 8, 8), ValueError, r"shape \(2, 8, 8\), expected \(3, H, W\)"),
        (torch.full((3, 8, 8), 2.0), ValueError, r"expected uint8, or \[-1, 1\]"),
        (torch.full((3, 8, 8), torch.nan), ValueError, r"expected uint8, or \[-1, 1\]"),
        ("http://127.0.0.1:1/x.png", ValueError, "cannot be fetched"),
        ("http://[bad", ValueError, "cannot be fetched"),
    ],
)
def test_what_is_no_image_is_said(classify, image, error, message):
    with pytest.raises(error, match=message):
        classify(image)


def test_what_a_server_answers(classify, address, scenes):
    (scenes[2][0].parent / "text.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"text.txt' cannot be read"):
        classify(f"{address}/text.txt")
    with pytest.raises(ValueError, match=r"cannot be fetched \(HTTP Error 404"):
        classify(f"{address}/none.png")


def test_what_is_no_image_says_so(classify):
    for wrong in (3, None, [3]):
        with pytest.raises(TypeError, match="expected a PIL image, a file, an address or a tensor"):
            classify(wrong)


def test_labels_are_needed():
    with pytest.raises(TypeError, match="labels: 'cat', expected a list"):
        lightning_diffclf.pipeline(MODEL, labels="cat")
    with pytest.raises(ValueError, match="labels: none given"):
        lightning_diffclf.pipeline(MODEL)
