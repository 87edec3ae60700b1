"""Fixtures that several test files share."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_diffclf.models.dit import DiT
from lightning_diffclf.results import drawing

GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture(scope="session", autouse=True)
def drawn_here() -> Iterator[None]:
    """Charts are drawn by the process that tests: to start one for each evaluation takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "pictures", drawing._draw)
        yield


class GoldenDiT(NamedTuple):
    model: DiT  # eval mode
    arrays: dict[str, Tensor]  # see tests/data/golden/README.md


@pytest.fixture(scope="session")
def golden_dit() -> GoldenDiT:
    folder = GOLDEN / "dit"
    model = DiT(**json.loads((folder / "dit_golden.json").read_text())["model"]).eval().requires_grad_(False)
    model.load_state_dict(load_file(folder / "dit_tiny.safetensors"), strict=True)
    with np.load(folder / "dit_golden.npz") as file:
        return GoldenDiT(model, {key: torch.from_numpy(values) for key, values in file.items()})
