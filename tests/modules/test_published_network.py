"""PublishedNetwork under a Trainer and in commands, on tiny twins of the published files."""

import json

import lightning as L
import pytest
import torch
from safetensors.torch import save_file

from lightning_diffclf import (
    ClassConditionalDiT,
    DiffusionClassifier,
    Draws,
    LikelihoodRatio,
    PublishedNetwork,
    Recipe,
)
from lightning_diffclf.cli import main
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.images import open_image, transform
from lightning_diffclf.modules.zero_shot_sd import ZeroShotStableDiffusion
from tests.models import published_twins as twins
from tests.photos import photos

NAMES = ["cat", "dog", "owl"]
HEADS = {"num_heads": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Networks of three classes on pixels or latents (16 × 16 pixels), an autoencoder, statistics, and photos."""
    folder = tmp_path_factory.mktemp("published")
    save_file(twins.transformer(classes=3, side=4), folder / "sit.safetensors")
    save_file(twins.transformer(classes=3, side=16, channels=3), folder / "pixels.safetensors")
    save_file(twins.edm2(classes=3, side=16, channels=3, widths=(64, 64)), folder / "edm2.safetensors")
    torch.save(twins.ldm(), folder / "vae.pt")
    torch.save({"mean": torch.zeros(4), "std": torch.ones(4)}, folder / "latents.pt")
    photos(folder / "photos", NAMES, each=2)
    return folder


def images(count=3, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_on_latents(files):
    given = {"family": "sit", "vae": str(files / "vae.pt"), "latents": str(files / "latents.pt")}
    module = PublishedNetwork(str(files / "sit.safetensors"), class_names=NAMES, none_of_these=True, **given, **HEADS)
    assert module.native_size == (16, 16)
    assert list(module.candidates.names) == [*NAMES, "none of these"]
    x0 = module.encode(images())
    torch.testing.assert_close(x0, twins.ldm_encoded(twins.ldm(), images()), rtol=1e-4, atol=1e-4)
    t, k = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 1])
    expected = twins.transformer_forward(twins.transformer(classes=3, side=4), x0, t, k)
    torch.testing.assert_close(module.predict(x0, t, k), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.predict_from(x0, t, module.conditions(k)), module.predict(x0, t, k))
    assert not list(module.parameters())  # nothing to train, nothing to save
    found = DiffusionClassifier(module, Draws(4))(images())
    assert [len(one.scores_K) for one in found] == [4, 4, 4]


def test_what_does_not_belong_together(files, tmp_path):
    def ask(module):
        return module.candidates, module.encode(images())

    def refused(message, **arguments):
        with pytest.raises(ValueError, match=message):
            ask(PublishedNetwork(**arguments))

    sit, pixels = str(files / "sit.safetensors"), str(files / "pixels.safetensors")
    refused("weights: none given, expected --ckpt FILE")
    refused("class_names: 2, but the network has 3 classes", weights=sit, family="sit", class_names=["a", "b"], **HEADS)
    refused("no null label", weights=str(files / "edm2.safetensors"), none_of_these=True)
    save_file(twins.transformer(channels=8, side=4), tmp_path / "eight.safetensors")
    refused(
        "vae: latents of 4 channels, expected 8",
        weights=str(tmp_path / "eight.safetensors"),
        family="sit",
        vae=str(files / "vae.pt"),
        **HEADS,
    )
    module = PublishedNetwork(pixels, family="sit", **HEADS)
    with pytest.raises(ValueError, match=r"shape \(3, 3, 8, 8\), expected \(B, 3, 16, 16\)"):
        module.encode(images(side=8))
    with pytest.raises(ValueError, match=r"expected pixels in \[-1, 1\]"):
        module.encode(3 * images())


def test_a_thousand_classes_are_imagenets(tmp_path):
    save_file(twins.transformer(classes=1000, channels=3, width=16, depth=1), tmp_path / "w.safetensors")
    names = PublishedNetwork(str(tmp_path / "w.safetensors"), family="sit", **HEADS).candidates.names
    assert len(set(names)) == 1000
    assert (names[0], names[281]) == ("tench", "tabby")


@pytest.mark.parametrize("file", ["pixels", "edm2"])
def test_evaluated_by_the_command_line(file, files, tmp_path):
    family = ["--model.family=sit", "--model.num_heads=4"] if file == "pixels" else []
    main(
        [
            "evaluate",
            f"--ckpt={files / file}.safetensors",
            f"--run_dir={tmp_path / 'run'}",
            "--config=sit_256.yaml",
            *(family or ["--model.family=edm2"]),
            "--data.name=folder",
            f"--data.root={files / 'photos'}",
            "--data.size=null",
            "--data.num_workers=0",
            "--classifier.draws=3",
            "--classifier.microbatch=12",
            "--trainer.accelerator=cpu",
        ]
    )
    metrics = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())
    assert metrics["metrics"]["images"] == 6
    assert metrics["metrics"]["nfe_per_image"] == 9
    module = metrics["settings"]["module"]
    assert module["class"].endswith("PublishedNetwork")
    assert {"net", "noise_levels", "asked"} <= module.keys()
    assert str(files) not in json.dumps(module)  # where the file lies does not matter


@pytest.mark.parametrize("labels", [None, "cat,2"])
def test_photos_by_the_command_line(labels, files, tmp_path, capsys):
    picture = next((files / "photos/dog").glob("*.png"))
    names = ["0", "1", "2"] if labels is None else ["0", "2"]
    main(
        [
            "classify",
            str(picture),
            f"--ckpt={files / 'edm2.safetensors'}",
            "--draws=4",
            "--json",
            "--device=cpu",
            *([] if labels is None else [f"--labels={labels.replace('cat', '0')}"]),
        ]
    )
    [answer] = json.loads(capsys.readouterr().out)
    assert sorted(answer["probabilities"]) == names
    assert answer["prediction"] in names
    pixels = transform(16, 16, crop="published")(open_image(picture))[None]
    recipe = Recipe(4, elimination=LikelihoodRatio(), candidates=[int(name) for name in names])
    [expected] = DiffusionClassifier(PublishedNetwork(str(files / "edm2.safetensors")), recipe)(
        pixels, content_ids(pixels)
    )
    assert answer["probabilities"] == pytest.approx(dict(expected.top(3)), rel=1e-3)


def test_a_training_of_ours_by_the_command_line(files, tmp_path, capsys):
    module = ClassConditionalDiT(
        **{"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3},
        latents=False,
        class_names=NAMES,
    )
    for i, weight in enumerate(module.parameters()):
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(i))
    trainer = L.Trainer(logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    picture = next((files / "photos/dog").glob("*.png"))
    main(["classify", str(picture), f"--ckpt={tmp_path / 'x.ckpt'}", "--labels=owl,0", "--draws=4", "--json"])
    [answer] = json.loads(capsys.readouterr().out)
    grey = transform(8, 8, crop="published")(open_image(picture).convert("L"))[None]
    recipe = Recipe(4, elimination=LikelihoodRatio(), candidates=[2, 0])
    [expected] = DiffusionClassifier(module.eval(), recipe)(grey, content_ids(grey))
    assert answer["probabilities"] == pytest.approx(dict(expected.top(2)), rel=1e-3)
    assert sorted(answer["probabilities"]) == ["cat", "owl"]
    with pytest.raises(SystemExit, match=r"family: 'sit' given, but .* is the checkpoint of a training"):
        main(["classify", str(picture), f"--ckpt={tmp_path / 'x.ckpt'}", "--family=sit"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels=cat", "--ckpt=edm2"], r"labels: \['cat'\], expected names or numbers 0 … 2, or all"),
        (["--ckpt=edm2", "--template=a {}"], "template: given, but --ckpt is of a network with classes of its own"),
        (["--ckpt=edm2", "--dtype=float16"], "dtype: given, but --ckpt"),
        (["--ckpt=pixels"], "family: weights of dit and sit look the same"),
        (["--ckpt=edm2", "--family=sit"], "are of family edm2, not of sit"),
        (["--ckpt=nowhere"], "no file"),
        ([], "labels: none given, expected labels with commas between them, or --ckpt"),
    ],
    ids=range(7),
)
def test_photos_that_cannot_be_asked_about(arguments, message, files, tmp_path):
    picture = str(next((files / "photos/dog").glob("*.png")))
    given = [one.replace("ckpt=", f"ckpt={files}/") for one in arguments]
    given = [f"{one}.safetensors" if one.startswith("--ckpt") else one for one in given]
    with pytest.raises(SystemExit, match=message):
        main(["classify", picture, *given])


def test_nothing_of_it_is_a_part_of_the_module(files, tmp_path):
    module = PublishedNetwork(str(files / "edm2.safetensors"))
    other = ZeroShotStableDiffusion()
    assert module.encode(images()).shape == (3, 3, 16, 16)
    assert list(module.state_dict()) == list(other.state_dict()) == []
    trainer = L.Trainer(logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"] == {}
