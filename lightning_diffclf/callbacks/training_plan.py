"""What a training will cost, for the network as it is configured and for the published sizes, measured before it."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf.data.batch import unpack
from lightning_diffclf.data.stream import Share
from lightning_diffclf.errors import UserError, WrongType
from lightning_diffclf.models.dit import NAMES, SIZES, DiT
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT

SECONDS = 4.0  # that one size is measured for, about
FEW = 8  # images that sizes are measured on: on fewer, reading the weights takes longer than computing
BYTES_OF_WEIGHT = 20  # float32: weight, gradient, two moments of AdamW, average


@dataclass(frozen=True)
class Cost:
    """What a network costs in training.

    Attributes:
        name: Its size.
        parameters: Number of weights.
        flops: Floating point operations of an image, forward and backward, as PyTorch counts them.
        bytes_of_image: What is kept of an image for the backward pass, in float32.
    """

    name: str
    parameters: int
    flops: float
    bytes_of_image: float

    def memory(self, images: int) -> float:
        """Bytes of a step with so many images at once, in float32; mixed precision takes less."""
        return self.parameters * BYTES_OF_WEIGHT + images * self.bytes_of_image


@dataclass(frozen=True)
class Row:
    """A line of the plan.

    Attributes:
        cost: What does not depend on the machine.
        seconds: Of an optimizer step.
        measured: Whether they were measured, rather than taken from the operations at the speed of another size.
        peak: Bytes that a GPU had in use; None if that was not measured.
    """

    cost: Cost
    seconds: float
    measured: bool
    peak: int | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """The cost of a training.

    Attributes:
        images: Images to train on; None if unknown.
        classes: Number of classes; None if unknown.
        batch_size: Images in an optimizer step, over all processes.
        at_once: Images that one process has in memory at once.
        steps: Optimizer steps.
        load_rate: Images in a second that the loader of a process gives.
        rows: The network as configured, then other sizes.
    """

    images: int | None
    classes: int | None
    batch_size: int
    at_once: int
    steps: int
    load_rate: float
    rows: list[Row]

    def to_table(self) -> Table:
        """For the terminal."""
        passes = f" ({self.steps * self.batch_size / self.images:.3g} passes)" if self.images else ""
        table = Table(
            title="plan of the training",
            caption=f"{self.images or '?'} images of {self.classes or '?'} classes to train on; {self.steps} steps of "
            f"{self.batch_size} images{passes}, {self.at_once} at once in a process, whose loader gives "
            f"{_shown(self.load_rate)} images/s. GFLOP: of an image. Memory in GiB: weights, AdamW, average and "
            "activations in float32, or the peak on a GPU (*). ≈: by the operations, at the speed of the size above. "
            "Other sizes: --model.model",
        )
        for name in ("size", "weights, M", "GFLOP", "memory", "s/step", "images/s", "hours"):
            table.add_column(name, justify="left" if name == "size" else "right", no_wrap=True)
        for row in self.rows:
            about = "" if row.measured else "≈ "
            memory = row.cost.memory(self.at_once) if row.peak is None else row.peak
            speeds = row.seconds, self.batch_size / row.seconds, self.steps * row.seconds / 3600
            table.add_row(
                row.cost.name,
                _shown(row.cost.parameters / 1e6),
                _shown(row.cost.flops / 1e9),
                f"{_shown(memory / 2**30)}{'' if row.peak is None else '*'}",
                *(f"{about}{_shown(value)}" for value in speeds),
            )
        return table


def _shown(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else "0"


# --- what does not depend on the machine -----------------------------------------------------------------------------


def cost_of(name: str, arguments: dict[str, Any]) -> Cost:
    """Cost of a DiT of these arguments.

    It is counted at one and at two blocks, of which all others are copies: large networks need not be made for it.
    """
    one, two = (_counted(DiT(**arguments | {"depth": depth})) for depth in (1, 2))
    parameters, flops, kept = (a + (b - a) * (arguments["depth"] - 1) for a, b in zip(one, two, strict=True))
    return Cost(name, parameters, float(flops), float(kept))


def _counted(net: DiT) -> tuple[int, int, int]:
    """Weights, and of a training step of one image the operations and the bytes that it keeps."""
    own = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    x = torch.zeros(1, net.in_channels, *net.input_size)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            output = net(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
        output.sum().backward()
    return sum(weight.numel() for weight in net.parameters()), counter.get_total_flops(), sum(kept.values())


# --- what does -------------------------------------------------------------------------------------------------------


def plan_training(trainer: L.Trainer, module: L.LightningModule, data: L.LightningDataModule) -> TrainingPlan:
    """Measure what ``trainer.fit(module, data)`` would cost, and what other sizes of the network would.

    Sizes that need more memory or time than there is for a measurement are estimated. Processes are taken to compute
    at the same speed and to lose no time to one another; a network is not compiled for this.

    Args:
        trainer: Says device, precision, number of processes and of steps.
        module: The network as configured, which is trained for a few steps.
        data: The training data.

    Raises:
        TypeError: if the module is no ClassConditionalDiT.
        ValueError: as the data module, or if not even a step on one image can be measured.
    """
    if not isinstance(module, ClassConditionalDiT):
        raise WrongType(f"plan: of the training of a {type(module).__name__}, expected a ClassConditionalDiT")
    data.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    at_once, share = loader.batch_size, Share.of(trainer)
    batch, load_rate = _loaded(loader)
    arguments = {name: value for name, value in module.hparams.items() if not name.startswith("_")}
    rows: list[Row] = []
    for name in [None, *_other_sizes(module)]:
        cost = cost_of(name or "as configured", _arguments(module, name))
        found = None
        if not rows or (cost.memory(1) < _memory(trainer) and is_quick(cost, rows, at_once)):
            made = ClassConditionalDiT(**arguments | {"model": name}) if name else module
            found = _measured(_Steps(made, trainer), batch, at_once)
        if found is not None:
            seconds, of_optimizer, peak = found
            rows.append(Row(cost, share.accumulate * seconds + of_optimizer, True, peak))
        elif not rows:
            raise UserError("plan: not even a step on one image fits into the memory")
        else:
            rows.append(Row(cost, rows[-1].seconds * cost.flops / rows[-1].cost.flops, False))
    return TrainingPlan(
        images=getattr(loader.dataset, "size", None),
        classes=module.hparams["num_classes"],
        batch_size=at_once * share.world_size * share.accumulate,
        at_once=at_once,
        steps=trainer.max_steps,
        load_rate=load_rate,
        rows=rows,
    )


class _Steps:
    """Training steps of a module on a device, without a Trainer."""

    def __init__(self, module: ClassConditionalDiT, trainer: L.Trainer) -> None:
        self.device = trainer.strategy.root_device
        self.module = module.to(self.device).train()
        trainer.precision_plugin.convert_module(self.module)  # in place
        self.context = trainer.precision_plugin.forward_context
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights)
        self.average = [weight.detach().clone() for weight in self.weights]

    def seconds(self, batch: tuple[Tensor, Tensor], count: int) -> tuple[float, float]:
        """Of forward and backward on the first ``count`` images, and of the optimizer with the average."""
        part = tuple(one[:count].to(self.device) for one in batch)
        marks = [self._now()]
        with self.context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no Trainer to log to
            loss = self.module.training_step(part, 0)
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(self.average, self.weights, strict=True):
                average.lerp_(weight, 0.001)
        marks.append(self._now())
        return marks[1] - marks[0], marks[2] - marks[1]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _measured(steps: _Steps, batch: tuple[Tensor, Tensor], at_once: int) -> tuple[float, float, int | None] | None:
    """Seconds of a batch and of the optimizer, and the peak on a GPU; None if not even one image fits.

    Where a whole batch takes too long or does not fit, as many images as do not stand for all.
    """
    count, found = 1, None
    try:
        steps.seconds(batch, count)  # to warm up
        found = [steps.seconds(batch, count)]
        while count < at_once and found[0][0] < SECONDS / 4:
            more = min(2 * count, at_once)
            steps.seconds(batch, more)
            found, count = [steps.seconds(batch, more)], more
        while len(found) < 3 or sum(map(sum, found)) < SECONDS / 2:
            found.append(steps.seconds(batch, count))
    except torch.OutOfMemoryError:
        if found is None:
            return None
    seconds, of_optimizer = (statistics.median(column) for column in zip(*found, strict=True))
    whole = steps.device.type == "cuda" and count == at_once
    return seconds * at_once / count, of_optimizer, torch.cuda.max_memory_allocated(steps.device) if whole else None


def _loaded(loader: Any) -> tuple[tuple[Tensor, Tensor], float]:
    """Images and labels of a batch, and how many images a second the loader gives after it."""
    batches = iter(loader)
    images, labels = unpack(next(batches))[:2]
    if labels is None:
        raise UserError("batch: no labels, expected a label for each image to train on")
    count, start = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - start < SECONDS / 4:
        count += len(unpack(next(batches)).images)
    return (images, labels), count / (time.perf_counter() - start)


def is_quick(cost: Cost, rows: list[Row], at_once: int) -> bool:
    """Whether a size can be measured, by those before it.

    The first one is tried on one image only: a small network as configured says too little of the speed of larger ones.
    """
    images = 1 if len(rows) == 1 else min(FEW, at_once)
    return images * cost.flops / _rate(rows, at_once) < SECONDS / 2


def _rate(rows: list[Row], images: int) -> float:
    """Operations in a second, of the last size that was measured on so many images."""
    measured = [row for row in rows if row.measured][-1]
    return images * measured.cost.flops / measured.seconds


def _memory(trainer: L.Trainer) -> float:
    """Bytes that a measurement may take."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _other_sizes(module: ClassConditionalDiT) -> list[str]:
    """The published sizes with patches as the network's; or the smallest that there are, where it has others."""
    sides = (2, 4, 8)
    fitting = [p for p in sides if not any(side % p for side in module.image_shape[1:])]
    own = module.net.patch_size
    patch_size = own if own in fitting else min(fitting, default=None)
    return [] if patch_size is None else [name for name in NAMES if name.endswith(f"/{patch_size}")]


def _arguments(module: ClassConditionalDiT, name: str | None) -> dict[str, Any]:
    """Arguments of the network: as configured, or of another size."""
    net, given = module.net, module.hparams
    patch_size, width, depth, heads = net.patch_size, *(given[one] for one in ("hidden_size", "depth", "num_heads"))
    name = name or given["model"]
    if name is not None:
        size, _, patch = name.removeprefix("DiT-").partition("/")
        (width, depth, heads), patch_size = SIZES[size], int(patch)
    return {
        "input_size": net.input_size,
        "in_channels": net.in_channels,
        "num_classes": net.num_classes,
        "patch_size": patch_size,
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        **{one: given[one] for one in ("mlp_ratio", "class_dropout_prob", "learn_sigma")},
    }
