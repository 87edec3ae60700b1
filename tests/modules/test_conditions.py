import json

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from timm.data import ImageNetInfo

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, DiffusionClassifierCallback, Draws
from lightning_diffclf.baselines.timm_classifier import TimmFromScratch
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.modules.conditions import check_labels, conditions
from tests.photos import photos

WNIDS = ImageNetInfo().label_names()


def network() -> ClassConditionalDiT:
    settings = {"input_size": 16, "in_channels": 3, "num_classes": 1000, "latents": False, "patch_size": 4}
    module = ClassConditionalDiT(**settings, hidden_size=16, depth=1, num_heads=2).eval()
    for i, p in enumerate(module.parameters()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(i))
    return module


def objectnet(root):
    """Three classes in ObjectNet's form, of which ImageNet has two: one of them by two classes."""
    photos(root / "images", classes=["air_freshener", "alarm_clock", "backpack"], each=3, size=(24, 22))
    names = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "backpack": "Backpack"}
    files = {
        "folder_to_objectnet_label.json": json.dumps(names),
        "objectnet_to_imagenet_1k.json": json.dumps({"Alarm clock": "analog clock; digital clock", "Backpack": "pack"}),
        "imagenet_to_label_2012_v2": "pack\ndigital clock\nanalog clock\n",
        "pytorch_to_imagenet_2012_id.json": json.dumps({"409": 2, "530": 1, "414": 0}),
    }
    (root / "mappings").mkdir()
    for name, text in files.items():
        (root / "mappings" / name).write_text(text)
    return "objectnet", [409, 530, 414], [0, 0, 1]


def imagenet_a(root):
    photos(root, classes=[WNIDS[row] for row in (900, 7, 3)], each=3, size=(20, 18))
    rows = sorted((900, 7, 3), key=lambda row: WNIDS[row])
    return "imagenet", rows, [0, 1, 2]


@pytest.mark.parametrize("make", [objectnet, imagenet_a])
def test_data_with_fewer_classes_ask_about_theirs_alone(make, tmp_path):
    name, rows, classes = make(tmp_path / "data")
    data = ZeroShotDataModule(name, str(tmp_path / "data"), size=16, eval_batch_size=4, num_workers=0, crop="published")
    module = network()
    callback = DiffusionClassifierCallback(draws=5, output_dir=str(tmp_path / "out"))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="cpu", callbacks=[callback], **quiet).test(module, data, verbose=False)
    found = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    assert set(found["nfe"]) == {5 * len(rows)}
    # the whole network, asked about these classes of 1,000
    whole = network()
    for batch in data.test_dataloader():
        results = DiffusionClassifier(whole, draws=Draws(5))(batch["image"], ids=batch["id"], candidates=rows)
        for image_id, label, result in zip(batch["id"], batch["label"].tolist(), results, strict=True):
            row = found["id"].index(str(image_id))
            scores = np.asarray(result.scores_K)[rows] if len(result.scores_K) == 1000 else np.asarray(result.scores_K)
            np.testing.assert_allclose(found["scores_K"][row], scores, rtol=1e-4)
            assert found["prediction"][row] == classes[int(np.argmin(scores))]
            assert found["label"][row] == label


def test_names_without_data():
    assert conditions(3, None).candidates.names == ("0", "1", "2")
    assert conditions(2, ["cat", "dog"]).candidates.names == ("cat", "dog")
    assert conditions(3, None).rows is None


def test_labels_that_are_not_those_of_the_network_are_refused_before_any_image():
    settings = {"input_size": 8, "in_channels": 1, "latents": False, "hidden_size": 16, "depth": 1, "num_heads": 2}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", limit_test_batches=1, limit_predict_batches=1, **quiet)
    without_47 = DigitsDataModule(left_out=[4, 7])
    ten = ClassConditionalDiT(num_classes=10, class_names=None, **settings)
    eight = ClassConditionalDiT(num_classes=8, class_names=list("01235689"), **settings)
    trainer.test(eight, without_47, verbose=False)
    with pytest.raises(ValueError, match=r"num_classes: 10, but the data have 8 classes, '0' to '9'; expected"):
        trainer.test(ten, without_47)
    with pytest.raises(ValueError, match="data: '4' is class 3, but class 4 of the network; expected the classes in"):
        check_labels(DigitsDataModule(left_out=[3, 7]), 8, list("01x34689"))
    check_labels(without_47, 8, list("01234567"))  # numbers are what classes without a name are called
    with pytest.raises(ValueError, match="num_classes: 10, but the data have 8 classes"):
        trainer.predict(TimmFromScratch("resnet18", num_classes=10, in_channels=1), without_47)
    trainer.predict(ten, without_47)  # images of no class
