import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_diffclf.data.digit_scenes import WORDS, caption_of_two
from lightning_diffclf.data.winoground import WinogroundDataModule, digit_groups, read_groups, winoground_scores


def test_scores_on_a_table_made_by_hand():
    """Errors of image 0 under caption 0, caption 1, none; then of image 1."""
    errors = torch.tensor(
        [
            [[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]],  # everything right
            [[1.0, 2.0, 3.0], [0.5, 0.4, 3.0]],  # text right; caption 0 fits image 1 better: image wrong
            [[2.0, 1.0, 3.0], [2.5, 1.5, 3.0]],  # image 0 prefers the wrong caption
            [[5.0, 5.5, 6.0], [1.0, 0.2, 1.2]],  # image 1 is likelier at all: image right only when normalised
            [[1.0, 1.0, 3.0], [2.0, 1.0, 3.0]],  # a tie is not right
        ]
    )
    found = winoground_scores(errors, ["Object", "Object", "Relation", "Relation", ""])
    assert found["groups"] == 5
    assert (found["text"], found["text_Object"], found["text_Relation"]) == (3 / 5, 1, 1 / 2)
    assert found["image_Object"] == 1 / 2
    own = [(e[0][0] < e[1][0]) and (e[1][1] < e[0][1]) for e in errors.tolist()]
    assert found["image"] == np.mean(own)
    gains = [[[e[i][2] - e[i][c] for c in (0, 1)] for i in (0, 1)] for e in errors.tolist()]
    normalised = [(g[0][0] > g[1][0]) and (g[1][1] > g[0][1]) for g in gains]
    assert found["image_normalised"] == np.mean(normalised)
    assert normalised[3]
    assert not own[3]
    assert found["group"] == 1 / 5
    assert found["text_low"] < found["text"] < found["text_high"]


def decided(image_id, scores, draws):
    number = int(image_id.split("/")[0])
    of_image = np.array([2 * number, 2 * number + 1, 200])
    return SimpleNamespace(id=image_id, candidates_K=of_image, scores_K=np.array(scores), draws_K=np.array(draws))


def test_errors_over_different_draws_are_not_compared():
    data = WinogroundDataModule()
    right = [decided("0/0", [1.0, 2.0, 3.0], [9, 9, 9]), decided("0/1", [2.0, 1.0, 3.0], [9, 9, 9])]
    assert data.score(right)["group"] == 1
    assert data.score([right[0]]) == {}  # no group has both images
    # a candidate that the network broke on is wrong, whatever it has seen
    broken = [right[0], decided("0/1", [2.0, np.inf, 3.0], [9, 1, 9])]
    assert (data.score(broken)["text"], data.score(broken)["groups"]) == (0, 1)
    for early in (decided("0/1", [2.0, 1.0, 3.0], [4, 9, 9]), decided("0/1", [2.0, 1.0, 3.0], [8, 8, 8])):
        with pytest.raises(ValueError, match=r"group '0' has errors over \[[48], 9\] draws"):
            data.score([right[0], early])


def test_groups_of_digits():
    groups = digit_groups(40)
    assert [g.tag for g in groups[:2]] == ["Relation", "Object"]
    for group in groups:
        words = [caption.removeprefix("a photo of a ").split(" left of a ") for caption in group.captions]
        assert set(words[0] + words[1]) <= set(WORDS)
        assert (words[0][::-1] == words[1]) == (group.tag == "Relation")
        assert (words[0][0] == words[1][0]) == (group.tag == "Object")
        first, second = group.images
        assert first.shape == second.shape == (3, 8, 16)
        if group.tag == "Relation":
            torch.testing.assert_close(first[:, :, :8], second[:, :, 8:])
            torch.testing.assert_close(first[:, :, 8:], second[:, :, :8])
    assert caption_of_two(3, 5) == "a photo of a three left of a five"


def test_batches_bring_candidates_and_shared_noise():
    data = WinogroundDataModule(eval_batch_size=5)
    data.setup()
    prompts = data.prompt_set
    batch = next(iter(data.test_dataloader()))
    assert batch["id"][:3] == ["0/0", "0/1", "1/0"]
    assert batch["noise_key"][:3] == ["0", "0", "1"]
    assert batch["candidates"][2] == [2, 3, 200]
    assert batch["label"].tolist() == [0, 1, 2, 3, 4]
    assert prompts.prompts[200] == ""
    assert len(prompts.candidates) == 201
    assert prompts.prompts[2:4] == list(data.groups[1].captions)


def write_set(folder, lines):
    (folder / "images").mkdir(exist_ok=True)
    for name in ("ex_0_img_0", "ex_0_img_1"):
        Image.fromarray(np.full((10, 12, 3), 77, np.uint8)).save(folder / "images" / f"{name}.png")
    (folder / "examples.jsonl").write_text("\n".join(lines))


LINE = {
    "id": 0,
    "image_0": "ex_0_img_0",
    "image_1": "ex_0_img_1",
    "caption_0": "an old person kisses a young person",
    "caption_1": "a young person kisses an old person",
    "collapsed_tag": "Object",
}


def test_a_folder_in_the_hubs_format(tmp_path):
    write_set(tmp_path, [json.dumps(LINE), ""])
    [group] = read_groups(tmp_path)
    assert (group.id, group.tag) == ("0", "Object")
    assert read_groups(tmp_path / "examples.jsonl") == [group]
    data = WinogroundDataModule(str(tmp_path), size=8)
    data.setup()
    assert data.test[1]["image"].shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("{", ValueError, "line 1: .*expected a JSON object"),
        (json.dumps({"image_0": "a"}), ValueError, "line 1: .*caption_0"),
        (json.dumps(LINE | {"image_1": "nowhere"}), FileNotFoundError, "no image 'nowhere'"),
        ("", ValueError, "has no groups"),
        (f"{json.dumps(LINE)}\n{json.dumps(LINE)}", ValueError, "line 2: id '.*' of another group"),
    ],
)
def test_broken_sets(line, error, message, tmp_path):
    write_set(tmp_path, [line])
    with pytest.raises(error, match=message):
        read_groups(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no examples.jsonl in"):
        read_groups(tmp_path / "images")


def test_the_gated_set_needs_a_login(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise OSError("403: gated")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"the Hub did not give 'facebook/winoground' \(403: gated\).*hf auth login"):
        _ = WinogroundDataModule("hub").groups
