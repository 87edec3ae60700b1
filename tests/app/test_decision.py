"""What is told of a decision, beside the classifier's own answer; and what is refused before any network call."""

import base64
import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

import lightning_diffclf
from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws, Exhaustive, LikelihoodRatio, Stages
from lightning_diffclf.app import networks
from lightning_diffclf.app.decision import Question, decide
from lightning_diffclf.app.networks import RULES, ClassConditional
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.digit_scenes import WORDS
from lightning_diffclf.data.digits import DigitsDataModule
from tests.app.conftest import LABELS, told

MODEL = str(Path(__file__).parents[2] / "assets" / "sd_digits")


def of_kind(events, kind):
    return [event for event in events if event["kind"] == kind]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """Of a network that sees 8 × 8 grey pixels."""
    torch.manual_seed(0)
    names = [f"digit {k}" for k in range(10)]
    module = ClassConditionalDiT(
        input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=1, num_heads=2, class_names=names,
        num_classes=10, learn_sigma=False, latents=False,
    )  # fmt: skip
    torch.nn.init.normal_(module.net.final_layer.linear.weight)  # zero at first: all classes would be alike
    torch.nn.init.normal_(module.net.final_layer.adaLN_modulation[-1].weight)
    trainer = L.Trainer(logger=False, barebones=True)
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("app") / "x.ckpt"
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def reference():
    return lightning_diffclf.pipeline(MODEL, WORDS, templates="a photo of a {}", device="cpu")


# --- what is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_decision_of_the_classifier(tiny, reference, digits, rule):
    """The same recipe through ``pipeline()``; and the errors that were told are those that decided."""
    events = told(tiny, digits[9], rule=rule)
    [asked], [decided] = of_kind(events, "asked"), of_kind(events, "decided")
    rules = {
        "LikelihoodRatio": LikelihoodRatio(inflation=5),
        "PairedTest": lightning_diffclf.PairedTest(),
        "Stages": Stages((2, 24), (5, 1)),
        "Exhaustive": Exhaustive(),
    }
    recipe = replace(reference.classifier.recipe, draws=24, elimination=rules[rule])
    classifier = DiffusionClassifier(reference.classifier.denoiser, recipe, keep_errors=True)
    pixels = reference.pixels(Image.open(io.BytesIO(digits[9])))[None]
    [expected] = classifier(pixels, content_ids(pixels))
    assert WORDS[decided["winner"]] == WORDS[expected.prediction] == "nine"
    assert decided["nfe"] == expected.nfe
    assert decided["draws"] == expected.draws_K.tolist()
    assert decided["probabilities"] == pytest.approx(dict(expected.top(10)), rel=1e-3, abs=1e-9)
    errors_KS = np.full((10, asked["draws"]), np.nan)
    for event in of_kind(events, "landed"):
        for draw, row in enumerate(event["errors"], event["first"]):
            errors_KS[event["candidates"], draw] = row
    np.testing.assert_allclose(errors_KS, expected.errors_KS, rtol=1e-4)
    assert of_kind(events, "landed")[-1]["nfe"] == expected.nfe
    weights = np.array(asked["weights"])
    means = np.nansum(errors_KS * weights, 1) / expected.draws_K.numpy()
    np.testing.assert_allclose(means, expected.scores_K, rtol=1e-4)


def test_other_labels_are_embedded_anew_and_the_last_ones_are_kept(tiny, digits):
    denoiser = tiny.classifier(WORDS, "Exhaustive", 4).denoiser
    assert tiny.classifier(WORDS, "LikelihoodRatio", 9).denoiser is denoiser
    [decided] = of_kind(told(tiny, digits[3], "eight,three\n"), "decided")
    assert decided["winner"] == 1
    assert set(decided["probabilities"]) == {"eight", "three"}
    [decided] = of_kind(told(tiny, digits[5], "five left of a three, three left of a five, five"), "decided")
    assert decided["winner"] == 2  # the text encoder is still there


def test_the_map_shows_where_the_winner_is_better(tiny, digits):
    events = told(tiny, digits[9], error_map=True)
    [decided], [shown] = of_kind(events, "decided"), of_kind(events, "map")
    assert events[-1] is shown
    assert shown["winner"] == "nine" != shown["rival"]
    assert shown["nfe"] == 32
    picture = Image.open(io.BytesIO(base64.b64decode(shown["picture"].partition(",")[2])))
    assert picture.width == 2 * picture.height
    pixels = np.asarray(picture).astype(int)
    strength = pixels[..., 3]  # it lies over the image, which shines through where both fit alike
    assert ((pixels[..., 0] - pixels[..., 2]) * strength).mean() > 0  # red, on the whole: it won
    assert decided["nfe"] == of_kind(events, "landed")[-1]["nfe"]  # which the map is not part of


def test_a_trained_network_is_asked_about_its_classes(checkpoint, digits):
    network = ClassConditional(checkpoint, device="cpu")
    assert network.size == (8, 8)
    data = DigitsDataModule()
    data.setup("test")
    scans, labels = data.test.parts["image"], data.test.parts["label"].tolist()
    scan = scans[labels.index(4)]
    torch.testing.assert_close(network.pixels(Image.open(io.BytesIO(digits[4]))), scan, atol=0.005, rtol=0)
    [decided] = of_kind(told(network, digits[4], labels=" ", draws=20), "decided")
    classifier = DiffusionClassifier(network._network.module, Draws(20), elimination=LikelihoodRatio())
    pixels = network.pixels(Image.open(io.BytesIO(digits[4])))[None]
    [expected] = classifier(pixels, content_ids(pixels))
    assert (decided["winner"], decided["nfe"]) == (expected.prediction, expected.nfe)
    [decided] = of_kind(told(network, digits[4], labels="digit 7, digit 2", draws=20), "decided")
    assert set(decided["probabilities"]) == {"digit 7", "digit 2"}
    [chosen] = classifier(pixels, content_ids(pixels), [7, 2])
    assert chosen.prediction == (7, 2)[decided["winner"]]
    for wrong, message in (
        ("digit 7, digit 11", "labels: no class 'digit 11'; did you mean 'digit 1'"),
        ("digit 7, digit 7", "labels: 'digit 7' occurs twice"),
    ):
        with pytest.raises(ValueError, match=message):
            told(network, digits[4], labels=wrong)


def test_latents_need_an_autoencoder(tmp_path):
    module = ClassConditionalDiT(
        input_size=8, patch_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3
    )
    trainer = L.Trainer(logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"vae: none given, but '.*x.ckpt' works on latents; expected --vae"):
        ClassConditional(str(tmp_path / "x.ckpt"))


def test_whoever_is_told_may_end_it(tiny, digits, monkeypatch):
    calls = []
    predict = networks.PipelineDenoiser.predict_shared
    monkeypatch.setattr(
        networks.PipelineDenoiser, "predict_shared", lambda self, *rows: (calls.append(1), predict(self, *rows))[1]
    )

    class Gone(Exception):
        pass

    def tell(event):
        if event["kind"] == "landed":
            raise Gone

    with pytest.raises(Gone):
        decide(tiny, Question(digits[0], LABELS, "Exhaustive", 100), tell)
    assert len(calls) == 1


# --- what is refused -----------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of 13,000 × 13,000 pixels in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": b""}, "picture: none given, expected an image file"),
        ({"picture": b"<svg onload='alert(1)'/>"}, r"picture cannot be read \(cannot identify image file"),
        ({"picture": bomb()}, r"picture cannot be read \(13,000 x 13,000 pixels, expected at most 150,000,000\)"),
        ({"labels": ""}, "labels: none, expected at least two, with commas between them"),
        ({"labels": " zero ,"}, "labels: only 'zero', expected at least two"),
        ({"labels": "zero, one, zero"}, "labels: 'zero' occurs twice, as 0 and 2"),
        ({"labels": f"zero, {'one ' * 40}"}, "it would be cut to"),
        ({"rule": "Likelihood"}, "no rule 'Likelihood'; did you mean 'LikelihoodRatio'?"),
        ({"rule": "Stages", "draws": 1}, "Stages: samples"),
        ({"draws": 0}, "draws: 0, expected 1 to 10,000"),
        ({"draws": 2000}, "draws"),
    ],
)
def test_bad_questions_are_refused_before_any_call(tiny, digits, change, message):
    question = {"picture": digits[0], "labels": LABELS, "rule": "LikelihoodRatio", "draws": 10} | change
    events = []
    with pytest.raises(ValueError, match=message):
        decide(tiny, Question(**question), events.append)
    assert not of_kind(events, "landed")
