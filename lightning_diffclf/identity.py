"""What a thing is, as plain values: two things with the same identity give the same results.

An identity is made of all that a thing was made with, so that a new argument is part of it unless it is declared not to
matter. Data modules and modules say theirs in ``identity()``.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def digest_of(*parts: bytes) -> str:
    """A short name of some bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def identity_of(value: Any) -> Any:
    """``value`` as plain values that JSON takes, without memory addresses.

    Large contents (tensors, weights, code) become digests. Anything with a method ``identity()`` says its own; other
    objects are their class and their attributes, those whose name begins with an underscore left out.

    Example:
        >>> identity_of({"size": (8, 16), "path": Path("data")})
        {'size': [8, 16], 'path': 'data'}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, type) and callable(getattr(value, "identity", None)):
        return {"class": _name(type(value)), **identity_of(value.identity())}
    if isinstance(value, (Tensor, np.ndarray)):
        return _array(value)
    if isinstance(value, bytes):
        return digest_of(value)
    if isinstance(value, nn.Module):
        return {"class": _name(type(value)), "weights": digest_of_weights(value)}
    if isinstance(value, Mapping):
        return {str(name): identity_of(one) for name, one in value.items()}
    if isinstance(value, Set):
        return sorted((identity_of(one) for one in value), key=repr)
    if isinstance(value, Sequence):
        return [identity_of(one) for one in value]
    if isinstance(value, functools.partial):
        return {"function": identity_of(value.func), "args": identity_of([value.args, value.keywords])}
    if isinstance(value, types.MethodType):
        return {"method": value.__func__.__qualname__, "of": identity_of(value.__self__)}
    if isinstance(value, types.FunctionType):
        return {
            "function": _name(value),
            "code": digest_of(*_code(value.__code__)),
            "over": identity_of(_closed(value)),
        }
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return _name(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        fields = {name: one for name, one in vars(value).items() if not name.startswith("_")}
    return {"class": _name(type(value)), **{name: identity_of(one) for name, one in fields.items()}}


def arguments_identity(thing: Any, arguments: Mapping[str, Any], cannot_matter: Mapping[str, str]) -> dict[str, Any]:
    """Identity by what the constructor of ``thing`` was given.

    Args:
        thing: Any object.
        arguments: Its constructor's arguments by name, such as Lightning's ``hparams``.
        cannot_matter: Arguments that cannot change results, each with the reason.

    Raises:
        AssertionError: if an argument of the constructor is not among ``arguments``: then it would be missing here.
    """
    expected = set(inspect.signature(type(thing).__init__).parameters) - {"self"}
    assert expected <= set(arguments), f"{type(thing).__name__}: {sorted(expected - set(arguments))} is not kept"
    kept = {name: identity_of(arguments[name]) for name in sorted(expected) if name not in cannot_matter}
    return {"class": _name(type(thing)), **kept}


def digest_of_weights(module: nn.Module) -> str:
    """A short name of all parameters and buffers that ``module`` would save."""
    parts = []
    for name, value in sorted(module.state_dict().items()):
        if isinstance(value, Tensor):
            parts += [name.encode(), digest_of_tensor(value).encode()]
    return digest_of(*parts)


def digest_of_tensor(value: Tensor) -> str:
    """A short name of a tensor's values, type and shape."""
    values = value.detach().contiguous().cpu()
    shape = f"{value.dtype} {tuple(value.shape)}".encode()
    return digest_of(shape, values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b"")


def _array(value: Tensor | np.ndarray) -> Any:
    tensor = torch.as_tensor(value)
    return tensor.tolist() if tensor.numel() <= 16 else digest_of_tensor(tensor)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _code(code: types.CodeType) -> list[bytes]:
    """What a function does: its instructions, names and constants, those of functions inside it likewise."""
    parts = [code.co_code, repr(code.co_names).encode()]
    for constant in code.co_consts:
        parts += _code(constant) if isinstance(constant, types.CodeType) else [repr(constant).encode()]
    return parts


def _closed(function: types.FunctionType) -> list[Any]:
    """Values that a function has taken along."""
    closed = [cell.cell_contents for cell in function.__closure__ or ()]
    return [*closed, function.__defaults__, function.__kwdefaults__]
