"""What a training goes by: noise schedules by name, random numbers by key, the learning rate by step, shards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_diffclf.data.stream import Share
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.noise import KeyedNoise
from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule

VALIDATION_TIMESTEPS = 100  # the validation loss is taken at this many noise levels, a fixed one for each image


def schedule_named(name: str, prediction: Any = None) -> NoiseSchedule:
    """A noise schedule by its name, and what a network predicts on it: velocities of flows, else noise, if omitted.

    Raises:
        ValueError: if the name is unknown, or the prediction is not defined for it.
    """
    if name == "rectified_flow":  # the network embeds times of 0 … 1000, as in SD3
        return NoiseSchedule.rectified_flow(time_scale=1000.0, prediction=prediction or "velocity")
    if name == "sit":
        return NoiseSchedule.rectified_flow(noise_at=0, time_scale=1.0, prediction=prediction or "velocity")
    makers: dict[str, Callable[..., NoiseSchedule]] = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
    }
    if name not in makers:
        raise UserError(f"schedule: {name!r}, expected one of {[*makers, 'rectified_flow', 'sit']}")
    return makers[name](prediction=prediction or "epsilon")


def network_of(settings: Mapping[str, Any]) -> DiT:
    """The network that the arguments of a :class:`~.class_conditional_dit.ClassConditionalDiT` describe.

    Raises:
        ValueError: if they contradict each other.
    """
    size = settings["input_size"]
    if not isinstance(size, int) and len(size) != 2:
        raise UserError(f"input_size: {size}, expected a number, or height and width")
    shared: dict[str, Any] = {"input_size": size if isinstance(size, int) else tuple(size)}
    names = ("in_channels", "mlp_ratio", "class_dropout_prob", "num_classes", "learn_sigma")
    shared |= {name: settings[name] for name in names}
    if settings["model"]:
        return DiT.from_name(settings["model"], **shared)
    return DiT(**shared, **{name: settings[name] for name in ("patch_size", "hidden_size", "depth", "num_heads")})


def check_settings(settings: Mapping[str, Any], schedule: NoiseSchedule) -> None:
    """Raise ValueError where settings contradict each other.

    Args:
        settings: Arguments of a :class:`~.class_conditional_dit.ClassConditionalDiT`.
        schedule: Its noise schedule.
    """
    if settings["learn_sigma"] and not (isinstance(schedule, DiscreteSchedule) and schedule.prediction == "epsilon"):
        raise UserError(
            f"learn_sigma: a variance is only defined for epsilon prediction on a discrete schedule, found "
            f"{schedule.prediction!r} on {settings['schedule']!r}; set learn_sigma to false"
        )
    if settings["vae"] is not None and not settings["latents"]:
        raise UserError(f"vae: {settings['vae']!r} given, but latents is false: the network works on pixels")
    names, count = settings["class_names"], settings["num_classes"]
    if names is not None and len(names) != count:
        raise UserError(f"class_names: {len(names)} names for num_classes = {count}")
    for name in ("lr", "num_classes"):
        if settings[name] <= 0:
            raise UserError(f"{name}: {settings[name]}, expected a positive number")
    for name in ("none_of_these", "separation"):
        if settings[name] and settings["class_dropout_prob"] == 0:
            raise UserError(f"{name}: the network has no null label, expected class_dropout_prob > 0")
    if not 0 <= settings["class_sets"] <= 1:
        raise UserError(f"class_sets: {settings['class_sets']}, expected a share in [0, 1]")
    if settings["contrastive"] and schedule.prediction == "epsilon":
        raise UserError(
            "contrastive: with epsilon prediction, the target of another image says nothing of its class; expected "
            "another prediction, such as velocity on the rectified flow"
        )
    if settings["contrastive"] and settings["class_sets"]:
        raise UserError("contrastive: an image on a set of classes has no other class; expected class_sets: 0")
    if (settings["classification"] or settings["separation"]) and settings["num_classes"] < 2:
        raise UserError("classification, separation: 1 class, expected 2 or more to compare")


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on ``device`` whose state depends on nothing but ``key``."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class StepRandom(NamedTuple):
    """What is random about the rows that a batch has of an optimizer step: the same, however the step is divided.

    Attributes:
        generator: Keyed by the step.
        total: Rows of the step, over all processes and accumulated batches.
        rows: Those of the batch.
    """

    generator: torch.Generator
    total: int
    rows: slice

    @classmethod
    def of(cls, module: L.LightningModule, images: Tensor, batch_idx: int, seed: int) -> StepRandom:
        """For the ``batch_idx``-th batch (B, ...) of a module's process."""
        share, count = Share.of(module._trainer), len(images)
        generator = keyed_generator(images.device, seed, module.global_step)
        return cls(generator, count * share.world_size * share.accumulate, share.rows(count, batch_idx))

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) of this shape for each row (B, ...)."""
        device = self.generator.device
        return torch.rand((self.total, *shape), generator=self.generator, device=device)[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """Numbers of the standard normal distribution, of this shape for each row (B, ...)."""
        device = self.generator.device
        return torch.randn((self.total, *shape), generator=self.generator, device=device)[self.rows]

    def timesteps(self, schedule: NoiseSchedule) -> Tensor:
        """Timesteps as networks are trained on them (B,)."""
        return schedule.random_timesteps(self.total, self.generator)[self.rows]


def own_first(labels: Tensor, num_classes: int, random: StepRandom) -> Tensor:
    """All classes in random order, but the own one of each image (B,), int64, first: (B, K), int64."""
    return random.uniform(num_classes).scatter(1, labels[:, None], -1.0).argsort(1)


def class_sets(labels: Tensor, num_classes: int, share: float, random: StepRandom) -> Tensor:
    """Random sets of classes, each with the image's own: what a network learns of them serves a search among classes.

    Args:
        labels: Classes (B,), int64.
        num_classes: Number of classes K.
        share: Share of images with a set of 1 … K classes, log-uniform; that of others has their own class only.
        random: Of this batch.

    Returns:
        Members (B, K), bool.
    """
    size = ((num_classes + 1) ** random.uniform()).long().clamp(max=num_classes)
    size = torch.where(random.uniform() < share, size, 1)  # (B,)
    order = own_first(labels, num_classes, random)
    first = torch.arange(num_classes, device=order.device) < size[:, None]  # (B, K)
    return torch.zeros_like(first).scatter(1, order, first)


def fixed_timesteps(schedule: NoiseSchedule, ids: Sequence[int | str], seed: int) -> Tensor:
    """A timestep for each image (B,), by its id: of :data:`VALIDATION_TIMESTEPS` that cover the time axis evenly."""
    keyed = KeyedNoise(seed)
    levels = torch.tensor([int(keyed.key(i)[0] % VALIDATION_TIMESTEPS) for i in ids])
    count = min(VALIDATION_TIMESTEPS, schedule.num_timesteps or VALIDATION_TIMESTEPS)
    return schedule.timesteps(count)[levels]


def shard(net: nn.Module, blocks: Iterable[nn.Module], strategy: object) -> None:
    """Shard a network's weights over processes, block by block, where the Trainer's strategy asks for it (FSDP).

    Raises:
        ValueError: if the strategy would not share the data among all processes.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    mesh = strategy.device_mesh["data_parallel"]
    if mesh.size() != strategy.world_size:
        found, expected = mesh.size(), strategy.world_size
        raise UserError(f"strategy: data_parallel_size {found}, expected {expected}, the number of processes")
    for part in (*blocks, net):
        fully_shard(part, mesh=mesh)


def learning_rate_factor(step: int, warmup_steps: int, total: float, decay: str) -> float:
    """Factor on the learning rate: rising over ``warmup_steps``, then constant or falling to zero at ``total``.

    Example:
        >>> [learning_rate_factor(step, 2, 6, "linear") for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "none":
        return 1.0
    share = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return 1 - share if decay == "linear" else (1 + math.cos(math.pi * share)) / 2


def optimization(parameters: Iterable[nn.Parameter], settings: Mapping[str, Any], steps: Callable[[], float]) -> Any:
    """AdamW and its learning rate by step, as Lightning takes them.

    Args:
        parameters: What is trained.
        settings: ``lr``, ``betas``, ``weight_decay``, ``warmup_steps`` and ``decay``.
        steps: Says how many optimizer steps there will be; asked only where the rate decays.

    Raises:
        ValueError: if the rate decays, but training has no end.
    """
    optimizer = torch.optim.AdamW(
        parameters, lr=settings["lr"], betas=tuple(settings["betas"]), weight_decay=settings["weight_decay"]
    )
    decay = settings["decay"]
    total = steps() if decay != "none" else math.inf
    if decay != "none" and not math.isfinite(total):
        raise UserError(f"decay: {decay!r} needs an end, set trainer.max_steps")
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, settings["warmup_steps"], total, decay)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
