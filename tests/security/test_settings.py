"""Settings inside a checkpoint run nothing, open nothing and write nowhere but where results were asked for."""

import importlib
import inspect
import pkgutil
import typing
from dataclasses import fields
from datetime import date
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml

import lightning_diffclf
from lightning_diffclf.baselines.trained import TrainedClassifier
from lightning_diffclf.classifier.cascade import Cascade
from lightning_diffclf.classifier.elimination import Elimination
from lightning_diffclf.classifier.recipe import Recipe
from lightning_diffclf.classifier.search import FittedSearch, Search
from lightning_diffclf.classifier.sequential import SequentialTest
from lightning_diffclf.cli import CONFIG_KEY, evaluate, evaluation_config
from lightning_diffclf.errors import UserError
from lightning_diffclf.inert import CLASSES, TAKEN

MODEL = "lightning_diffclf.modules.class_conditional_dit.ClassConditionalDiT"
DIGITS = "lightning_diffclf.data.digits.DigitsDataModule"
IMAGENET = "lightning_diffclf.data.imagenet.ImageNetDataModule"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(**changed) -> dict:
    """Settings of a small run, with some sections changed."""
    usual = {
        "seed_everything": 0,
        "run_dir": "/root/.ssh",
        "model": {"class_path": MODEL, "init_args": {"input_size": 8, "in_channels": 1, "latents": False}},
        "data": {"class_path": DIGITS, "init_args": {"eval_batch_size": 8}},
        "classifier": {"draws": 3, "elimination": None, "proposal": None, "output_dir": "/root/.ssh"},
        "ema": {"decay": 0.9},
        "checkpoint": {"dirpath": "/root/.ssh", "monitor": None, "every_n_train_steps": 2},
        "trainer": {"precision": "32-true", "callbacks": [{"class_path": "os.system"}], "default_root_dir": "/root"},
    }
    return usual | changed


def imagenet(**arguments) -> dict:
    return {"class_path": IMAGENET, "init_args": arguments}


def write(found, path="evil.ckpt") -> str:
    text = found if isinstance(found, (str, torch.Tensor)) else yaml.safe_dump(found)
    torch.save({"state_dict": {}, CONFIG_KEY: text}, path)
    return path


def evil_module() -> str:
    """A module that leaves a mark when it is imported."""
    Path("evil_module.py").write_text("open('PWNED', 'w')\nclass Model: pass\ndef function(x): return x\n")
    return "evil_module"


HARM = {
    "a shell command for shards": settings(data=imagenet(val="pipe:id > PWNED")),
    "one in a list": settings(data=imagenet(val=["ok", {"x": "pipe:id > PWNED"}])),
    "one behind braces": settings(data=imagenet(val="{pipe,x}:id > PWNED")),
    "one behind a variable": settings(data=imagenet(val="${X}pe:id > PWNED")),
    "one after another shard": settings(data=imagenet(val="a.tar::pipe:id > PWNED")),
    "an address": settings(data=imagenet(val="http://example.org/{0..9}.tar")),
    "an address in the model": settings(model={"class_path": MODEL, "init_args": {"vae": "https://example.org/x"}}),
    "another class for the model": settings(model={"class_path": "evil_module.Model", "init_args": {}}),
    "a class as text": settings(model="evil_module.Model"),
    "a function for the data": settings(data={"class_path": "os.system", "init_args": {"command": "touch PWNED"}}),
    "a callback of Lightning for the data": settings(data={"class_path": "lightning.Trainer"}),
    "a file for the data": settings(data="other.yaml"),
    "arguments in a file": settings(data={"class_path": DIGITS, "init_args": "other.yaml"}),
    "arguments by another name": settings(data={"class_path": DIGITS, "dict_kwargs": {"a": 1}}),
    "a class among arguments": settings(data=imagenet(train={"class_path": "evil_module.Model"})),
    "a class under a dotted name": settings(data=imagenet(**{"train.class_path": "evil_module.Model"})),
    "another elimination": settings(classifier={"elimination": {"class_path": "evil_module.Model"}}),
    "elimination as text": settings(classifier={"elimination": "evil_module.Model"}),
    "a proposal": settings(classifier={"proposal": "evil_module.function"}),
    "a proposal of ours": settings(classifier={"proposal": "lightning_diffclf.cli.train"}),
    "a proposal as class": settings(classifier={"proposal": {"class_path": "evil_module.Model"}}),
    "a proposal with a network": settings(
        classifier={"proposal": {"class_path": "lightning_diffclf.classifier.cascade.Cascade"}}
    ),
    "a class in the average": settings(ema={"decay": {"class_path": "evil_module.Model"}}),
    "a file for the average": settings(ema="other.yaml"),
    "a class in the trainer": settings(trainer={"precision": {"class_path": "evil_module.Model"}}),
    "a file for the trainer": settings(trainer="other.yaml"),
    "a key that is no name": settings(data=imagenet(**{"a b": 1})),
    "NUL": settings(data=imagenet(val="data\0")),
    "a tag of YAML": "data: !!python/object/apply:os.system ['touch PWNED']",
    "a class of YAML": "data: !!python/name:evil_module.Model",
    "a module of YAML": "data: !!python/module:evil_module",
    "broken YAML": "data: [",
    "no sections": "- data",
    "an impossible date": "data: 2024-13-45",
    "a date": settings(data=imagenet(val=None)) | {"seed_everything": [date(2024, 1, 1)]},
    "no text": torch.zeros(3),
    "deep YAML": "data: {class_path: " + DIGITS + ", init_args: {eval_batch_size: " + "[" * 30 + "]" * 30 + "}}",
    "a billion laughs": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    + "data: {class_path: " + DIGITS + ", init_args: {eval_batch_size: *i}}",
    "a circle": "data: &a {init_args: *a, class_path: " + DIGITS + "}",
}  # fmt: skip


@pytest.mark.parametrize("name", HARM)
def test_settings_of_others_run_nothing(name, capsys, monkeypatch):
    module = evil_module()
    monkeypatch.syspath_prepend(".")
    path = write(HARM[name])
    for flags in ([], ["--plan"]):
        with pytest.raises(SystemExit) as exit_info:
            evaluate([f"--ckpt={path}", "--trainer.logger=false", *flags])
        told = str(exit_info.value.code)
        assert told.startswith("error: checkpoint: 'evil.ckpt'"), told
        assert len(told) < 1000
        assert "settings" in told
        assert "--config" in told
        assert "--trust-checkpoint" in told
    assert sorted(path.name for path in Path().iterdir()) == ["evil.ckpt", f"{module}.py"]


def test_the_flag_trusts_and_says_so(monkeypatch):
    trained = settings(data={"class_path": "evil_module.Model", "init_args": {}})
    with pytest.raises(UserError, match=r"data\.class_path: 'evil_module\.Model', expected a class of this package"):
        evaluation_config(write(trained))
    assert "evil_module.Model" in evaluation_config(write(trained), trusted=True)


def test_settings_of_ours_are_taken_without_what_they_could_write():
    kept = yaml.safe_load(evaluation_config(write(settings())))
    assert {name: kept[name] for name in ("model", "data", "ema")} == {
        name: settings()[name] for name in ("model", "data", "ema")
    }
    assert kept["trainer"] == {"precision": "32-true"}
    assert kept["classifier"] == {"draws": 3, "elimination": None, "proposal": None}
    assert kept["checkpoint"] == {"monitor": None, "every_n_train_steps": 2}
    assert "/root" not in str(kept)
    zero_shot = {"class_path": "lightning_diffclf.data.zero_shot.ZeroShotDataModule"}
    arguments = {"name": "cifar10", "root": "/home/somebody", "download": True}
    kept = yaml.safe_load(evaluation_config(write(settings(data=zero_shot | {"init_args": arguments}))))
    assert kept["data"]["init_args"] == {"name": "cifar10", "root": "/home/somebody"}


@pytest.mark.parametrize("text", ["the digit: {}.", "ratio 1:2", "data/{000..999}.tar", "stabilityai/sd-vae-ft-ema"])
def test_usual_texts_are_inert(text):
    path = write(settings(data=imagenet(val=text)))
    assert yaml.safe_load(evaluation_config(path))["data"]["init_args"]["val"] == text


def ours(base: type) -> set[type]:
    """Classes of the package that a section could name."""
    for module in pkgutil.walk_packages(lightning_diffclf.__path__, "lightning_diffclf."):
        importlib.import_module(module.name)
    found, left = set(), [base]
    while left:
        one = left.pop()
        left += one.__subclasses__()
        found |= {one} if one.__module__.startswith("lightning_diffclf.") else set()
    return found


def test_every_class_of_ours_may_be_named_and_opens_nothing_by_itself():
    bases = {
        "model": L.LightningModule,
        "data": L.LightningDataModule,
        "classifier.elimination": Elimination,
        "classifier.proposal": Search,
    }
    in_python_only = {Cascade}  # holds a network
    for section, base in bases.items():
        some = ours(base) - {Elimination, SequentialTest, Search, FittedSearch, TrainedClassifier} - in_python_only
        classes = {one for one in some if one.__name__[0] != "_"}
        assert {f"{one.__module__}.{one.__qualname__}" for one in classes} <= CLASSES[section]
        for name in CLASSES[section]:
            module, _, attribute = name.rpartition(".")
            assert getattr(importlib.import_module(module), attribute) in classes
        for one in classes:  # no argument is a class or a function, which would be imported by its name
            hints = typing.get_type_hints(one.__init__)
            for argument in set(inspect.signature(one.__init__).parameters) - {"self"}:
                assert plain(hints[argument]), f"{one.__name__}.{argument}: {hints[argument]}"


def test_evaluation_takes_all_that_decides_results_of_a_run():
    assert {field.name for field in fields(Recipe)} <= TAKEN["classifier"]


def plain(hint) -> bool:
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return True
    if typing.get_args(hint):
        return origin.__name__ in ("list", "tuple", "Sequence", "UnionType", "Union") and all(
            map(plain, typing.get_args(hint))
        )
    return hint in (str, int, float, bool, type(None), Ellipsis)
