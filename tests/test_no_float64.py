"""Devices without float64, such as Apple's GPUs: nothing that is put on them may be of that type."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, LikelihoodRatio, LinearProbe, NoiseSchedule
from lightning_diffclf.results.error_maps import error_map
from lightning_diffclf.sampling import denoise
from tests.classifier.toys import SHAPE, some_images

CPU, DEVICE = torch.device("cpu"), torch.device("cpu", 0)  # not equal, and both are there on every machine
SCHEDULES = {
    "discrete": NoiseSchedule.linear,
    "flow": NoiseSchedule.rectified_flow,
    "SiT": lambda: NoiseSchedule.rectified_flow(noise_at=0),
    "EDM": NoiseSchedule.edm,
}


class OnDevice(Tensor):
    """Values in the CPU's memory that say they are on the device, and are computed with as if they were."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnDevice:
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert to float64: the device does not support it")
        wrapper = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=DEVICE)
        wrapper.values = values
        return wrapper

    def tolist(self) -> Any:
        return self.values.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is computed from tensors on the device is on the device."""
        kwargs = dict(kwargs or {})
        onto = kwargs.get("device", DEVICE)
        if "device" in kwargs:
            kwargs["device"] = CPU
        args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.values, (args, kwargs))
        result = function(*args, **kwargs)
        return result if torch.device(onto) == CPU else tree_map_only(Tensor, cls, result)


class Device(TorchDispatchMode):
    """Puts on the device what is made there or moved there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") != DEVICE:
            return function(*args, **kwargs)
        args, kwargs = tree_map_only(OnDevice, lambda tensor: tensor.values, (args, kwargs))
        return OnDevice(function(*args, **kwargs | {"device": CPU}))


class Denoiser(nn.Module):
    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule, self.candidates = schedule, Candidates(["a", "b", "c"])
        self.layer = nn.Tanh()
        self.register_buffer("table", torch.linspace(-1, 1, 3)[:, None, None, None])

    def encode(self, images: Tensor) -> Tensor:
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        return self.layer(x_t * self.table[candidate] + (t.float() / 1000)[:, None, None, None])


def test_the_device_refuses_float64():
    with Device():
        there = torch.ones(2, dtype=torch.float32).to(DEVICE)
        assert there.device == DEVICE
        assert (there + 1).device == DEVICE
        assert (there + 1).cpu().tolist() == [2, 2]
        for refused in (lambda: torch.ones(2, dtype=torch.float64).to(DEVICE), there.double):
            with pytest.raises(TypeError, match="float64"):
                refused()


@pytest.mark.parametrize("name", SCHEDULES)
def test_classifying_takes_no_float64_to_the_device(name):
    def classify(device: torch.device) -> list[Any]:
        denoiser, images = Denoiser(SCHEDULES[name]()), some_images(3)
        denoiser.table = denoiser.table.to(device)
        classifier = DiffusionClassifier(
            denoiser, draws=None, elimination=LikelihoodRatio(), weights="sample", microbatch=16, keep_errors=True
        )
        results = list(classifier(images.to(device), ids=[1, 2, 3]))
        maps = error_map(classifier, images[0].to(device), 1, [0, 2], draws=3)
        return [[r.prediction for r in results], *(r.scores_K for r in results), maps]

    here = classify(CPU)
    with Device():
        there = classify(DEVICE)
    assert SHAPE == (2, 4, 4)
    assert there[0] == here[0]
    for a, b in zip(there[1:], here[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", SCHEDULES)
def test_probes_take_no_float64_to_the_device(name):
    def propose(device: torch.device) -> list[Any]:
        schedule = SCHEDULES[name]()
        denoiser, images = Denoiser(schedule), some_images(30).to(device)
        denoiser.table = denoiser.table.to(device)
        probe = LinearProbe("layer", float(schedule.timesteps(1)), top=1)
        probe.fit(denoiser, [(images, torch.arange(30).to(device) % 3)])
        classifier = DiffusionClassifier(denoiser, Draws(2), proposal=probe)
        return [one.tolist() for one in probe.propose(classifier, images, range(30), [np.arange(3)] * 30).candidates]

    here = propose(CPU)
    with Device():
        there = propose(DEVICE)
    assert there == here


@pytest.mark.parametrize("name", ["discrete", "flow", "SiT"])
def test_sampling_takes_no_float64_to_the_device(name):
    def sample(device: torch.device) -> Tensor:
        noise = some_images(2).to(device)
        return denoise(lambda x, t: torch.tanh(x) * t.to(device).float(), SCHEDULES[name](), noise, steps=3).cpu()

    here = sample(CPU)
    with Device():
        there = sample(DEVICE)
    torch.testing.assert_close(there, here)
