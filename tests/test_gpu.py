"""What needs a GPU; imports what bench_gpu.py may, and no more."""

import lightning as L
import pytest
import torch

from lightning_diffclf import EMA, ClassConditionalDiT, DiffusionClassifier, Draws, Exhaustive, LikelihoodRatio
from tests.classifier.toys import DropOneEachDraw, Toy, some_images
from tests.gaussians import Gaussians, loader

GPU = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def small_dit(**settings) -> ClassConditionalDiT:
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10, "learn_sigma": False}
    module = ClassConditionalDiT(**sizes | settings)
    torch.manual_seed(0)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return module.eval()


@pytest.mark.parametrize("rule", [Exhaustive(), DropOneEachDraw("distances")], ids=["exhaustive", "ragged"])
def test_the_same_decisions(rule):
    images = some_images(9)
    settings = {"draws": Draws(16), "elimination": rule, "microbatch": 37}
    on_cpu = list(DiffusionClassifier(Toy(), **settings)(images))
    on_gpu = list(DiffusionClassifier(Toy().to(GPU), **settings)(images.to(GPU)))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert (a.prediction, a.nfe) == (b.prediction, b.nfe)
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", [Exhaustive(), LikelihoodRatio()], ids=["exhaustive", "ratio"])
def test_compiled_with_graphs_decides_as_eager(rule):
    """Also the last calls, which are padded, and results that a later replay of the graph must not overwrite."""
    module, latents = small_dit().to(GPU), torch.randn(5, 4, 8, 8, device=GPU)
    settings = {"draws": Draws(12), "elimination": rule, "microbatch": 32}
    eager = DiffusionClassifier(module, **settings)(latents)
    compiled = DiffusionClassifier(module, compile=True, **settings)(latents)
    for a, b in zip(eager, compiled, strict=True):
        assert a.prediction == b.prediction
        assert a.nfe == b.nfe
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-3, atol=1e-5)


def test_bfloat16_changes_errors_by_little():
    module, latents = small_dit().to(GPU), torch.randn(4, 4, 8, 8, device=GPU)
    classifier = DiffusionClassifier(module, Draws(20), elimination=Exhaustive())
    whole = classifier(latents)
    with torch.autocast(GPU, torch.bfloat16):
        half = classifier(latents)
    for a, b in zip(whole, half, strict=True):
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=0.02, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_cpu(checkpointing):
    x0, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    rest = torch.tensor([1, 2, 3]), torch.tensor([10, 500, 900]), torch.tensor([True, False, False])
    found = []
    for device in ("cpu", GPU):
        module = small_dit(checkpointing=checkpointing).train().to(device)
        label, t, drop = (value.to(device) for value in rest)
        module.losses(x0.to(device), label, t, noise.to(device), drop)["loss"].mean().backward()
        found.append([weight.grad.cpu() for weight in module.net.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_average_lives_on_the_training_device():
    class Walker(Gaussians):
        def training_step(self, batch, batch_idx):
            return -self.unused.sum()

    ema = EMA(0.5)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(accelerator="auto", devices=1, max_steps=2, callbacks=[ema], **settings).fit(Walker(), loader(8))
    assert {weight.device.type for weight in ema._average.values()} == {GPU}
