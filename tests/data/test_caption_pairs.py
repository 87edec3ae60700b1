"""Tiny sets in the form of SugarCrepe's and ARO's."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.data.caption_pairs import CaptionPairsDataModule, read_pairs
from tests.baselines.evaluation import evaluate
from tests.baselines.tiny_clip import write_clip

SUGAR = {
    "swap_att": {"0": ("a.png", "a red cat", "a black cat"), "2": ("b.png", "two small dogs", "two big dogs")},
    "add_obj": {"0": ("a.png", "a cat", "a cat and a hat")},
}
BOX = {"bbox_x": 4, "bbox_y": 2, "bbox_w": 6, "bbox_h": 100}  # lower than the image
ARO = [
    {"image_path": "a.png", "true_caption": "the cat is on the mat", "false_caption": "the mat is on the cat"}
    | {"relation_name": "on"}
    | BOX,
    {"image_path": "b.png", "true_caption": "the small dog", "false_caption": "the big dog", "relation_name": "of"},
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "sugar").mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    for tag, pairs in SUGAR.items():
        keys = ("filename", "caption", "negative_caption")
        rows = {key: dict(zip(keys, pair, strict=True)) for key, pair in pairs.items()}
        (tmp_path / "sugar" / f"{tag}.json").write_text(json.dumps(rows))
    (tmp_path / "visual_genome_relation.json").write_text(json.dumps(ARO))
    return tmp_path


def test_sugarcrepe(files, tmp_path):
    data = CaptionPairsDataModule(str(files / "sugar"), str(files / "images"), size=None, num_workers=0)
    assert [(pair.id, pair.tag) for pair in data.pairs] == [
        ("add_obj/0", "add_obj"),
        ("swap_att/0", "swap_att"),
        ("swap_att/2", "swap_att"),
    ]
    module = ZeroShotCLIP(write_clip(tmp_path / "clip"))
    rows, report = evaluate(tmp_path / "out", module, data)
    assert module.prompt_set.prompts[2:4] == ["a red cat", "a black cat"]
    logits = {}
    for item in (data.test[i] for i in range(3)):
        right, wrong = module.logits(item["image"][None])[0, item["candidates"]].tolist()
        logits[item["id"]] = right > wrong
    own = dict(zip(rows["id"], (p == 0 for p in rows["prediction"]), strict=True))
    assert own == logits
    found = report["metrics"]
    assert found["caption"] == found["accuracy"] == sum(logits.values()) / 3
    assert found["caption_swap_att"] == (logits["swap_att/0"] + logits["swap_att/2"]) / 2
    assert found["pairs"] == 3


def test_aro_crops_its_images(files):
    data = CaptionPairsDataModule(
        str(files / "visual_genome_relation.json"), str(files / "images"), size=8, num_workers=0
    )
    data.setup()
    assert [pair.tag for pair in data.pairs] == ["on", "of"]
    with Image.open(files / "images/a.png") as image:
        expected = data.test.prepare(image.crop((4, 2, 10, 20)))
    assert (data.test[0]["image"] == expected).all()
    assert data.test[1]["candidates"] == [2, 3]


def test_the_orders_of_words_have_four_wrong_captions(files, tmp_path):
    """The right one is first; the same words again are no candidate of their own."""
    options = ["a red cat sits", "a cat red sits", "sits a red cat", "red a cat sits", "a red sits cat"]
    order = [{"image": "a.png", "caption_options": options}]
    order.append({"image": "b.png", "caption_options": ["two dogs", "dogs two", "two dogs", "dogs two", "dogs two"]})
    order.append({"image": "b.png", "caption_options": options[::-1]})
    (files / "coco_order.json").write_text(json.dumps(order))
    data = CaptionPairsDataModule(str(files / "coco_order.json"), str(files / "images"), num_workers=0)
    module = ZeroShotCLIP(write_clip(tmp_path / "clip"))
    rows, report = evaluate(tmp_path / "out", module, data)
    assert module.prompt_set.prompts == [*options, "two dogs", "dogs two", *options[::-1]]
    assert module.candidates.classes == (0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1)
    assert [one.tolist() for one in map(np.array, rows["candidates_K"])] == [[0, 1, 2, 3, 4], [5, 6], [7, 8, 9, 10, 11]]
    right = {}
    for item in (data.test[i] for i in range(3)):
        logits = module.logits(item["image"][None])[0, item["candidates"]]
        right[item["id"]] = int(logits.argmax()) == 0
    assert dict(zip(rows["id"], (p == 0 for p in rows["prediction"]), strict=True)) == right
    assert report["metrics"]["caption"] == report["metrics"]["accuracy"] == sum(right.values()) / 3
    dropped = decided("coco_order/0", [2, 0, 1, 4, 3], [0.1, 0.5, np.nan, 0.4, 0.6], [5, 50, 50, 10, 50])
    assert data.score([dropped])["caption"] == 1
    assert data.score([decided("coco_order/0", [0, 1, 2], [0.5, 0.6, 0.4], [9, 9, 9])])["caption"] == 0


def test_tags_and_limits(files):
    def ids(**how):
        data = CaptionPairsDataModule(str(files / "sugar"), str(files / "images"), **how)
        return [pair.id for pair in data.pairs]

    assert ids(tags=["swap_att"]) == ["swap_att/0", "swap_att/2"]
    assert ids(limit=1) == ["add_obj/0", "swap_att/0"]
    with pytest.raises(ValueError, match=r"tags: \['swap'\], expected some of \['add_obj', 'swap_att'\]"):
        ids(tags=["swap"])


def decided(image_id, candidates, scores, draws):
    arrays = {"candidates_K": candidates, "scores_K": scores, "draws_K": draws}
    return SimpleNamespace(id=image_id, **{name: np.array(one) for name, one in arrays.items()})


def test_a_dropped_caption_is_worse_whatever_its_mean(files):
    data = CaptionPairsDataModule(str(files / "sugar"), str(files / "images"))
    rows = [
        decided("add_obj/0", [0, 1], [1.0, 0.9], [50, 10]),  # the wrong one was dropped
        decided("swap_att/0", [3, 2], [0.5, 0.6], [50, 50]),  # the wrong one is better, and comes first
        decided("swap_att/2", [4, 5], [np.inf, 1.0], [3, 50]),  # the network broke on the right one
    ]
    found = data.score(rows)
    assert (found["pairs"], found["caption_add_obj"], found["caption_swap_att"]) == (3, 1, 0)
    assert found["caption_low"] < found["caption"] == 1 / 3 < found["caption_high"]
    tie = decided("add_obj/0", [0, 1], [1.0, 1.0], [50, 50])
    assert data.score([tie])["caption"] == 0  # is not right
    assert data.score([]) == {}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("[", ValueError, "captions: .* cannot be read"),
        ("3", ValueError, "has no pairs"),
        ('[{"caption": "a"}]', ValueError, "pair 0: StopIteration.*, expected filename"),
        ('{"7": {"filename": 3, "caption": "a", "negative_caption": "b"}}', ValueError, "pair 7: TypeError"),
        ('[{"filename": "a.png", "caption": "a", "negative_caption": " "}]', ValueError, "are not all texts"),
        ('[{"filename": "c.png", "caption": "a", "negative_caption": "b"}]', FileNotFoundError, "no image 'c.png'"),
        ('[{"filename": "../x.png", "caption": "a", "negative_caption": "b"}]', ValueError, "is not in the folder"),
        ('[{"filename": "/etc/passwd", "caption": "a", "negative_caption": "b"}]', ValueError, "is not in the folder"),
        ('[{"image": "a.png", "caption_options": ["a", "a"]}]', ValueError, "no caption differs from the right one"),
        ('[{"image": "a.png", "caption_options": 3}]', ValueError, "pair 0: TypeError"),
    ],
    ids=range(10),
)
def test_files_of_another_form(content, error, message, files):
    (files / "bad.json").write_text(content)
    with pytest.raises(error, match=message):
        read_pairs(files / "bad.json", files / "images")


def test_a_box_outside_of_its_image(files):
    row = ARO[0] | {"bbox_x": 30}
    (files / "bad.json").write_text(json.dumps([row]))
    data = CaptionPairsDataModule(str(files / "bad.json"), str(files / "images"), num_workers=0)
    data.setup()
    with pytest.raises(ValueError, match=r"box \(30, 2, 36, 102\) is not in its image of 24 × 20"):
        _ = data.test[0]
    with pytest.raises(FileNotFoundError, match="no JSON file"):
        read_pairs(files / "images", files / "images")
