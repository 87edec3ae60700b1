"""What the results of an evaluation depend on: composed of what recipe, module and data say of themselves."""

from __future__ import annotations

import inspect
import platform
import shlex
import sys
from collections.abc import Mapping, Set
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchmetrics import Metric

from lightning_diffclf.discriminative import Discriminative
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import digest_of_tensor, identity_of, says
from lightning_diffclf.results.settings import Settings

LOADING = ("batch_size", "eval_batch_size", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor")


def run_settings(callback: Any, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any) -> Settings:
    """What an evaluation by a DiffusionClassifierCallback depends on, and what else its reader may want to know.

    Call it on all processes; they are given the identity that the first one finds.

    Raises:
        ValueError: if something that matters has no identity.
    """
    c = callback.classifier
    identity = {
        "recipe": identity_of(c.recipe if c.terms.logits else c.recipe.resolved(c.draws, c.rule)),
        "module": module_identity(pl_module),
        "data": data_identity(data_module(trainer), loader),
        "precision": str(trainer.precision),
        "keep_errors": callback.keep_errors,
        "keep_distances": callback.keep_distances,
    }
    if callback.corruption is not None:
        identity["corruption"] = identity_of(callback.corruption)
    if callback.fitting is not None:
        identity["fitted_to"] = callback.fitting.identity()
    info = made_by(trainer) | {
        "part": callback.part,
        "calibration": callback.calibration,
        "reuse": callback.reuse,
        "microbatch": callback.microbatch,
        "compile": callback.compile,
        "candidate_names": list(c.candidates.names),
        **callback.outline.to_info(),
    }
    if not c.terms.logits:
        info["log_snr_S"] = c.terms.log_snr_S.tolist()
    return Settings(trainer.strategy.broadcast(identity), info)


def made_by(trainer: L.Trainer) -> dict[str, Any]:
    """What made a run, and when, on which machine."""
    cuda = trainer.strategy.root_device.type == "cuda"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else None,
        "ranks": trainer.world_size,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "versions": {name: version(name) for name in ("lightning-diffclf", "torch", "lightning")},
    }


def data_module(trainer: L.Trainer) -> Any:
    """The data module of this evaluation: ``trainer.datamodule`` may be that of one before."""
    selector = trainer._data_connector._datahook_selector
    return None if selector is None else selector.datamodule


# --- of users' own classes -------------------------------------------------------------------------------------------


def module_identity(module: L.LightningModule) -> dict[str, Any]:
    """What a module says in ``identity()``; else its class, hyperparameters, parts, weights, schedule and candidates.

    Attributes that are neither parts nor hyperparameters are not seen: a module with some that matter says so in a
    method ``identity()``, which returns anything that :func:`~lightning_diffclf.identity.identity_of` takes. Its class
    may list hyperparameters that do not matter in ``CANNOT_CHANGE_RESULTS``, by name with the reason.
    """
    if says(module):
        found: dict[str, Any] = identity_of(module)
        return found
    tensors = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    parts = {
        "class": type(module),
        "arguments": _without(module, module.hparams),
        "parts": {name: part for name, part in module.named_children() if not _measures(part)},
        "weights": {name: digest_of_tensor(tensors[name]) for name in sorted(tensors)},
        "candidates": module.candidates,
    }
    if not isinstance(module, Discriminative):
        parts["schedule"] = module.schedule
    return {name: identity_of(part) for name, part in parts.items()}


def _measures(part: nn.Module) -> bool:
    """Whether a part only counts results: it may come and go without another network."""
    return any(isinstance(one, Metric) for one in part.modules()) and not list(part.parameters())


def data_identity(data: Any, loader: Any) -> dict[str, Any]:
    """What a data module says in ``identity()``; else its class, its arguments, and the data set of its loader.

    The arguments are its hyperparameters (``save_hyperparameters()``) if it has some, or else its attributes that are
    plain values, without what only concerns loading (batch sizes, workers) and what its class lists in
    ``CANNOT_CHANGE_RESULTS``, by name with the reason. A method ``identity()`` of its own may return anything that
    :func:`~lightning_diffclf.identity.identity_of` takes.

    Args:
        data: The data module, or None.
        loader: What it is evaluated on.

    Raises:
        ValueError: if there is no data module, and batches come from something without identity.
    """
    if says(data):
        found: dict[str, Any] = identity_of(data)
        return found
    own = {} if data is None else {"class": identity_of(type(data)), "arguments": identity_of(_arguments_of(data))}
    return own | dataset_identity(getattr(loader, "dataset", loader))


def dataset_identity(dataset: Any) -> dict[str, Any]:
    """What a data set says in ``identity()``; else its class, length, and those attributes that can be compared.

    These are plain values, tensors and arrays in memory, lists of these, and whatever can be called (transforms).
    """
    if says(dataset) or isinstance(dataset, (list, tuple)):
        return {"dataset": identity_of(dataset)}
    if isinstance(dataset, nn.Module) or not hasattr(dataset, "__dict__"):
        raise UserError(f"data: a {type(dataset).__name__} cannot be told from another, expected a DataLoader")
    images = None if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") else len(dataset)
    told = {name: one for name, value in sorted(vars(dataset).items()) if (one := _told(value)) is not None}
    return {"dataset": {"class": identity_of(type(dataset)), **told}, "images": images}


def _arguments_of(data: L.LightningDataModule) -> dict[str, Any]:
    if data.hparams:
        return _without(data, data.hparams)
    lightnings_own = vars(L.LightningDataModule())
    public = {n: v for n, v in vars(data).items() if not n.startswith("_") and n not in lightnings_own}
    return {n: v for n, v in _without(data, public).items() if _told(v) is not None}


def _without(thing: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that may change results."""
    left_out = {*LOADING, *getattr(type(thing), "CANNOT_CHANGE_RESULTS", {})}
    return {name: value for name, value in arguments.items() if name not in left_out and not name.startswith("_")}


def _told(value: Any) -> Any:
    """Identity of an attribute of a data set; None for what cannot be compared: a cache that is empty yet, a file."""
    if value is None or isinstance(value, np.memmap):
        return None
    if isinstance(value, Dataset):
        return dataset_identity(value)
    if isinstance(value, (list, tuple, Set, Mapping)):
        told = [_told(one) for one in (value.values() if isinstance(value, Mapping) else value)]
        if any(one is None for one in told):
            return None
        return identity_of(dict(zip(value, told, strict=True)) if isinstance(value, Mapping) else told)
    plain = (bool, int, float, str, bytes, range, Path, np.generic, np.ndarray, Tensor, torch.dtype)
    compares = isinstance(value, plain) or says(value) or (callable(value) and not inspect.isclass(value))
    return identity_of(value) if compares else None
