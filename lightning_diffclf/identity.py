"""What a thing is, as plain values: two things with the same identity give the same results.

An identity is made of all that a thing was made with, so that a new argument is part of it unless it is declared not to
matter. Data modules and modules say theirs in ``identity()``. Where something cannot be told from another of its kind,
there is no identity: it is refused, because a run that resumes another's results does harm and one that does not costs
time only.
"""

from __future__ import annotations

import copyreg
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.errors import UserError

SHOWN = 16  # members of a list, a mapping or a tensor that an identity shows; of more, it has a digest
CHUNK = 1 << 24  # bytes that are copied from a device at once


def digest_of(*parts: bytes) -> str:
    """A short name of some bytes."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def identity_of(value: Any) -> Any:
    """``value`` as plain values that JSON takes: the same in every process, without memory addresses.

    Large contents (tensors, weights, long lists, code) become digests. Anything with a method ``identity()`` says its
    own; networks are their structure and weights; functions are their code, defaults, closures and the globals that
    they name; other objects are what they would be pickled as: all their attributes, also those whose name begins with
    an underscore, without cached properties.

    Raises:
        ValueError: for what has no contents to compare, such as a lock, a generator or an open file.

    Example:
        >>> identity_of({"size": (8, 16), "path": Path("data")})
        {'size': [8, 16], 'path': 'data'}
    """
    return _plain(value, ())


def says(value: Any) -> bool:
    """Whether a thing has a method ``identity()``."""
    return callable(getattr(type(value), "identity", None))  # of the class: networks may have a part of that name


class ByArguments:
    """Has an identity by the arguments of its constructor: for data modules and modules that keep them in ``hparams``.

    A subclass lists the arguments that cannot change results in ``CANNOT_CHANGE_RESULTS``, each with the reason, and
    adds what the arguments do not say to :meth:`contents`.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[Mapping[str, str]] = {}

    def contents(self) -> dict[str, Any]:
        """What results depend on beside the arguments, such as the names of files."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What results depend on; see :func:`identity_of`.

        Raises:
            ValueError: if an argument has no identity.
        """
        given = getattr(self, "hparams", {})
        return arguments_identity(self, given, self.CANNOT_CHANGE_RESULTS) | identity_of(self.contents())


def arguments_identity(thing: Any, arguments: Mapping[str, Any], cannot_matter: Mapping[str, str]) -> dict[str, Any]:
    """Identity by what the constructor of ``thing`` was given.

    Args:
        thing: Any object.
        arguments: Its constructor's arguments by name, such as Lightning's ``hparams``. Names that begin with an
            underscore are Lightning's own.
        cannot_matter: Arguments that cannot change results, each with the reason.

    Raises:
        ValueError: if an argument of the constructor is not among ``arguments``: then it would be missing here.
    """
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(type(thing)).parameters.values()
    missing = {one.name for one in parameters if one.kind not in several} - set(arguments)
    if missing:
        raise UserError(
            f"identity: {type(thing).__name__} did not keep {sorted(missing)}, expected all arguments in hparams "
            "(save_hyperparameters), or a method identity() of its own"
        )
    names = sorted(name for name in arguments if name not in cannot_matter and not name.startswith("_"))
    return {"class": _name(type(thing)), **{name: identity_of(arguments[name]) for name in names}}


# --- digests ---------------------------------------------------------------------------------------------------------


def digest_of_weights(*modules: nn.Module) -> str:
    """A short name of all that modules would save: every value of every tensor, wherever it is, about 1 GB/s a core."""
    items = [item for module in modules for item in sorted(module.state_dict().items()) if isinstance(item[1], Tensor)]
    with ThreadPoolExecutor() as pool:  # hashing lets other threads work
        digests = list(pool.map(digest_of_tensor, [value for _, value in items]))
    return digest_of(*(f"{name} {one}".encode() for (name, _), one in zip(items, digests, strict=True)))


def digest_of_tensor(value: Tensor) -> str:
    """A short name of a tensor's values, type and shape; the same on every device and in every memory format."""
    flat = value.detach().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=8)
    for part in flat.split(CHUNK):
        digest.update(memoryview(part.cpu().numpy()))
    return digest.hexdigest()


def digest_of_structure(module: nn.Module) -> str:
    """A short name of what a network is made of: classes of all parts, and what these say of themselves."""
    return digest_of(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(module)).encode())


# --- one kind of value after another ---------------------------------------------------------------------------------


def _plain(value: Any, above: tuple[Any, ...]) -> Any:
    """``above``: what ``value`` is part of, so that what holds itself comes to an end."""
    if isinstance(value, enum.Enum):
        return f"{_name(type(value))}.{value.name}"
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)  # JSON has no infinity, and nan equals nothing
    if isinstance(value, (Path, torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), above)
    if isinstance(value, (Tensor, np.ndarray)):
        return _array(value, above)
    if isinstance(value, (bytes, bytearray)):
        return digest_of(bytes(value))
    if isinstance(value, types.ModuleType):
        return value.__name__
    if isinstance(value, type):
        return _name(value)
    levels = [len(above) - i for i, one in enumerate(above) if one is value]
    if levels:
        return f"itself, {levels[-1]} above"
    above = (*above, value)
    if says(value):
        own = _plain(value.identity(), above)
        return {"class": _name(type(value)), **(own if isinstance(own, dict) else {"identity": own})}
    if isinstance(value, nn.Module):
        name, structure = _name(type(value)), digest_of_structure(value)
        return {"class": name, "structure": structure, "weights": digest_of_weights(value)}
    if isinstance(value, Mapping):
        if len(value) <= SHOWN and all(isinstance(name, str) for name in value):
            return {name: _plain(one, above) for name, one in value.items()}
        pairs = ([_plain(name, above), _plain(one, above)] for name, one in value.items())
        return _shortened(sorted(pairs, key=_text))
    if isinstance(value, Set):
        return _shortened(sorted((_plain(one, above) for one in value), key=_text))
    if isinstance(value, Sequence):
        return _shortened([_plain(one, above) for one in value])
    if isinstance(value, functools.partial):
        return {"function": _plain(value.func, above), "args": _plain([value.args, value.keywords], above)}
    if isinstance(value, types.MethodType):
        return {"method": _plain(value.__func__, above), "of": _plain(value.__self__, above)}
    if isinstance(value, types.FunctionType):
        return _function(value, above)
    if isinstance(value, types.CodeType):
        constants = [_plain(one, above) for one in value.co_consts]
        return digest_of(value.co_code, _text([value.co_names, value.co_varnames, constants]).encode())
    return _object(value, above)


def _object(value: Any, above: tuple[Any, ...]) -> Any:
    """Any other object, as it would be pickled: what makes it again, and its state."""
    kind = type(value)
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": _name(kind), **{name: _plain(one, above) for name, one in fields.items()}}
    try:
        reduced = copyreg.dispatch_table[kind](value) if kind in copyreg.dispatch_table else value.__reduce_ex__(2)
    except Exception as error:  # most often TypeError, but objects may raise what they like
        holders = [type(one).__name__ for one in above[:-1] if type(one) not in (dict, list, tuple)]
        inside = f" in a {holders[-1]}" if holders else ""
        raise UserError(
            f"identity: a {_name(kind)}{inside} cannot be told from another; give what holds it a method identity()"
        ) from error
    if isinstance(reduced, str):
        return f"{kind.__module__}.{reduced}"
    maker, args, state, *items = [*reduced, None][: max(3, len(reduced))]
    if isinstance(state, tuple) and len(state) == 2:  # attributes in a dictionary, and in slots
        state = {**(state[0] or {}), **(state[1] or {})}
    if isinstance(state, Mapping):
        state = {name: one for name, one in state.items() if not _is_cached(kind, name)}
    found: dict[str, Any] = {"class": _name(kind)}
    if args and args != (kind,):
        found["made by"] = [_name(maker), *(_plain(one, above) for one in args if one is not kind)]
    members = [list(one) for one in items if isinstance(one, Iterator)]
    if members:
        found["members"] = _plain(members, above)
    plain = _plain(state, above)
    return found | (plain if isinstance(plain, dict) else {} if plain is None else {"state": plain})


def _is_cached(kind: type, name: Any) -> bool:
    return isinstance(inspect.getattr_static(kind, str(name), None), functools.cached_property)


def _function(function: types.FunctionType, above: tuple[Any, ...]) -> dict[str, Any]:
    """Code, defaults, what it has taken along, and the globals that it names: functions of other modules by name."""
    globals_ = {n: function.__globals__[n] for n in _names(function.__code__) if n in function.__globals__}
    for name, one in globals_.items():
        if isinstance(one, types.FunctionType) and one.__module__ != function.__module__:
            globals_[name] = _name(one)
    closure = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    defaults = [function.__defaults__, function.__kwdefaults__]
    over = {"closure": closure, "defaults": defaults, "globals": globals_}
    return {"function": _name(function), "code": _plain(function.__code__, above), **_plain(over, above)}


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  (raises where a variable has no value yet)
    except ValueError:
        return False
    return True


def _names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes that a function uses, also in functions inside it."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*inner)


def _array(value: Tensor | np.ndarray, above: tuple[Any, ...]) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":  # of strings or objects
        return _plain(value.tolist(), above)
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    shown = 0 < value.numel() <= SHOWN and value.dtype in (torch.float32, torch.int64, torch.bool)
    return _plain(value.tolist(), above) if shown else digest_of_tensor(value)


def _shortened(values: list[Any]) -> Any:
    return values if len(values) <= SHOWN else {"count": len(values), "digest": digest_of(_text(values).encode())}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
