"""Networks of timm as timm itself evaluates them; one that is trained here learns."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

from lightning_diffclf.baselines.timm_classifier import TimmClassifier, TimmFromScratch, asked_of
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from tests.baselines.evaluation import evaluate, trainer
from tests.baselines.tiny_timm import write_timm
from tests.photos import photos

CLASSES = (7, 310, 999)  # of ImageNet's 1,000
DIGITS = {"input_size": 8, "in_channels": 1, "num_classes": 10, "patch_size": 2}
VIT = DIGITS | {"model": "vit_tiny_patch16_224", "hidden_size": 32, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> str:
    return write_timm(tmp_path_factory.mktemp("timm"))


def test_it_is_timms_own_evaluation_on_the_classes_that_the_data_have(network, tmp_path):
    names = [ImageNetInfo().label_names()[c] for c in CLASSES]
    files = photos(tmp_path / "imagenet-a", names, each=4, size=(60, 50))
    data = ZeroShotDataModule("imagenet", str(tmp_path / "imagenet-a"), num_workers=0)
    rows, report = evaluate(tmp_path / "out", TimmClassifier(network), data)
    own = timm.create_model(network, pretrained=True).eval()
    config = resolve_model_data_config(own)
    assert (config["input_size"], config["crop_pct"], list(config["mean"])) == ((3, 48, 48), 0.8, [0.4, 0.5, 0.6])
    transform = create_transform(**config, is_training=False)
    with torch.no_grad():
        logits = own(torch.stack([transform(Image.open(path)) for path, _ in files]))[:, sorted(CLASSES)].numpy()
    assert np.array(rows["scores_K"]) == pytest.approx(-logits, abs=1e-4)
    assert rows["prediction"] == logits.argmax(1).tolist()
    assert report["metrics"]["accuracy"] == np.mean(logits.argmax(1) == [label for _, label in files])
    assert report["metrics"]["nfe_per_image"] == 1


def test_several_classes_of_imagenet_make_up_one_of_the_data(network):
    class ObjectNet:
        network_classes = ((3, 5), (8,))
        class_names = ("chair", "desk")

    module = TimmClassifier(network)
    module._asked.append(asked_of(1000, None, ObjectNet()))
    assert module.candidates.classes == (0, 0, 1)
    images = torch.rand(2, 3, 48, 48) * 2 - 1
    whole = TimmClassifier(network).logits(images)
    assert torch.equal(module.logits(images), whole[:, [3, 5, 8]])
    assert torch.equal(
        module.logits(images[:, :1]), TimmClassifier(network).logits(images[:, :1].expand(-1, 3, -1, -1))[:, [3, 5, 8]]
    )


def test_other_classes_are_refused(network, tmp_path):
    photos(tmp_path / "own", each=1)
    own = ZeroShotDataModule(root=str(tmp_path / "own"), num_workers=0)
    with pytest.raises(ValueError, match=r"model: 1,000 classes, but the data have 3, .*TimmFromScratch"):
        evaluate(tmp_path / "out", TimmClassifier(network), own)
    photos(tmp_path / "imagenet", ["n01440764"], each=1)
    with pytest.raises(ValueError, match="model: 7 classes, but the data number theirs by ImageNet's 1,000"):
        asked_of(7, None, ZeroShotDataModule("imagenet", str(tmp_path / "imagenet")))
    with pytest.raises(ValueError, match=r"model: 'resnet_of_mine' cannot be made \(timm has no such architecture"):
        _ = TimmClassifier("resnet_of_mine").net
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        TimmClassifier(network).logits(torch.zeros(1, 4, 48, 48))


def test_a_network_trained_from_scratch_learns_the_digits(tmp_path):
    torch.manual_seed(0)
    module, data = TimmFromScratch(**VIT, lr=4e-3), DigitsDataModule(batch_size=128)
    trainer(max_steps=60, limit_val_batches=0).fit(module, data)
    _, report = evaluate(tmp_path / "out", module, data)
    assert report["metrics"]["accuracy"] > 0.2  # chance is 0.1, of 360 images
    with torch.no_grad():
        images = data.test.parts["image"]
        right = (module.eval().net(images).argmax(1) == data.test.parts["label"]).float().mean()
    assert report["metrics"]["accuracy"] == pytest.approx(right.item())


@pytest.mark.parametrize("architecture", ["resnet10t", "mobilenetv3_small_050"])
def test_convolutional_networks_see_resized_images(architecture):
    module = TimmFromScratch(architecture, input_size=32, in_channels=1, num_classes=3).eval()
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    resized = torch.nn.functional.interpolate(images, (32, 32), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert torch.allclose(module.logits(images), module.net(resized), atol=1e-5)


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="class_names: 1 names for num_classes = 10"):
        TimmFromScratch(**VIT, class_names=["one"])
    with pytest.raises(ValueError, match="input_size, in_channels, num_classes: None"):
        TimmFromScratch(**VIT | {"num_classes": None})
    with pytest.raises(ValueError, match="model: 'resnet10t' cannot be made"):
        TimmFromScratch("resnet10t", depth=3)
    with pytest.raises(ValueError, match="num_classes: 9, but the training data have 10 classes"):
        trainer(max_steps=1).fit(TimmFromScratch(**VIT | {"num_classes": 9}), DigitsDataModule())

    class Shifted(DigitsDataModule):  # to validate on some of the classes: labels would be those of others
        network_classes = ((3,), (7,))

    with pytest.raises(ValueError, match="data: 2 classes to validate on, expected 10 as in training"):
        trainer(max_steps=1).fit(TimmFromScratch(**VIT), Shifted())
    with pytest.raises(ValueError, match=r"images: shape \(1, 3, 8, 8\), expected \(B, 1, H, W\)"):
        TimmFromScratch(**VIT).logits(torch.zeros(1, 3, 8, 8))
