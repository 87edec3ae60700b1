"""What the results of an evaluation depend on."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.results.store import Settings
from lightning_diffclf.schedule import NoiseSchedule


def run_settings(callback: Any, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any) -> Settings:
    """What an evaluation by a DiffusionClassifierCallback depends on, and what else its reader may want to know."""
    c, denoiser = callback.classifier, callback.classifier.denoiser
    dataset: Any = getattr(loader, "dataset", None)
    names = json.dumps([denoiser.candidates.names, denoiser.candidates.classes]).encode()
    root = getattr(dataset, "root", None)
    identity = {
        "model": type(pl_module).__qualname__,
        "weights_of_network": fingerprint(pl_module),
        "schedule": schedule_name(denoiser.schedule),
        "data": type(dataset).__qualname__,
        "root": None if root is None else str(root),
        "images_in_data": None if isinstance(dataset, IterableDataset) or dataset is None else len(dataset),
        "names": hashlib.blake2b(names, digest_size=8).hexdigest(),
        "draws": len(c.timesteps_S),
        "seed": c.draws.seed,
        "loss": callback.loss,
        "elimination": repr(c.rule),
        "weights": callback.weights,
        "budget": callback.budget,
        "abstain": callback.abstain,
        "proposal": None if callback.proposal is None else name_of(callback.proposal),
        "candidates": callback.candidates,
        "ensemble": callback.ensemble,
        "precision": str(trainer.precision),
        "keep_errors": callback.keep_errors,
        "keep_distances": callback.keep_distances,
    }
    cuda = trainer.strategy.root_device.type == "cuda"
    info = {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
        "part": callback.part,
        "microbatch": callback.microbatch,
        "compile": callback.compile,
        "ranks": trainer.world_size,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "versions": {name: version(name) for name in ("lightning-diffclf", "torch", "lightning")},
        "candidate_names": list(denoiser.candidates.names),
        "log_snr_S": c.log_snr_S.tolist(),
        **callback.outline.to_info(),
    }
    return Settings(identity, info)


def class_names(module: ConditionalDenoiser) -> list[str]:
    """A name for each class: that of its first candidate."""
    names = [str(i) for i in range(module.candidates.num_classes)]
    for name, c in reversed(list(zip(module.candidates.names, module.candidates.classes, strict=True))):
        names[c] = name
    return names


def name_of(thing: Any) -> str:
    """Name of a function, or of the class of an object."""
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))


def schedule_name(schedule: NoiseSchedule) -> str:
    """A short name of a schedule, by what it does at a few timesteps."""
    log_snr = [round(value, 4) for value in schedule.log_snr(schedule.timesteps(5)).tolist()]
    return f"{type(schedule).__name__}, {schedule.prediction}, log SNR {log_snr}"


def fingerprint(module: torch.nn.Module) -> str:
    """A short name of a network's weights: that of up to 1,000 values of each parameter and buffer."""
    digest = hashlib.blake2b(digest_size=8)
    # Frozen networks are not parts of their module, or they would be averaged and saved with it.
    parts = [module, *getattr(module, "frozen", [])]
    for name, value in [item for part in parts for item in sorted(part.state_dict().items())]:
        if isinstance(value, Tensor):
            some = value.detach().flatten()[:: max(1, value.numel() // 1000)].float().cpu()
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(some.numpy().tobytes())
    return digest.hexdigest()
