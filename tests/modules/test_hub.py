"""A trained DiT as a folder of plain files."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, Draws
from lightning_diffclf.files import write_json

SMALL = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "latents": False}
NAMES = ["cat", "dog", "cow"]


def module(**settings) -> ClassConditionalDiT:
    torch.manual_seed(0)
    found = ClassConditionalDiT(**SMALL | {"num_classes": 3, "class_names": NAMES} | settings)
    for weight in found.parameters():  # the last layer begins at zero
        torch.nn.init.normal_(weight, std=0.1)
    return found


@pytest.fixture
def run(tmp_path):
    """What an evaluation leaves, as far as a card says it."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    recipe = {
        "draws": 50,
        "loss": "l2",
        "elimination": {"class": "lightning_diffclf.classifier.sequential.LikelihoodRatio"},
    }
    settings = {"recipe": recipe, "data": {"class": "lightning_diffclf.data.digits.DigitsDataModule"}}
    metrics = {"accuracy": 0.98765, "images": 360, "nfe_per_image": 27.4, "seconds": 5.0}
    write_json({"metrics": metrics, "settings": settings}, folder / "metrics.json", 2, "results")
    return folder


def test_a_folder_says_it_all(tmp_path):
    given = module(betas=[0.9, 0.95], schedule="rectified_flow", learn_sigma=False)
    given.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    found = ClassConditionalDiT.from_pretrained(str(tmp_path / "model"))
    assert json.loads(json.dumps(dict(found.hparams))) == json.loads(json.dumps(dict(given.hparams)))
    assert not found.training
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    for a, b in zip(*(DiffusionClassifier(one, Draws(4))(images) for one in (given, found)), strict=True):
        assert torch.equal(a.scores_K, b.scores_K)
        assert b.names == NAMES


def test_the_card_has_the_numbers_of_the_run(tmp_path, run):
    module().save_pretrained(tmp_path / "model", model_card_kwargs={"evaluation": run, "license": "apache-2.0"})
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert (card.data.library_name, card.data.license) == ("lightning_diffclf", "apache-2.0")
    assert "| accuracy | 0.9877 |" in card.text
    assert "| network calls per image | 27.4 |" in card.text
    assert "- Input: pixels in [-1, 1], 1 × 8 × 8" in card.text
    assert "data `DigitsDataModule`, draws `50`, loss `l2`, elimination `LikelihoodRatio`" in card.text
    assert "Classes: cat, dog, cow" in card.text
    with pytest.raises(FileNotFoundError, match="evaluation: no file"):
        module().generate_model_card(evaluation=tmp_path)
    (run / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match="is none that an evaluation wrote"):
        module().generate_model_card(evaluation=run)


def test_what_is_pushed_is_the_folder(tmp_path, run, monkeypatch):
    pushed = {}

    def upload_folder(self, *, repo_id, folder_path, **others):
        pushed[repo_id] = {p.name: p.read_bytes() for p in folder_path.iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **others: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    module().push_to_hub("me/digits", model_card_kwargs={"evaluation": run})
    module().save_pretrained(tmp_path / "model", model_card_kwargs={"evaluation": run})
    assert pushed["me/digits"] == {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": "[1]"}, "is no mapping of names to values"),
        ({"config.json": '{"schedule": {"a": 1}}'}, "expected plain values"),
        ({"config.json": '{"hidden_size": 100000}'}, "but weights of 16"),
        ({"config.json": '{"schedule": "x"}'}, "schedule"),
        ({"config.json": None}, "has no config.json"),
        ({"model.safetensors": None}, "has no model.safetensors"),
        ({"model.safetensors": "x"}, "cannot be read"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(change, message, tmp_path):
    module().save_pretrained(tmp_path)
    for name, text in change.items():
        if text is None:
            (tmp_path / name).unlink()
            continue
        if text.startswith('{"'):
            text = json.dumps(json.loads((tmp_path / name).read_text()) | json.loads(text))
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError if None not in change.values() else FileNotFoundError, match=message):
        ClassConditionalDiT.from_pretrained(tmp_path)


def test_a_weight_too_few_is_missed(tmp_path):
    module().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["net.x_embedder.proj.bias"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing there, such as net.x_embedder.proj.bias"):
        ClassConditionalDiT.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"model: no folder '/no/where', and the Hub did not give it"):
        ClassConditionalDiT.from_pretrained("/no/where")
