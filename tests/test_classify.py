"""``diffclf classify`` as users type it."""

import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_diffclf import (
    ClassConditionalDiT,
    DiffusionClassifierCallback,
    LikelihoodRatio,
    ZeroShotStableDiffusion,
)
from lightning_diffclf.cli import main
from lightning_diffclf.data.digit_scenes import WORDS, DigitScenesDataModule
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.results.conformal import CalibrationRun

MODEL = str(Path(__file__).parents[1] / "assets" / "sd_digits")
LABELS = ",".join(WORDS)
COMMON = ["--labels", LABELS, "--template", "a photo of a {}", "--model", MODEL, "--draws", "24"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("scenes"), DigitScenesDataModule()
    data.setup()
    truth = {}
    for i in range(8):
        pixels = ((data.test.parts["image"][i] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i}.png")
        truth[str(folder / f"{i}.png")] = WORDS[int(data.test.parts["label"][i])]
    return folder, truth


def answers(capsys, *arguments) -> list[dict]:
    capsys.readouterr()
    main(["classify", *map(str, arguments), "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_folder_of_images(scenes, capsys):
    folder, truth = scenes
    found = answers(capsys, folder, *COMMON)
    assert {one["image"]: one["prediction"] for one in found} == truth
    for one in found:
        assert sum(one["probabilities"].values()) == pytest.approx(1)
        assert next(iter(one["probabilities"])) == one["prediction"]
        assert one["behind"][one["prediction"]] == 0
        assert one["nfe"] == sum(one["draws"].values()) < 240
        assert one["margin"] > 0
        assert one["seconds"] > 0


def test_answers_do_not_depend_on_the_other_images(scenes, capsys):
    folder, _ = scenes
    everything = answers(capsys, f"{folder}/*.png", *COMMON)
    alone = answers(capsys, folder / "5.png", *COMMON, "--microbatch", "3")
    assert alone[0]["draws"] == everything[5]["draws"]
    assert alone[0]["probabilities"] == pytest.approx(everything[5]["probabilities"], rel=1e-3)


def test_tables_and_pictures(scenes, capsys, tmp_path):
    folder, truth = scenes
    main(["classify", str(folder / "2.png"), *COMMON, "--top", "3", "--plots", str(tmp_path / "plots")])
    printed = capsys.readouterr().out
    assert truth[str(folder / "2.png")] in printed
    assert "NFE" in printed
    assert sum(word in printed for word in WORDS) == 3
    assert (tmp_path / "plots" / "2.png").read_bytes()[:4] == b"\x89PNG"


def test_several_templates_and_another_rule(scenes, capsys):
    folder, truth = scenes
    more = ["--template", "a {}", "--elimination", "Exhaustive", "--draws", "8"]
    [found] = answers(capsys, folder / "0.png", *COMMON, *more)
    assert found["prediction"] == truth[str(folder / "0.png")]
    assert found["nfe"] == 20 * 8


def test_a_search_leaves_labels_out(scenes, capsys):
    folder, truth = scenes
    found = answers(capsys, folder, *COMMON, "--search")
    assert {one["image"]: one["prediction"] for one in found} == truth
    left_out = 0
    for one in found:
        kept = [label for label in one["draws"] if one["draws"][label]]
        assert one["nfe"] == one["search_nfe"] + sum(one["draws"].values())
        assert 6 < one["search_nfe"] < 30  # six gradients
        for label, behind in one["behind"].items():
            assert (behind is None) == (label not in kept)
            assert label in kept or one["probabilities"][label] == 0
        left_out += 10 - len(kept)
    assert left_out > 8
    main(["classify", str(folder / "2.png"), *COMMON, "--search", "--top", "10"])
    printed = capsys.readouterr().out
    assert f"({found[2]['search_nfe']} search)" in printed
    assert all(word in printed for word in WORDS)


def test_bad_images_are_named_or_skipped(scenes, capsys, tmp_path):
    folder, _ = scenes
    (tmp_path / "a.png").write_bytes(b"")
    Image.fromarray(np.zeros((9, 30), np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(SystemExit, match=r"error: image: '.*a.png' is empty"):
        main(["classify", str(tmp_path), *COMMON])
    capsys.readouterr()
    main(["classify", str(tmp_path), str(folder / "1.png"), *COMMON, "--skip-bad", "--json"])
    captured = capsys.readouterr()
    assert "skipped: image: " in captured.err
    assert [Path(one["image"]).name for one in json.loads(captured.out)] == ["b.png", "1.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "cat,,dog"], "error: labels: label 1 is empty"),
        (["--labels", "cat,cat"], "error: labels: 'cat' occurs twice"),
        (["--labels", "a " + "very " * 20 + "old cat"], r"error: prompt .* tokens, but tokenizer takes 16; .* cut to"),
        (["--labels", "cat", "--template", "a photo"], "error: template: 'a photo', expected"),
        (["--labels", "cat", "--model", "/nowhere/at/all"], "error: pretrained: no folder"),
        (["--labels", "cat", "--top", "0"], "error: top: 0"),
        (["--labels", "cat", "--dtype", "int8"], "error: dtype: 'int8'"),
        (["--labels", "cat,dog", "--draws", "0"], "error: .*0 draws|draws: 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message, scenes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, _ = scenes
    model = [] if "--model" in arguments else ["--model", MODEL]
    with pytest.raises(SystemExit, match=message):
        main(["classify", str(folder / "0.png"), *arguments, *model])
    with pytest.raises(SystemExit, match="error: image: no file"):
        main(["classify", str(folder / "none.png"), "--labels", "cat", "--model", MODEL])


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """An evaluation of 24 labelled scenes by the same model, prompts and recipe."""
    folder = tmp_path_factory.mktemp("runs") / "calibration"
    recipe = {"draws": 8, "ensemble": "mean", "elimination": LikelihoodRatio(inflation=5.0)}
    callback = DiffusionClassifierCallback(**recipe, output_dir=str(folder), error_maps=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[callback], limit_test_batches=2, **quiet)
    module = ZeroShotStableDiffusion(MODEL, "a photo of a {}", list(WORDS), dtype="float32")
    trainer.test(module, DigitScenesDataModule(eval_batch_size=12), verbose=False)
    return str(folder)


def test_conformal_sets(scenes, calibration, capsys):
    folder, _ = scenes
    settings = [*COMMON[:-1], "8", "--coverage", "0.8", "--calibration", calibration]
    found = answers(capsys, folder / "3.png", *settings)
    threshold = CalibrationRun.read(calibration, 0.8).conformal.thresholds[0]
    behind = found[0]["behind"]
    expected = [a for a in behind if behind[a] - min(b for c, b in behind.items() if c != a) <= threshold]
    assert sorted(found[0]["conforming"]) == sorted(expected)
    main(["classify", str(folder / "3.png"), *settings])
    assert f"{{{', '.join(found[0]['conforming'])}}}" in capsys.readouterr().out
    [best] = answers(capsys, folder / "3.png", *settings, "--ensemble", "best")  # of one prompt, which is the mean too
    assert best | {"seconds": 0} == found[0] | {"seconds": 0}
    with pytest.raises(SystemExit, match=r"was made with other ones .*recipe.ensemble: 'mean' there, 'best' here"):
        answers(capsys, folder / "3.png", *settings, "--ensemble", "best", "--template", "a {}")
    with pytest.raises(SystemExit, match=r"coverage: nothing to calibrate on, expected --calibration RUN"):
        main(["classify", str(folder / "3.png"), *COMMON, "--coverage", "0.8"])
    with pytest.raises(SystemExit, match=r"the calibration run .* was made with other ones .*draws"):
        main(["classify", str(folder / "3.png"), *COMMON, "--coverage", "0.8", "--calibration", calibration])
    fewer = [*settings, "--labels", ",".join(WORDS[:5])]
    with pytest.raises(SystemExit, match=r"was made with other ones .*candidates"):
        main(["classify", str(folder / "3.png"), *fewer])


def test_conformal_sets_of_a_network_with_classes_of_its_own(scenes, tmp_path, capsys):
    size = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
    module = ClassConditionalDiT(**size, latents=False)
    for seed, weight in enumerate(module.parameters()):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(seed))
    callback = DiffusionClassifierCallback(draws=4, elimination=LikelihoodRatio(), output_dir=str(tmp_path / "run"))
    trainer = L.Trainer(callbacks=[callback], limit_test_batches=1, logger=False, accelerator="cpu")
    trainer.test(module, DigitsDataModule(), verbose=False)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    photo, threshold = scenes[0] / "3.png", CalibrationRun.read(tmp_path / "run", 0.8).conformal.thresholds[0]
    settings = ["--ckpt", tmp_path / "x.ckpt", "--coverage", "0.8", "--calibration", tmp_path / "run", "--draws", "4"]
    [found] = answers(capsys, photo, *settings)
    behind = found["behind"]
    expected = [a for a in behind if behind[a] - min(b for c, b in behind.items() if c != a) <= threshold]
    assert sorted(found["conforming"]) == sorted(expected)
    with pytest.raises(SystemExit, match=r"the calibration run .* was made with other ones .*candidates"):
        answers(capsys, photo, *settings, "--labels", "0,1,2")
    with torch.no_grad():
        next(module.parameters()).add_(1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(SystemExit, match=r"the calibration run .* was made with other ones .*module"):
        answers(capsys, photo, *settings)
