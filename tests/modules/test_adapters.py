"""LoRA weights and soft prompts of the tiny model that comes with the package: real weights, real digits."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

from lightning_diffclf import DiffusionClassifier, LoraStableDiffusion, SoftPrompts, ZeroShotStableDiffusion
from lightning_diffclf.cli import evaluate, train
from lightning_diffclf.data.digit_scenes import WORDS, DigitScenesDataModule
from lightning_diffclf.inert import check_inert
from lightning_diffclf.modules.checkpoints import read_checkpoint
from lightning_diffclf.modules.objectives import classification_loss, errors_at_one_draw

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "assets" / "sd_digits")
BACKWARDS = WORDS[::-1]  # of which the pretrained model believes the opposite: there is something to learn
KINDS = {
    "lora": (LoraStableDiffusion, {"rank": 4, "lr": 1e-2}),
    "shared": (SoftPrompts, {"lr": 3e-2}),
    "each": (SoftPrompts, {"lr": 3e-2, "num_classes": 10, "tokens": 8}),
}


def made(kind: str, **settings: Any) -> Any:
    cls, own = KINDS[kind]
    torch.manual_seed(0)
    return cls(MODEL, **{"prompts": "digits", "class_names": BACKWARDS, "dtype": "float32"} | own | settings)


def trainer(steps: int = 1, **settings: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(
        max_steps=steps, accelerator="cpu", limit_val_batches=1, **quiet | {"enable_checkpointing": False} | settings
    )


def validated(module: Any) -> float:
    return trainer().validate(module, DigitScenesDataModule(eval_batch_size=120), verbose=False)[0]["val/loss"]


def frozen(module: Any) -> dict[str, Tensor]:
    """All pretrained weights."""
    parts = {name: part for name, part in module.load_pipeline().components.items() if hasattr(part, "state_dict")}
    return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()}


def rows(module: Any, count: int = 6) -> Tensor:
    """Network output for some noisy images under some candidates."""
    generator = torch.Generator().manual_seed(0)
    x0 = module.encode(torch.rand(count, 3, 8, 16, generator=generator) * 2 - 1)
    t = torch.arange(count) * 150
    with torch.no_grad():
        return module.predict(torch.randn(x0.shape, generator=generator), t, torch.arange(count))


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_it_is_the_pretrained_model(kind):
    pretrained = ZeroShotStableDiffusion(MODEL, "digits", BACKWARDS, dtype="float32")
    torch.testing.assert_close(rows(made(kind)), rows(pretrained), rtol=0, atol=1e-6)


@pytest.fixture(scope="module", params=KINDS)
def trained(request, tmp_path_factory) -> tuple[str, Any, dict[str, Tensor], float, Path]:
    """A module after a short training; its pretrained weights and its loss before; its checkpoint."""
    module = made(request.param)
    before, loss = (
        {name: value.clone() for name, value in frozen(module).items() if "lora" not in name},
        validated(module),
    )
    fitting = trainer(18)
    fitting.fit(module, DigitScenesDataModule(batch_size=48))
    path = tmp_path_factory.mktemp(request.param) / "last.ckpt"
    fitting.save_checkpoint(path)
    return request.param, module, before, loss, path


def test_the_loss_falls_and_nothing_else_changes(trained):
    kind, module, before, loss, _ = trained
    assert validated(module) < (0.97 if kind == "each" else 0.995) * loss
    after = frozen(module)
    kept = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora" not in name}
    assert all(
        torch.equal(kept[name.replace(".base_layer", "")], value)
        for name, value in before.items()
        if "text_encoder" not in name
    )


def test_the_checkpoint_has_what_was_trained_and_restores_it(trained):
    kind, module, _, _, path = trained
    checkpoint = read_checkpoint(path)
    names = {name.partition(".")[0] for name in checkpoint["state_dict"]}
    assert names == ({"adapter"} if kind == "lora" else {"vectors"})
    count = sum(value.numel() for value in checkpoint["state_dict"].values())
    assert count == {"lora": 19_712, "shared": 4 * 64, "each": 10 * 8 * 64}[kind]
    again = made(kind)
    assert not torch.allclose(rows(again), rows(module), atol=1e-3)
    again.load_state_dict(checkpoint["state_dict"])
    torch.testing.assert_close(rows(again), rows(module))


def test_it_classifies_as_it_predicts(trained):
    """What candidates share is computed once; the errors are the same without."""
    _, module, _, _, _ = trained
    data = DigitScenesDataModule()
    data.setup()
    images = data.test.parts["image"][:2]
    trainer().validate(module, data, verbose=False)  # no longer in training
    assert not any(one.requires_grad for one in module.parameters())
    result = DiffusionClassifier(module, draws=2, microbatch=20)(images, [0, 1])
    alone = DiffusionClassifier(module, draws=2, microbatch=1)(images, [0, 1])
    for one, other in zip(result, alone, strict=True):
        torch.testing.assert_close(torch.as_tensor(one.scores_K), torch.as_tensor(other.scores_K), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["shared", "each"])
def test_soft_prompts_share_what_candidates_have_in_common(kind):
    """Also after they have changed; with gradients, each row is computed by itself."""
    module = made(kind)
    x0 = module.encode(torch.zeros(2, 3, *module.native_size))
    x_t, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), torch.tensor([100, 700])
    pair, candidate = torch.arange(2).repeat_interleave(10), torch.arange(10).repeat(2)
    computed: list[int] = []  # rows that the first layer is given
    first = module._network.conv_in
    forward = first.forward
    first.forward = lambda x: (computed.append(len(x)), forward(x))[1]
    for std in (0.0, 0.5, 1.0):
        with torch.no_grad():
            module.vectors.normal_(std=std, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            expected = module.predict(x_t[pair], t[pair], candidate)
            found = module.predict_shared(x_t, t, pair, candidate)
        assert computed[-1] == 2  # pairs, not rows
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=5e-6)
    output = module.predict_shared(x_t, t, pair, candidate)
    torch.testing.assert_close(output, expected)
    (gradient,) = torch.autograd.grad(output.square().sum(), module.vectors)
    assert bool(gradient.abs().sum() > 0)


def test_lora_weights_are_those_of_diffusers(tmp_path):
    """Merged into the pretrained weights by diffusers, they make the same network."""
    module = made("lora")
    for p in module.adapter.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    module.save_lora(tmp_path)
    merged = ZeroShotStableDiffusion(MODEL, "digits", BACKWARDS, dtype="float32", lora=str(tmp_path))
    torch.testing.assert_close(rows(module), rows(merged), rtol=1e-4, atol=1e-4)
    pretrained = ZeroShotStableDiffusion(MODEL, "digits", BACKWARDS, dtype="float32")
    assert not torch.allclose(rows(merged), rows(pretrained), atol=1e-2)


def entropy(module: Any) -> float:
    """Cross-entropy on some test images, at the same draw for each."""
    data = DigitScenesDataModule()
    data.setup()
    with torch.no_grad():
        x0, labels = module.encode(data.test.parts["image"][:40]), data.test.parts["label"][:40]
        t, noise = torch.full((40,), 400), torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
        order = (labels[:, None] + torch.arange(10)) % 10
        errors = errors_at_one_draw(module.predict, module.schedule, x0, t, noise, order)
    return classification_loss(errors, x0[0].numel(), temperature=2.0).mean().item()


def test_the_classification_loss_trains_too():
    """Tokens of each class are moved to where they tell it, from prompts that say the opposite."""
    module = made("each", classification=1.0, compared_classes=10, lr=0.1)
    before = entropy(module)
    trainer(10).fit(module, DigitScenesDataModule(batch_size=16))
    assert entropy(module) < 0.8 * before


def test_half_precision_keeps_the_trained_weights_whole():
    module = made("lora", dtype="bfloat16")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    fitting = trainer(1)
    fitting.fit(module, DigitScenesDataModule(batch_size=8))
    assert math.isfinite(fitting.callback_metrics["train/loss"])
    assert any(p.abs().sum() > 0 for name, p in module.adapter.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: made("lora", rank=0), "rank: 0, expected at least 1"),
        (lambda: made("lora", targets=["nothing"]), r"targets: \['nothing'\], expected layers of UNet2DConditionModel"),
        (lambda: made("lora", lr=0.0), "lr: 0.0, expected a positive number"),
        (lambda: made("lora", classification=-1.0), "classification: -1.0"),
        (lambda: made("shared", num_classes=None), "num_classes: None, and the data do not say; expected a number"),
        (lambda: made("shared", tokens=0), "tokens: 0, expected at least 1"),
        (lambda: rows(made("shared", tokens=99)), r"tokens: 99, but prompts are \(16, 64\)"),
        (lambda: validated(made("each", num_classes=3)), "num_classes: 3, but there are 10 prompts"),
        (
            lambda: trainer().fit(made("lora", prompts=["a {}", "the {}"]), DigitScenesDataModule()),
            "prompts: several for a class, expected one for each",
        ),
        (
            lambda: trainer().fit(made("lora", class_names=WORDS[:3]), DigitScenesDataModule()),
            r"labels: 0 … 9, expected 0 … 2",
        ),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("name", "flags", "summary"),
    [
        ("sd_lora", [], "network: adapter (ParameterDict, 39.4 K); 39.4 K weights are trained"),
        ("sd_soft_prompts", [], "network: other params (256); 256 weights are trained"),
        (
            "sd_soft_prompts",
            ["--model.num_classes=null"],
            "network: other params (2.6 K); 2.6 K weights are trained",  # the data say how many there are
        ),
    ],
    ids=["lora", "shared", "each"],
)
def test_from_a_configuration_to_an_evaluation(tmp_path, monkeypatch, capsys, name, flags, summary):
    monkeypatch.chdir(tmp_path)
    small = ["--model.pretrained", MODEL, "--model.prompts", "digits", "--model.dtype", "float32"]
    small += ["--data", "lightning_diffclf.data.digit_scenes.DigitScenesDataModule", "--data.batch_size", "8"]
    small += ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    small += ["--classifier.fit_images=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    train([f"--config={name}.yaml", *small, *flags])
    shown = capsys.readouterr().out
    assert summary in shown
    assert "diffclf evaluate --ckpt" in shown
    assert "diffclf sample" not in shown  # which does not take such checkpoints
    path = f"runs/{name}/checkpoints/last.ckpt"
    settings = yaml.safe_load(read_checkpoint(path)["diffclf_config"])
    check_inert({"model": settings["model"]}, path)
    capsys.readouterr()
    evaluate(["--ckpt", path, "--trainer.limit_test_batches=1", "--classifier.draws=2", "--trainer.accelerator=cpu"])
    assert "accuracy" in capsys.readouterr().out
