"""Images from prompts are those of diffusers' own loop, each from noise of its own; a classifier trained on them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from lightning_diffclf.baselines.synthetic_data import TextToImage
from lightning_diffclf.baselines.timm_classifier import TimmFromScratch
from lightning_diffclf.candidates import Candidates
from lightning_diffclf.commands import run
from lightning_diffclf.data.digit_scenes import DigitScenesDataModule
from lightning_diffclf.data.image_folder import ImageFolderDataModule
from lightning_diffclf.data.prompts import PromptSet, from_names
from lightning_diffclf.models.pipeline import load
from lightning_diffclf.sampling import initial_noise
from tests.baselines.evaluation import evaluate, trainer

SD = str(Path(__file__).parents[2] / "assets" / "sd_digits")
WORDS = "zero,one,two"


def sample(out: Path, **settings) -> dict[str, bytes]:
    settings = {"model": SD, "labels": WORDS, "prompts": "a photo of a {}", "steps": 3, "per_class": 4} | settings
    given = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    run("sample", [*given, f"--out={out}", "--accelerator=cpu"])
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/*.png")}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_those_of_diffusers(guidance):
    drawer = TextToImage(load(SD), from_names(["two", "seven"], "a photo of a {}")).to(torch.device("cpu"))
    found = drawer.sample([(1, 5), (0, 2)], guidance, steps=4, seed=3)
    pipeline = StableDiffusionPipeline.from_pretrained(SD, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    expected = pipeline(
        ["a photo of a seven", "a photo of a two"],
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=initial_noise((4, 4, 8), ["1/5", "0/2"], 3),
        height=8,
        width=16,
        output_type="pt",
    ).images
    torch.testing.assert_close((found + 1) / 2, expected, atol=2e-3, rtol=0)


def test_an_image_does_not_depend_on_the_others_and_is_drawn_once(tmp_path):
    whole = sample(tmp_path / "one")
    assert sorted(whole) == [f"{c:04d}/{number:05d}.png" for c in range(3) for number in range(4)]
    kept = tmp_path / "one" / "0000" / "00000.png"
    before = kept.stat().st_mtime_ns
    (tmp_path / "one" / "0001" / "00002.png").unlink()  # as after a kill
    assert sample(tmp_path / "one", batch_size=1).keys() == whole.keys()
    assert kept.stat().st_mtime_ns == before
    again, first = (
        np.asarray(Image.open(p)).astype(int)
        for p in (tmp_path / "one" / "0001" / "00002.png", tmp_path / "one" / "0001" / "00001.png")
    )
    (tmp_path / "first.png").write_bytes(whole["0001/00002.png"])
    assert np.abs(again - np.asarray(Image.open(tmp_path / "first.png"))).max() <= 1  # rounding of other batches
    assert np.abs(again - first).max() > 10
    with pytest.raises(ValueError, match=r"holds other samples \(denoiser.prompts"):
        sample(tmp_path / "one", prompts="a digit {}")


def test_images_of_a_class_take_its_prompts_in_turn():
    asked = from_names(["two", "seven"], ["a photo of a {}", "a digit {}"])
    drawer = TextToImage(load(SD), asked).to(torch.device("cpu"))
    alone = TextToImage(load(SD), from_names(["two", "seven"], "a digit {}")).to(torch.device("cpu"))
    torch.testing.assert_close(drawer.sample([(1, 3)], 1, 2), alone.sample([(1, 3)], 1, 2))
    assert not torch.equal(drawer.sample([(1, 2)], 1, 2), alone.sample([(1, 2)], 1, 2))


def test_a_classifier_is_trained_on_them_and_evaluated_on_real_images(tmp_path):
    sample(tmp_path / "drawn", per_class=3)
    data = ImageFolderDataModule(str(tmp_path / "drawn"), [8, 16], val_share=0.3, test_share=0, num_workers=0)
    assert (data.image_shape, data.num_classes) == ((3, 8, 16), 3)
    vit = {"model": "vit_tiny_patch16_224", "hidden_size": 16, "depth": 1, "num_heads": 1, "patch_size": 4}
    module = TimmFromScratch(**vit, input_size=[8, 16], num_classes=3)
    trainer(max_steps=2, limit_val_batches=0).fit(module, data)
    with pytest.raises(ValueError, match=r"num_classes: 3, but the data have 10 classes, 'zero' to 'nine'"):
        evaluate(tmp_path / "out", module, DigitScenesDataModule())


def test_what_cannot_be_drawn_is_said(tmp_path):
    for settings, message in (
        ({"model": None}, "expected either ckpt, a class-conditional network, or model"),
        ({"ckpt": "a.ckpt"}, "expected either ckpt, a class-conditional network, or model"),
        ({"vae": "vae"}, "vae: 'vae' means nothing for --model; expected none"),
        ({"labels": None}, "class_names: none given, expected a name for each class, or a CSV file as prompts"),
        ({"prompts": "a digit"}, r"prompts: 'a digit', expected a CSV file, a template with '\{\}'"),
        ({"labels": "one,,two"}, "labels: label 1 is empty"),
        ({"model": str(tmp_path)}, "has no model_index.json"),
        ({"classes": "nine"}, r"classes: \['nine'\], expected names or numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(tmp_path / "out", **settings)
    (tmp_path / "prompts.csv").write_text("prompt,classname,classidx\na two,two,0\na nine,nine,2\n")
    with pytest.raises(ValueError, match="has no prompt for class 1"):
        sample(tmp_path / "out", labels=None, prompts=tmp_path / "prompts.csv")
    with pytest.raises(ValueError, match=r"prompts: none for \['b'\], expected one for each class"):
        TextToImage(None, PromptSet(Candidates(["a", "c"], [0, 2], ["a", "b", "c"]), ["a", "c"]))
