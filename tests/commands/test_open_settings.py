"""What images.yaml leaves open is what the data say; the checkpoint says it from then on."""

import re
import shutil
from pathlib import Path

import lightning as L
import pandas as pd
import pytest
import torch
import yaml
from jsonargparse import Namespace

from lightning_diffclf import ClassConditionalDiT
from lightning_diffclf.cli import CONFIG_KEY, evaluate, main, train
from lightning_diffclf.commands.open_settings import complete
from lightning_diffclf.data.image_folder import ImageFolderDataModule
from lightning_diffclf.modules.checkpoints import check_classes, read_checkpoint, trained_module
from tests.photos import autoencoder, photos

CLASSES = ("black cat", "dog", "owl")
QUICK = [
    *("--config=images.yaml", "--data.size=8", "--data.num_workers=0", "--trainer.max_steps=2", "--ckpt_path=null"),
    *("--trainer.val_check_interval=2", "--checkpoint.every_n_train_steps=2", "--model.hidden_size=16"),
    *("--model.depth=1", "--model.num_heads=2", "--classifier.draws=2", "--classifier.fit_images=2"),
    *("--samples.columns=1", "--samples.steps=1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]
QUIET = "--trainer.enable_progress_bar=false"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    photos(folder / "photos", CLASSES, each=10)
    autoencoder(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def run_dir(root) -> Path:
    train([*QUICK, f"--data.root={root / 'photos'}", f"--run_dir={root / 'run'}"])
    return root / "run"


def test_a_run_knows_its_classes_and_sizes(run_dir, tmp_path):
    path = run_dir / "checkpoints" / "last.ckpt"
    settings = yaml.safe_load(read_checkpoint(path)[CONFIG_KEY])
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    assert (model["input_size"], model["in_channels"], model["num_classes"]) == (8, 3, 3)
    assert model["class_names"] == data["classes"] == list(CLASSES)
    assert trained_module(path).candidates.names == CLASSES
    assert (run_dir / "samples.png").is_file()
    main(
        [*f"sample --ckpt {path} --per_class 1 --steps 1 --out {tmp_path / 's.png'} --classes".split(), "dog,black cat"]
    )


def test_names_go_with_a_checkpoint_of_any_trainer(root, tmp_path):
    module = ClassConditionalDiT(
        input_size=8,
        in_channels=3,
        num_classes=3,
        latents=False,
        hidden_size=16,
        depth=1,
        num_heads=2,
        learn_sigma=False,
    )
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, **quiet)
    trainer.fit(module, ImageFolderDataModule(str(root / "photos"), size=8, num_workers=0))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert trained_module(tmp_path / "a.ckpt").candidates.names == CLASSES


def test_it_is_evaluated_on_its_test_images_or_on_another_folder(run_dir, tmp_path):
    path = run_dir / "checkpoints" / "last.ckpt"
    evaluate([f"--ckpt={path}", f"--out={tmp_path / 'out'}", QUIET])
    found = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert sorted(found["id"].str.split("/").str[0]) == sorted(CLASSES)  # a tenth of each
    photos(tmp_path / "others", ("dog", "owl"), each=2)
    flags = [f"--data.root={tmp_path / 'others'}", "--data.val_share=0", "--data.test_share=1"]
    evaluate([f"--ckpt={path}", f"--out={tmp_path / 'more'}", QUIET, *flags])
    found = pd.read_parquet(tmp_path / "more" / "predictions.parquet")
    assert dict(zip(found["id"], found["label"], strict=True)) == {
        "dog/0.png": 1,
        "dog/1.png": 1,
        "owl/0.png": 2,
        "owl/1.png": 2,
    }
    photos(tmp_path / "others", ("yak",), each=2)
    with pytest.raises(SystemExit, match=r"folder 'yak' in .* is no class that was trained"):
        evaluate([f"--ckpt={path}", f"--out={tmp_path / 'no'}", QUIET, *flags])


def test_a_run_keeps_to_its_classes(run_dir, root, tmp_path):
    def resumed(folder):
        with pytest.raises(SystemExit) as exit_info:
            train([*QUICK, "--ckpt_path=last", f"--data.root={folder}", f"--run_dir={run_dir}"])
        return str(exit_info.value.code)

    shutil.copytree(root / "photos", tmp_path / "renamed")
    (tmp_path / "renamed" / "dog").rename(tmp_path / "renamed" / "a dog")  # now the first class: all numbers change
    assert "was trained on 3 classes, but there are 3 here: 'a dog' is new and 'dog' is gone. To train anew" in resumed(
        tmp_path / "renamed"
    )
    shutil.copytree(root / "photos" / "dog", tmp_path / "renamed" / "dog")
    assert "was trained on 3 classes, but there are 4 here: 'a dog' is new. To" in resumed(tmp_path / "renamed")
    path = run_dir / "checkpoints" / "last.ckpt"
    checkpoint, module = read_checkpoint(path), trained_module(path)
    check_classes(module, checkpoint, path)
    checkpoint["hyper_parameters"]["class_names"] = ["dog", "owl", "black cat"]
    with pytest.raises(ValueError, match="3 classes, but there are 3 here: the same ones in another order"):
        check_classes(module, checkpoint, path)


def settings(root, data=None, **network) -> Namespace:
    arguments = {"root": str(root / "photos"), "size": 8, "classes": None} | (data or {})
    open_ = {"input_size": None, "in_channels": None, "num_classes": None, "class_names": None, "latents": False}
    return Namespace(
        model=Namespace(class_path="M", init_args=Namespace(**open_ | {"vae": None} | network)),
        data=Namespace(
            class_path="lightning_diffclf.data.image_folder.ImageFolderDataModule", init_args=Namespace(**arguments)
        ),
    )


def test_latents_have_the_autoencoders_size(root):
    config = settings(root, {"size": 16}, latents=True, vae=str(root / "vae"))
    complete(config)
    assert (config["model.init_args.input_size"], config["model.init_args.in_channels"]) == (2, 4)
    with pytest.raises(
        ValueError, match=r"images of 3 channels and 12 x 12 pixels, expected 3 channels and multiples of 8"
    ):
        complete(settings(root, {"size": 12}, latents=True, vae=str(root / "vae")))
    with pytest.raises(ValueError, match=r"model\.vae: null, expected the autoencoder"):
        complete(settings(root, latents=True))


def test_what_is_given_stays(root):
    config = settings(root, input_size=4, in_channels=1, num_classes=7)
    before = config.clone()
    complete(config)
    assert config == before
    config = settings(root, class_names=["a", "b", "c"], input_size=4)
    complete(config)
    assert config["model.init_args.class_names"] == ["a", "b", "c"]
    assert (config["model.init_args.input_size"], config["model.init_args.num_classes"]) == (4, 3)
    assert config["data.init_args.classes"] == list(CLASSES)


def test_data_that_do_not_say(root):
    config = settings(root)
    config["data"] = Namespace(
        class_path="lightning_diffclf.data.digits.DigitsDataModule", init_args=Namespace(batch_size=4)
    )
    with pytest.raises(ValueError, match=r"model.input_size: null, but DigitsDataModule does not say it"):
        complete(config)
    config["model.init_args.input_size"] = config["model.init_args.in_channels"] = 1
    complete(config)
    assert config["model.init_args.num_classes"] == 10
    with pytest.raises(SystemExit) as exit_info:
        train([*QUICK, f"--data.root={root / 'nowhere'}"])
    assert re.match("error: data: no folder '.*nowhere'", str(exit_info.value.code))


def test_weights_are_those_of_a_network_with_numbers(run_dir):
    weights = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights["net.y_embedder.embedding_table.weight"].shape == (4, 16)
    assert weights["net.x_embedder.proj.weight"].shape == torch.Size([16, 3, 4, 4])
