"""A run's identity: every argument of every part is in it, or cannot change results; two runs never mix."""

import dataclasses
import importlib
import inspect
import json
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision import transforms
from torchvision.datasets import ImageFolder

import lightning_diffclf.baselines
import lightning_diffclf.data
import lightning_diffclf.modules
from lightning_diffclf import (
    Candidates,
    ClassConditionalDiT,
    DiffusionClassifierCallback,
    Draws,
    LinearProbe,
    LoraStableDiffusion,
    NoiseSchedule,
    PairedTest,
    PublishedNetwork,
    SoftPrompts,
    ZeroShotStableDiffusion,
)
from lightning_diffclf.baselines.clip import ZeroShotCLIP
from lightning_diffclf.baselines.sd_features import DenoiserFeatures
from lightning_diffclf.baselines.timm_classifier import TimmClassifier, TimmFromScratch
from lightning_diffclf.baselines.trained import TrainedClassifier
from lightning_diffclf.callbacks.run_settings import data_identity, module_identity
from lightning_diffclf.classifier import Recipe
from lightning_diffclf.commands import run
from lightning_diffclf.data.caption_pairs import CaptionPairsDataModule
from lightning_diffclf.data.clip_benchmark import NAMES, TEMPLATES, ClipBenchmarkDataModule
from lightning_diffclf.data.digit_scenes import WORDS, DigitScenesDataModule
from lightning_diffclf.data.digits import DigitPairsDataModule, DigitsDataModule, DigitTriplesDataModule
from lightning_diffclf.data.image_folder import ImageFolderDataModule
from lightning_diffclf.data.imagenet import ImageNetDataModule
from lightning_diffclf.data.medmnist import MedMNISTDataModule
from lightning_diffclf.data.parquet import ParquetDataModule
from lightning_diffclf.data.winoground import WinogroundDataModule
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.files import read_checked_json, write_checked_json
from lightning_diffclf.identity import identity_of
from lightning_diffclf.models.pipeline import load
from tests.baselines.tiny_clip import write_clip
from tests.baselines.tiny_timm import write_timm
from tests.gaussians import Gaussians, Samples
from tests.models import published_twins as twins
from tests.photos import autoencoder, photos

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "assets" / "sd_digits")
TINY = {"input_size": 8, "in_channels": 4, "num_classes": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}


def evaluate(
    out: Path, module: L.LightningModule, data: Any, trainer: L.Trainer | None = None, **settings: Any
) -> dict:
    """Identity of a short evaluation that writes to ``out``."""
    callback = DiffusionClassifierCallback(**{"draws": 2, "error_maps": 0, "output_dir": str(out)} | settings)
    trainer = trainer or L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, limit_test_batches=1
    )
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, DiffusionClassifierCallback)]
    trainer.callbacks.append(callback)
    given = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"dataloaders": data}
    trainer.test(module, **given, verbose=False)
    found: dict = json.loads((out / "settings.json").read_text())["identity"]
    return found


# --- every argument ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Changes:
    """A thing, and another value for each of its arguments that may change results."""

    arguments: dict[str, Any]
    others: dict[str, Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What arguments name: folders of images, groups, prompts, an autoencoder, LoRA weights."""
    folder = tmp_path_factory.mktemp("files")
    photos(folder / "photos", classes=("0", "1", "2"), each=2)
    photos(folder / "more", classes=("0", "1", "2"), each=3)
    (folder / "subset.txt").write_text("0\n3\n")
    (folder / "first.txt").write_text("0\n")
    shutil.copytree(folder / "photos" / "0", folder / "groups")
    group = {"image_0": "0.png", "image_1": "1.png", "caption_0": "a", "caption_1": "b"}
    (folder / "groups" / "examples.jsonl").write_text(json.dumps(group))
    for name in ("wds", "other_wds"):
        for split in ("test", "train"):
            (folder / name / split).mkdir(parents=True)
            (folder / name / split / "0.tar").touch()
        (folder / name / NAMES).write_text("cat\ndog\n" if name == "wds" else "owl\ndog\n")
        (folder / name / TEMPLATES).write_text("a {c}\nthe {c}\n")
    write_parquet_and_friends(folder)
    unet = load(MODEL).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    pipeline = type(load(MODEL))
    pipeline.save_lora_weights(folder / "lora", unet_lora_layers=get_peft_model_state_dict(unet))
    return folder


def write_parquet_and_friends(folder: Path) -> None:
    """A data set in Parquet with two splits, a file of MedMNIST's form, and two files of captions."""
    content = (folder / "photos" / "0" / "0.png").read_bytes()
    for name, count in (
        ("a/test-0.parquet", 2),
        ("a/train-0.parquet", 3),
        ("b/test-0.parquet", 4),
        ("other.parquet", 1),
    ):
        rows = {
            "image": [content] * count,
            "label": list(range(count)),
            "picture": [content] * count,
            "kind": [0] * count,
        }
        (folder / "parquet" / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), folder / "parquet" / name)
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([[0], [1], [1], [0]])
    np.savez(folder / "pneumoniamnist.npz", test_images=images, test_labels=labels)
    for name, wrong in (("captions", "b"), ("other_captions", "c")):
        row = {"filename": "0.png", "caption": "a", "negative_caption": wrong}
        (folder / f"{name}.json").write_text(json.dumps([row]))


def table(files: Path) -> dict[type, Changes]:
    zero_shot = {
        "name": "imagenet",
        "root": str(files / "more"),
        "size": 8,
        "class_names": ["a", "b", "c"],
        "subset": str(files / "subset.txt"),
        "per_class": 1,
        "seed": 1,
        "border": 1,
        "crop": "published",
    }
    dit = {
        "model": "DiT-S/8",
        "input_size": 16,
        "in_channels": 2,
        "hidden_size": 32,
        "depth": 2,
        "num_heads": 4,
        "patch_size": 4,
        "mlp_ratio": 2.0,
        "none_of_these": True,
        "learn_sigma": True,
        "schedule": "cosine",
        "prediction": "v_prediction",
        "latents": False,
    }
    own_images = {
        "root": str(files / "photos"),
        "size": 16,
        "channels": 1,
        "classes": ["2", "1", "0"],
        "val_share": 0.3,
        "test_share": 0.5,
    }
    zero_shot_sd = {
        "pretrained": "assets/sd_digits",
        "prompts": "a {}",
        "class_names": WORDS[::-1],
        "revision": "main",
        "dtype": "bfloat16",
        "lora": str(files / "lora"),
        "attention": "native",
        "drop_t5": True,
    }
    clip = {
        "pretrained": write_clip(files / "other_clip", seed=1),
        "prompts": "a {}",
        "class_names": ["a", "c"],
        "revision": "v1",
        "dtype": "bfloat16",
    }
    vit = {"input_size": 8, "in_channels": 1, "num_classes": 2}
    vit |= {"hidden_size": 16, "depth": 1, "num_heads": 1, "patch_size": 2}
    features = {
        "pretrained": "assets/sd_digits",
        "layer": "conv_in",
        "timestep": 50,
        "head": "linear",
        "num_classes": 3,
        "class_names": ["a", "b"],
        "revision": "main",
        "dtype": "bfloat16",
    }
    recipe = {
        "draws": 3,
        "seed": 1,
        "grid": 500,
        "antithetic": True,
        "loss": "l1",
        "elimination": PairedTest(),
        "weights": "sample",
        "budget": 50,
        "abstain": 0.5,
        "ensemble": "mean",
        "candidates": [0, 1],
        "proposal": lambda images: [[0]] * len(images),
    }
    return {
        DigitsDataModule: Changes({}, {"left_out": [1]}),
        DigitPairsDataModule: Changes({"train_pairs": 10, "test_pairs": 10}, {"test_pairs": 9}),
        DigitTriplesDataModule: Changes({"train_triples": 10, "test_triples": 10}, {"test_triples": 9}),
        DigitScenesDataModule: Changes({}, {}),
        ClipBenchmarkDataModule: Changes(
            {"root": str(files / "wds"), "size": 16},
            {"root": str(files / "other_wds"), "split": "train", "templates": None, "size": 8, "crop": "published"},
        ),
        ParquetDataModule: Changes(
            {"source": str(files / "parquet"), "config": "a", "class_names": ["a", "b", "c", "d"], "size": 8},
            {
                "source": str(files / "parquet" / "other.parquet"),
                "split": "train",
                "image": "picture",
                "label": "kind",
                "config": "b",
                "revision": "main",
                "class_names": ["d", "c", "b", "a"],
                "size": 16,
                "subset": str(files / "first.txt"),
                "per_class": 1,
                "seed": 1,
                "crop": "published",
            },
        ),
        MedMNISTDataModule: Changes(
            {"path": str(files / "pneumoniamnist.npz"), "size": 8},
            {"class_names": ["a", "b"], "size": 16, "per_class": 1, "seed": 1},
        ),
        CaptionPairsDataModule: Changes(
            {"source": str(files / "captions.json"), "images": str(files / "photos" / "0")},
            {"source": str(files / "other_captions.json"), "images": str(files / "more" / "0"), "size": 8},
        ),
        ZeroShotDataModule: Changes({"root": str(files / "photos"), "size": 16}, zero_shot),
        ImageNetDataModule: Changes({"val": str(files / "photos")}, {"val": str(files / "more"), "size": 8}),
        ImageFolderDataModule: Changes({"root": str(files / "more"), "size": 8, "val_share": 0}, own_images),
        WinogroundDataModule: Changes({}, {"source": str(files / "groups"), "size": 8}),
        ClassConditionalDiT: Changes(TINY | {"learn_sigma": False}, dit),
        PublishedNetwork: Changes(
            {"weights": published_weights(files), "family": "sit", "num_heads": 4},
            {"class_names": ["a", "b", "c"], "none_of_these": True},
        ),
        ZeroShotStableDiffusion: Changes(
            {"pretrained": MODEL, "class_names": WORDS}, zero_shot_sd | {"none_of_these": True}
        ),
        LoraStableDiffusion: Changes(
            {"pretrained": MODEL, "class_names": WORDS}, zero_shot_sd | {"rank": 2, "targets": ["to_k"]}
        ),
        SoftPrompts: Changes(
            {"pretrained": MODEL, "class_names": WORDS}, zero_shot_sd | {"tokens": 2, "num_classes": 10}
        ),
        ZeroShotCLIP: Changes({"pretrained": write_clip(files / "clip"), "class_names": ["a", "b"]}, clip),
        TimmClassifier: Changes(
            {"model": write_timm(files / "timm", num_classes=2)},
            {"model": write_timm(files / "other_timm", num_classes=2, seed=1), "class_names": ["a", "b"]},
        ),
        TimmFromScratch: Changes(
            vit | {"model": "test_vit"},
            {name: 2 * value for name, value in vit.items()} | {"model": "test_vit2", "class_names": ["a", "b"]},
        ),
        DenoiserFeatures: Changes({"pretrained": MODEL, "num_classes": 2}, features),
        Recipe: Changes({}, recipe),
    }


def published_weights(folder: Path) -> str:
    """A tiny network on pixels, as others publish it."""
    save_file(twins.transformer(classes=3, channels=3), folder / "published.safetensors")
    return str(folder / "published.safetensors")


def parts_of_runs() -> list[type]:
    """All data modules and modules of ours, and the recipe."""
    found: dict[str, type] = {"Recipe": Recipe}
    for package in (lightning_diffclf.data, lightning_diffclf.modules, lightning_diffclf.baselines):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            for name, one in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
                ours = one.__module__ == info.name and not name.startswith("_")
                whole = one is not TrainedClassifier  # which has no network
                if ours and whole and issubclass(one, (L.LightningDataModule, L.LightningModule)):
                    found[name] = one
    return list(found.values())


@pytest.mark.parametrize("part", parts_of_runs())
def test_every_argument_is_part_of_the_identity_or_cannot_change_results(part, files):
    changes = table(files)[part]
    cannot = getattr(part, "CANNOT_CHANGE_RESULTS", None) or getattr(part, "CANNOT_CHANGE_DECISIONS", {})
    assert all(isinstance(reason, str) and reason for reason in cannot.values())
    names = set(inspect.signature(part).parameters)
    assert set(changes.others) == names - set(cannot), "expected another value for each argument that matters"

    def identity(**arguments: Any) -> str:
        torch.manual_seed(0)
        return json.dumps(part(**changes.arguments | arguments).identity(), sort_keys=True)

    plain = identity()
    assert "0x" not in plain
    assert identity() == plain
    for name, value in changes.others.items():
        assert identity(**{name: value}) != plain, name
    for name, value in {"batch_size": 32, "eval_batch_size": 7, "num_workers": 1, "offload": True, "lr": 0.1}.items():
        if name in names:
            assert identity(**{name: value}) == plain, name


# --- what arguments do not say -------------------------------------------------------------------------------------


def test_other_prompts_are_another_run(tmp_path):
    """With the same class names, everything but the prompts is the same."""
    out, data = tmp_path / "out", DigitScenesDataModule(eval_batch_size=2)
    first = evaluate(out, ZeroShotStableDiffusion(MODEL, "a photo of a {}"), data)
    with pytest.raises(
        ValueError, match=r"made with other ones \(module\.prompts: 'a photo of a \{\}' there, 'a \{\} z"
    ):
        evaluate(out, ZeroShotStableDiffusion(MODEL, "a {} zzz"), data)
    assert evaluate(out, ZeroShotStableDiffusion(MODEL, "a photo of a {}"), data) == first


def test_files_with_other_contents_are_other_prompts_and_subsets(tmp_path, files):
    prompts, subset = tmp_path / "prompts.csv", tmp_path / "subset.txt"

    def identities(prompt, position):
        prompts.write_text(f"prompt,classname,classidx\n{prompt},cat,0\na dog,dog,1\n")
        subset.write_text(f"{position}\n1\n")
        data = ZeroShotDataModule(root=str(files / "photos"), subset=str(subset))
        return identity_of(ZeroShotStableDiffusion(MODEL, str(prompts))), identity_of(data)

    first, other = identities("a cat", 0), identities("a cot", 2)
    assert identities("a cat", 0) == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_files_that_come_go_or_change_class(tmp_path):
    root = tmp_path / "photos"
    photos(root, each=2)

    def identities():
        named = {"root": str(root)}
        modules = ZeroShotDataModule(**named), ImageNetDataModule(val=str(root), size=8)
        return json.dumps([one.identity() for one in modules])

    found = [identities()]
    for change in (
        lambda: (root / "cat" / "0.png").rename(root / "cat" / "2.png"),
        lambda: (root / "cat" / "2.png").rename(root / "dog" / "2.png"),
        lambda: (root / "dog" / "2.png").unlink(),
    ):
        change()
        found.append(identities())
    assert len(set(found)) == 4


def test_one_weight_anywhere_is_another_network():
    module = ClassConditionalDiT(**TINY)
    identities = [json.dumps(module.identity())]
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1
        identities.append(json.dumps(module.identity()))
    assert len(set(identities)) == len(identities)


def test_a_second_evaluation_in_one_process_is_the_same_run(tmp_path):
    """Networks have moved, prompts are embedded, text encoders are gone, metrics were added: the run is the same."""
    scenes = DigitScenesDataModule(eval_batch_size=2)
    for name, module, data in (
        ("sd", ZeroShotStableDiffusion(MODEL, "digits"), scenes),
        ("dit", ClassConditionalDiT(**TINY | {"in_channels": 1, "num_classes": 10}, latents=False), DigitsDataModule()),
        ("user", Gaussians(), DataLoader(Samples(4), 2)),
    ):
        first = evaluate(tmp_path / name, module, data)
        assert evaluate(tmp_path / name, module, data) == first
        assert evaluate(tmp_path / f"{name} again", module, data, name="other") == first


def test_text_encoders_and_tokenizers_are_part_of_it(tmp_path):
    def identity():
        found: dict = ZeroShotStableDiffusion(str(tmp_path / "sd"), "digits", WORDS).identity()["denoiser"]
        return found

    shutil.copytree(MODEL, tmp_path / "sd")
    first = identity()
    pipeline = load(str(tmp_path / "sd"))
    with torch.no_grad():
        next(pipeline.text_encoder.parameters()).view(-1)[0] += 1
        next(pipeline.vae.parameters()).view(-1)[0] += 1
    pipeline.text_encoder.save_pretrained(tmp_path / "sd" / "text_encoder")
    second = identity()
    assert {name for name in first if first[name] != second[name]} == {"texts"}
    pipeline.vae.save_pretrained(tmp_path / "sd" / "vae")
    third = identity()
    assert {name for name in first if second[name] != third[name]} == {"autoencoder"}
    path = tmp_path / "sd" / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[words[0]], vocabulary[words[1]] = vocabulary[words[1]], vocabulary[words[0]]
    path.write_text(json.dumps(tokenizer))
    assert identity()["texts"] != third["texts"]


def test_the_autoencoder_counts_where_images_are_pixels(tmp_path):
    """Whether it happens to be loaded does not matter; where latents were made beforehand, theirs is in the index."""
    vae, latents = tmp_path / "vae", str(tmp_path / "latents")
    autoencoder(vae)
    photos(tmp_path / "photos", each=2, size=(70, 66))
    options = {"data": tmp_path / "photos", "out": latents, "size": 64, "vae": vae, "accelerator": "cpu"}
    run("encode", [f"--{name}={value}" for name, value in options.items()])

    def module(val: str | None = None) -> ClassConditionalDiT:
        torch.manual_seed(1)
        made = ClassConditionalDiT(**TINY, vae=str(vae), class_names=["a", "b", "c"])
        if val is not None:
            made.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
            made.trainer.datamodule = ImageNetDataModule(val=val, size=64)
        return made

    alone, of_pixels, of_latents = module(), module(str(tmp_path / "photos")), module(latents)
    before = [identity_of(one) for one in (alone, of_pixels, of_latents)]
    assert before[0] == before[1]
    assert not of_latents._autoencoder
    alone.encode(torch.zeros(1, 3, 64, 64))
    assert identity_of(alone) == before[0]
    other = autoencoder(vae)
    with torch.no_grad():
        next(other.parameters()).view(-1)[3] += 1
    other.save_pretrained(vae)
    after = [identity_of(one) for one in (module(), module(str(tmp_path / "photos")), module(latents))]
    assert after[0] == after[1] != before[0]
    assert after[2] == before[2]
    shutil.rmtree(vae)
    assert identity_of(module(latents)) == before[2]  # not asked for
    with pytest.raises(ValueError, match=r"vae: .* cannot be loaded|vae: no folder"):
        identity_of(module())
    index = tmp_path / "latents" / "index.json"
    data = ImageNetDataModule(val=latents, size=64).identity()
    values = read_checked_json(index)
    write_checked_json(values | {"fingerprint": f"f{values['fingerprint']}"}, index)
    assert ImageNetDataModule(val=latents, size=64).identity() != data


def test_what_a_proposal_has_learnt_is_part_of_the_recipe(tmp_path):
    module, samples = Gaussians(), Samples(20)
    module.layer = nn.Identity()
    whole = module.predict
    module.predict = lambda x_t, t, candidate: module.layer(whole(x_t, t, candidate))

    def identity(count: int) -> dict:
        probe = LinearProbe("layer", 100, top=2).fit(module, [(samples.images[:count], samples.labels[:count])])
        found: dict = Recipe(proposal=probe).identity()
        return found

    assert identity(20) == identity(20) != identity(19)
    for layers in (nn.Linear(3, 3), lambda images: images):
        assert Recipe(proposal=layers).identity() != identity(20)


def test_defaults_are_what_they_stand_for(tmp_path):
    data = DataLoader(Samples(4), 2)
    assert evaluate(tmp_path / "a", Gaussians(), data, draws=None)["recipe"]["draws"] == 250
    fixed = Recipe(Draws(2, timesteps=torch.tensor([3, 4])))
    assert fixed.identity() != Recipe(Draws(2, timesteps=torch.tensor([3, 5]))).identity()


# --- of users' own classes -----------------------------------------------------------------------------------------


def make_user_module(width: int = 3, gain: float = 1.0, names: tuple[str, ...] = ("a", "b"), steps: int = 1000) -> Any:
    class Mine(Gaussians):
        def __init__(self, width: int, note: str = "none") -> None:
            super().__init__()
            self.save_hyperparameters()
            torch.manual_seed(0)
            self.net = nn.Linear(width, 3)
            self.accuracy = MulticlassAccuracy(2)

    module = Mine(width)
    module.net.weight.data.mul_(gain)
    module.schedule, module.candidates = NoiseSchedule.linear(steps), Candidates(names)
    return module


def test_modules_without_identity_have_one_of_their_parts():
    same = module_identity(make_user_module())
    assert same == module_identity(make_user_module())
    for change in ({"width": 4}, {"gain": 2.0}, {"names": ("a", "c")}, {"steps": 999}):
        assert module_identity(make_user_module(**change)) != same, change
    counted = make_user_module()
    counted.more_metrics = nn.ModuleDict({"a": MulticlassAccuracy(3)})
    assert module_identity(counted) == same
    other = make_user_module()
    other.net = nn.Sequential(other.net, nn.ReLU())
    assert module_identity(other) != same
    type(other).CANNOT_CHANGE_RESULTS = {"note": "a word about it"}
    assert "note" not in module_identity(other)["arguments"]
    type(other).identity = lambda self: {"version": 3}
    assert module_identity(other) == {"class": identity_of(type(other)), "version": 3}


def test_a_part_that_is_called_identity_is_no_method():
    module = Gaussians()
    plain = module_identity(module)
    module.identity = nn.Identity()
    assert module_identity(module)["parts"].keys() - plain["parts"].keys() == {"identity"}


class Kept(L.LightningDataModule):
    def __init__(self, size: int = 8, batch_size: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()


class Plain(L.LightningDataModule):
    def __init__(self, size: int = 8, batch_size: int = 4) -> None:
        super().__init__()
        self.size, self.batch_size, self.cache = size, batch_size, None


class Photos(Dataset[Any]):
    def __init__(self, root: str, prepare: Callable[[Any], Any] | None = None, length: int = 4) -> None:
        self.root, self.prepare, self.length, self.cache = root, prepare, length, None

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize("kind", [Kept, Plain])
def test_data_modules_without_identity_have_one_of_their_arguments_and_data(kind):
    loader = DataLoader(Photos("a"))
    same = data_identity(kind(), loader)
    assert data_identity(kind(batch_size=2), loader) == same
    assert data_identity(kind(size=16), loader) != same
    assert data_identity(kind(), DataLoader(Photos("b"))) != same
    assert data_identity(None, loader) != same
    assert json.loads(json.dumps(same)) == same


def test_data_sets_are_what_can_be_compared(tmp_path):
    photos(tmp_path / "photos", each=2)
    images, labels = torch.rand(20, 3, 2, 2), torch.arange(20)

    def compose(size):
        return transforms.Compose([transforms.Resize(size), transforms.ToTensor()])

    def identity(dataset):
        return json.dumps(data_identity(None, DataLoader(dataset)), sort_keys=True)

    for same, again, others in (
        (Photos("a"), Photos("a"), [Photos("b"), Photos("a", length=5), Photos("a", compose(4))]),
        (Photos("a", compose(4)), Photos("a", compose(4)), [Photos("a", compose(5))]),
        (Photos("a", lambda x: x + 1), Photos("a", lambda x: x + 1), [Photos("a", lambda x: x + 2)]),
        (TensorDataset(images, labels), TensorDataset(images.clone(), labels), [TensorDataset(images + 1, labels)]),
        (Subset(Photos("a"), [1, 2]), Subset(Photos("a"), [1, 2]), [Subset(Photos("b"), [1, 2]), Photos("a")]),
        (Subset(Photos("a"), [1, 2]), Subset(Photos("a"), [1, 2]), [Subset(Photos("a"), [1, 3])]),
        (
            ImageFolder(str(tmp_path / "photos"), compose(4)),
            ImageFolder(str(tmp_path / "photos"), compose(4)),
            [ImageFolder(str(tmp_path / "photos"), compose(5)), ImageFolder(str(tmp_path / "photos"))],
        ),
    ):
        assert identity(same) == identity(again)
        assert identity(same) not in [identity(one) for one in others]


def test_caches_and_files_of_data_sets_are_left_out(tmp_path):
    dataset = Photos("a")
    before = data_identity(None, DataLoader(dataset))
    dataset.cache = np.lib.format.open_memmap(tmp_path / "a.npy", mode="w+", dtype="f4", shape=(2,))
    dataset.file = open(tmp_path / "a.npy", "rb")  # noqa: SIM115
    assert data_identity(None, DataLoader(dataset)) == before
    dataset.file.close()


def test_batches_from_nowhere_are_refused():
    batches = [torch.zeros(2, 3)]
    assert data_identity(None, batches) != data_identity(None, [torch.ones(2, 3)])
    with pytest.raises(ValueError, match="data: a generator cannot be told from another, expected a DataLoader"):
        data_identity(None, (batch for batch in batches))


def test_the_data_module_of_an_evaluation_before_does_not_count(tmp_path):
    """Lightning keeps it as ``trainer.datamodule`` when it is given loaders next."""
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, limit_test_batches=1
    )

    class Data(L.LightningDataModule):
        def test_dataloader(self) -> Any:
            return DataLoader(Samples(4), 2)

    evaluate(tmp_path / "a", Gaussians(), Data(), trainer)
    first = evaluate(tmp_path / "b", Gaussians(), DataLoader(Samples(4), 2), trainer)
    assert first == evaluate(tmp_path / "c", Gaussians(), DataLoader(Samples(4), 2))
    with pytest.raises(ValueError, match=r"data\.images: 4 there, 5 here"):
        evaluate(tmp_path / "b", Gaussians(), DataLoader(Samples(5), 2), trainer)
