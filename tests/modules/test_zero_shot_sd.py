"""The module under a Trainer, with the tiny model that the repository ships: real weights, real digits."""

import json
import os
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
import pytest
import torch

from lightning_diffclf import DiffusionClassifierCallback, LikelihoodRatio, ZeroShotStableDiffusion
from lightning_diffclf.data.digit_scenes import WORDS, DigitScenesDataModule
from lightning_diffclf.data.winoground import WinogroundDataModule
from lightning_diffclf.modules.zero_shot_sd import make_prompts

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "assets" / "sd_digits")


def evaluate(out: Path, data: L.LightningDataModule, batches: int, precision="32-true", **settings):
    module = ZeroShotStableDiffusion(MODEL, **{"prompts": "digits", "dtype": "float32"} | settings.pop("model", {}))
    callback = DiffusionClassifierCallback(output_dir=str(out), **settings)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        limit_test_batches=batches,
        precision=precision,
        callbacks=[callback],
    )
    trainer.test(module, data, verbose=False)
    rows = pq.read_table(out / "predictions.parquet").to_pydict()
    return rows, json.loads((out / "metrics.json").read_text()), module


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("sd") / "out", DigitScenesDataModule(), 2, draws=24)


def test_digits_are_told_from_prompts(digits):
    rows, report, module = digits
    assert report["metrics"]["images"] == 120
    assert report["metrics"]["accuracy"] >= 0.9
    assert module.candidates.names == WORDS
    assert module.denoiser.prompts[3] == "a photo of a three"
    assert report["settings"]["class_names"] == list(WORDS)
    assert rows["thumbnail"][0] is not None


def test_elimination_keeps_the_decisions(digits, tmp_path):
    rows, _, _ = evaluate(
        tmp_path / "out", DigitScenesDataModule(), 2, draws=24, elimination=LikelihoodRatio(0.01, inflation=5.0)
    )
    assert sum(a == b for a, b in zip(rows["prediction"], digits[0]["prediction"], strict=True)) >= 119
    assert sum(rows["nfe"]) < sum(digits[0]["nfe"]) / 4


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "32-true"), ("float32", "bf16-mixed")])
def test_half_precision_decides_the_same(dtype, precision, digits, tmp_path):
    model = {"model": {"dtype": dtype}}
    rows, _, _ = evaluate(tmp_path / "out", DigitScenesDataModule(), 2, precision=precision, draws=24, **model)
    assert sum(a == b for a, b in zip(rows["prediction"], digits[0]["prediction"], strict=True)) >= 119
    for scores in rows["scores_K"]:
        assert len(set(scores)) == 10  # no ties


def test_several_prompts_for_each_class(tmp_path):
    prompts = {"model": {"prompts": ["a photo of a {}", "a {}"]}}
    rows, report, module = evaluate(tmp_path / "out", DigitScenesDataModule(eval_batch_size=20), 1, draws=8, **prompts)
    assert len(module.candidates) == 20
    assert set(rows["prediction"]) <= set(range(10))
    assert report["metrics"]["nfe_per_image"] == 160


def test_winoground_with_digits(tmp_path):
    rows, report, _ = evaluate(tmp_path / "out", WinogroundDataModule(eval_batch_size=20), 2, draws=40)
    assert report["metrics"]["groups"] == 20
    assert report["metrics"]["text"] >= 0.8  # chance is 25 %
    assert report["metrics"]["group"] > 0.5
    assert rows["id"][:4] == ["0/0", "0/1", "1/0", "1/1"]
    assert {len(row) for row in rows["candidates_K"]} == {3}


@pytest.mark.parametrize("settings", [{"elimination": LikelihoodRatio()}, {"budget": 60}])
def test_winoground_needs_every_draw(tmp_path, settings):
    with pytest.raises(
        ValueError, match=r"WinogroundDataModule: .* fair only over the same draws; found .*expected ne"
    ):
        evaluate(tmp_path / "out", WinogroundDataModule(), 2, draws=40, **settings)
    assert not (tmp_path / "out").exists()  # refused before any work


def test_nothing_is_trained_saved_or_loaded_early():
    module = ZeroShotStableDiffusion("nobody/nothing", class_names=["cat"])  # not asked for yet
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    module = ZeroShotStableDiffusion(MODEL, "digits", WORDS)
    module.encode(torch.zeros(1, 3, 8, 16))
    assert list(module.parameters()) == []
    assert module.denoiser.pipeline.text_encoder is None


def test_other_weights_are_another_run(tmp_path):
    out = tmp_path / "out"
    evaluate(out, DigitScenesDataModule(eval_batch_size=4), 1, draws=2)
    with pytest.raises(ValueError, match=r"module\.denoiser\.network\.weights"):
        evaluate(out, DigitScenesDataModule(eval_batch_size=4), 1, draws=2, model={"dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("prompts", "names", "message"),
    [
        ("a photo", ["cat"], "prompts: 'a photo', expected a CSV file, a template with"),
        ("cifar10", None, "class_names: none given"),
        ("{}", ["cat", "cat"], "labels: 'cat' occurs twice"),
    ],
)
def test_bad_prompts(prompts, names, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(prompts, names)


def test_the_model_is_small():
    files = list(Path(MODEL).rglob("*.safetensors"))
    assert len(files) == 3
    assert sum(os.path.getsize(path) for path in files) <= 2_000_000


def test_prompts_of_a_csv_need_no_class_names(tmp_path):
    path = tmp_path / "prompts.csv"
    lines = [f"a photo of a {word},{word},{number}" for number, word in enumerate(WORDS)]
    path.write_text("\n".join(["prompt,classname,classidx", *lines]))

    class Unnamed(DigitScenesDataModule):
        @property
        def class_names(self):
            raise ValueError("not asked for")

    rows, _, module = evaluate(tmp_path / "out", Unnamed(eval_batch_size=8), 1, draws=8, model={"prompts": str(path)})
    assert module.candidates.names == WORDS
    assert sum(a == b for a, b in zip(rows["prediction"], rows["label"], strict=True)) >= 7
