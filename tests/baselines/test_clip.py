"""CLIP as transformers itself runs it, through our data, store and report."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel, pipeline

from lightning_diffclf import DiffusionClassifierCallback, LikelihoodRatio
from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.data.winoground import WinogroundDataModule
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.results.report import write_report
from tests.baselines.evaluation import evaluate, trainer
from tests.baselines.tiny_clip import write_clip

CLASSES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Images of one colour each, at the top brighter than at the bottom or the other way round."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for name in CLASSES:
        (root / name).mkdir()
        for number in range(4):
            ramp = np.linspace(*rng.permutation([0.1, 1.0]), 20)[:, None, None]
            pixels = (ramp * rng.uniform(0, 255, 3) * np.ones((20, 24, 1))).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_it_is_transformers_own_zero_shot_pipeline(clip, root, tmp_path):
    rows, report = evaluate(tmp_path / "out", ZeroShotCLIP(clip), ZeroShotDataModule(root=str(root), num_workers=0))
    files = [path for name in CLASSES for path in sorted((root / name).iterdir())]
    own = pipeline("zero-shot-image-classification", model=clip)
    kept = {"candidate_labels": list(CLASSES), "hypothesis_template": "a photo of a {}."}
    found = own([Image.open(path).convert("RGB") for path in files], **kept)
    assert len({one[0]["label"] for one in found}) > 1  # random, but not blind
    right = 0
    for i, answers in enumerate(found):
        probability = np.exp(-np.array(rows["differences_K"][i]))
        probability /= probability.sum()
        theirs = {one["label"]: one["score"] for one in answers}
        assert probability == pytest.approx([theirs[name] for name in CLASSES], abs=1e-5)
        assert CLASSES[rows["prediction"][i]] == answers[0]["label"]
        assert rows["margin"][i] == pytest.approx(np.log(answers[0]["score"] / answers[1]["score"]), abs=1e-4)
        right += answers[0]["label"] == files[i].parent.name
    assert report["metrics"]["accuracy"] == right / len(files)
    assert report["metrics"]["nfe_per_image"] == 1
    nll = -np.mean(
        [np.log(next(o["score"] for o in a if o["label"] == f.parent.name)) for a, f in zip(found, files, strict=True)]
    )
    assert report["metrics"]["nll"] == pytest.approx(nll, abs=1e-5)
    assert report["metrics"]["nfe_per_image"] == report["metrics"]["speedup"] == 1  # one call is all there is
    html = write_report(str(tmp_path / "out")).read_text()
    assert "NFE / image" in html
    assert {path.stem for path in (tmp_path / "out" / "figures").glob("*.png")} == {
        "confusion",
        "reliability",
        "coverage",
    }


def test_several_prompts_and_forward(clip):
    """Logits are those of the model's own forward; the mean over prompts is asked for by the recipe."""
    templates = ["a photo of a {}.", "the {}"]
    module, pixels = ZeroShotCLIP(clip, templates, list(CLASSES)), torch.rand(5, 3, 16, 16)
    processor = AutoProcessor.from_pretrained(clip)
    prompts = [template.format(name) for name in CLASSES for template in templates]
    inputs = processor(text=prompts, images=list(pixels), return_tensors="pt", padding=True, do_rescale=False)
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(clip)(**inputs).logits_per_image
        assert torch.allclose(module.logits(pixels * 2 - 1), expected, atol=1e-4)
        assert torch.equal(
            module.logits(pixels[:, :1] * 2 - 1), module.logits(pixels[:, :1].expand(-1, 3, -1, -1) * 2 - 1)
        )


def test_winoground(clip, tmp_path):
    data = WinogroundDataModule(eval_batch_size=20)
    rows, report = evaluate(tmp_path / "out", module := ZeroShotCLIP(clip), data, limit=2)
    logits = -np.array(rows["scores_K"]).reshape(20, 2, 3)  # group, image, (caption 0, caption 1, none)
    text = (logits[:, 0, 0] > logits[:, 0, 1]) & (logits[:, 1, 1] > logits[:, 1, 0])
    image = (logits[:, 0, 0] > logits[:, 1, 0]) & (logits[:, 1, 1] > logits[:, 0, 1])
    assert report["metrics"]["text"] == text.mean()
    assert report["metrics"]["image"] == image.mean()
    assert report["metrics"]["group"] == (text & image).mean()
    assert module.prompt_set.prompts[:2] == list(data.groups[0].captions)


def test_it_resumes_and_does_not_mix(clip, root, tmp_path, capsys):
    data = {"root": str(root), "eval_batch_size": 4, "num_workers": 0}
    evaluate(tmp_path / "out", ZeroShotCLIP(clip), ZeroShotDataModule(**data), limit=2)
    _, report = evaluate(tmp_path / "out", ZeroShotCLIP(clip), ZeroShotDataModule(**data))
    assert "8 images are finished" in capsys.readouterr().out
    assert report["metrics"]["images"] == 12
    other = write_clip(tmp_path / "other", seed=1)
    for module, message in (
        (ZeroShotCLIP(other), r"module\.network\.weights"),
        (ZeroShotCLIP(clip, "the {}"), r"module\.prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(tmp_path / "out", module, ZeroShotDataModule(**data))
    with pytest.raises(ValueError, match=r"data\.preparation|data\.size"):
        evaluate(tmp_path / "out", ZeroShotCLIP(clip), ZeroShotDataModule(size=16, **data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draws": 10}, "draws: 10, but ZeroShotCLIP adds no noise: it is called once for each image; expected null"),
        ({"loss": "l1"}, "loss: l1, .* expected l2"),
        ({"elimination": LikelihoodRatio()}, "elimination: LikelihoodRatio"),
        ({"keep_errors": True}, "keep_errors: true, but ZeroShotCLIP adds no noise"),
        ({"candidates": [7]}, r"candidates: \[7\], expected indices in 0 … 2"),
    ],
)
def test_what_means_nothing_without_noise_is_refused(clip, root, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tmp_path / "out", ZeroShotCLIP(clip), ZeroShotDataModule(root=str(root), num_workers=0), **settings)
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_one_call_for_each_image(clip, root, tmp_path):
    data = ZeroShotDataModule(root=str(root), num_workers=0, eval_batch_size=4)
    file = tmp_path / "plan.json"
    callback = DiffusionClassifierCallback(plan=True, plan_file=str(file), microbatch=4)
    trainer(callbacks=[callback]).test(ZeroShotCLIP(clip), data, verbose=False)
    plan = json.loads(file.read_text())
    assert (plan["images"], plan["candidates"], plan["nfe_per_image"], plan["nfe"]) == (12, 3, 1, 12)
    assert plan["exact"]
    assert plan["flops_per_row"] > 0
    assert plan["hours"] == pytest.approx(12 / plan["rows_per_second"] / 3600)
    with pytest.raises(ValueError, match=r"plan_file: 'plan.json', but nothing is planned"):
        DiffusionClassifierCallback(plan_file="plan.json")


def test_what_cannot_be_loaded(clip, tmp_path):
    names = {"class_names": list(CLASSES)}
    with pytest.raises(ValueError, match=r"'nobody.nothing': it is no folder, and the Hub did not give it"):
        _ = ZeroShotCLIP("nobody/nothing", **names).model
    with pytest.raises(ValueError, match="pretrained: 'assets/sd_digits' is a None model, expected 'clip'"):
        _ = ZeroShotCLIP("assets/sd_digits", **names).model
    broken = tmp_path / "broken"
    shutil.copytree(clip, broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(broken / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of its CLIPModel: visual_projection\.weight"):
        _ = ZeroShotCLIP(str(broken), **names).model
    with pytest.raises(ValueError, match="tokens, but the tokenizer takes 77"):
        ZeroShotCLIP(clip, "{}", ["a" * 100]).logits(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"images: shape \(1, 2, 16, 16\), expected \(B, 3, H, W\)"):
        ZeroShotCLIP(clip, **names).logits(torch.zeros(1, 2, 16, 16))


def test_nothing_is_loaded_trained_or_saved():
    module = ZeroShotCLIP("nobody/nothing")
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
