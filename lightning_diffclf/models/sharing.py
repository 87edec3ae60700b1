"""Work that candidates need not repeat, in networks that text enters by cross-attention.

What a network does before its first cross-attention depends on x_t and t only: it is the same for all candidates of an
(image, draw) pair. What it makes of the prompts alone, such as the keys and values of cross-attention, is the same for
all rows of a run. Nothing is known here of any network: its modules are watched while it runs on tensors without data,
where autograd says what depends on what. Then the forward methods of the modules found are replaced during a call,
which leaves processors, LoRA layers and hooks as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_diffclf.errors import first_line

Predict = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Calls a network: (network, x_t, t, embeddings) to its output; all have N rows."""

TABLE_BYTES = 2**30  # that tables of all prompts may take together
PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Shareable:
    """Modules that do not depend on all that a network sees, by their names; none is a part of another.

    Attributes:
        of_input: Those that depend on x_t and t only, with the arguments (positions or names) that have rows.
        of_prompt: Those whose argument is an embedding, and nothing else; with its name and the bytes of one output.
    """

    of_input: dict[str, frozenset[int | str]]
    of_prompt: dict[str, tuple[str, int]]


class Sharing:
    """Calls a network, without repeating for each row what rows have in common.

    Calls must not overlap in threads. Inside a compiled network nothing is replaced, and nothing saved.

    Args:
        network: The network, frozen, in evaluation mode.
        predict: Calls it.
        embeddings: What it is told: tensors (K, ...) with one row for each candidate.
        shared: Likewise, what is the same for all candidates, one row.
    """

    def __init__(
        self, network: nn.Module, predict: Predict, embeddings: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> None:
        self.network, self.predict = network, predict
        self.embeddings, self.shared = dict(embeddings), dict(shared)
        self._shareable: Shareable | None = None
        self._tables: dict[str, Tensor] = {}
        self._made_of: Any = None  # what the tables depend on
        self._weights: list[Tensor] = []

    def __call__(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        """Network output for N rows.

        Args:
            x_t: Noisy inputs of M pairs (M, C, h, w), in the network's precision.
            t: Their time values (M,).
            pair: The pair of each row (N,), int64; every pair has a row.
            candidate: The candidate of each row (N,), int64.
        """
        rows = {name: table[candidate] for name, table in self.embeddings.items()}
        rows |= {name: row.expand(len(pair), *row.shape[1:]) for name, row in self.shared.items()}
        with replaced(self._forwards(x_t, pair, candidate)):
            return self.predict(self.network, x_t[pair], t[pair], rows)

    def shareable(self, x_t: Tensor) -> Shareable:
        """What can be shared; found at the first call."""
        if self._shareable is None:
            try:
                self._shareable = find(self.network, self.predict, x_t, self.embeddings, self.shared)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                warnings.warn(
                    f"{type(self.network).__name__} does not run on tensors without data ({first_line(error)}): "
                    "results are the same, but what candidates have in common is computed for each of them",
                    UserWarning,
                    stacklevel=2,
                )
                self._shareable = Shareable({}, {})
        return self._shareable

    def _forwards(self, x_t: Tensor, pair: Tensor, candidate: Tensor) -> dict[nn.Module, Callable[..., Tensor]]:
        """What modules do in this call, in place of their own forward methods."""
        compiled = (module._compiled_call_impl is not None for module in self.network.modules())
        if torch.compiler.is_compiling() or any(compiled):
            return {}
        shareable, forwards = self.shareable(x_t), dict[nn.Module, Callable[..., Tensor]]()
        if len(x_t) < len(pair):
            # Some row of each pair: all have the same values wherever only x_t and t were seen.
            row = torch.arange(len(pair), device=pair.device)
            row_of_pair = torch.empty(len(x_t), dtype=pair.dtype, device=pair.device).scatter_(0, pair, row)
            for name, arguments in shareable.of_input.items():
                module = self.network.get_submodule(name)
                forwards[module] = once_for_each_pair(module.forward, arguments, row_of_pair, pair)
        for name, table in self._tables_of(shareable, x_t.device).items():
            forwards[self.network.get_submodule(name)] = from_table(table, candidate)
        return forwards

    def _tables_of(self, shareable: Shareable, device: torch.device) -> dict[str, Tensor]:
        """Outputs of modules for all candidates (K, ...), made anew when weights or precision have changed."""
        left, modules = TABLE_BYTES, dict[str, nn.Module]()
        for name, (embedding, size) in shareable.of_prompt.items():
            size *= len(self.embeddings[embedding])
            module = self.network.get_submodule(name)
            if size <= left and _plain(module):
                left -= size
                modules[name] = module
        weights: list[Tensor] = [value for module in modules.values() for value in module.parameters()]
        made_of = [(id(value), value._version) for value in weights], device, _precision(device.type)
        if made_of != self._made_of:
            self._tables, self._made_of = {}, made_of  # the old ones go before the new ones come
            self._weights = weights  # kept, since others could get their numbers
            with torch.inference_mode(False), torch.no_grad():
                for name, module in modules.items():
                    prompts = self.embeddings[shareable.of_prompt[name][0]].split(PROMPTS_AT_ONCE)
                    self._tables[name] = torch.cat([module(some) for some in prompts])
        return self._tables


def _plain(module: nn.Module) -> bool:
    """Whether all is torch's and diffusers' own: LoRA layers and others have switches that weights do not show."""
    return all(type(part).__module__.partition(".")[0] in ("torch", "diffusers") for part in module.modules())


def _precision(device: str) -> torch.dtype | None:
    """Precision of autocast, if it is on."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Other forward methods of some modules inside, their own ones outside."""
    own = {module: vars(module).get("forward") for module in forwards}  # of the object: others may have replaced it
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, before in own.items():
            vars(module).pop("forward", None)
            if before is not None:
                module.forward = before


def once_for_each_pair(
    forward: Callable[..., Tensor], arguments: frozenset[int | str], row_of_pair: Tensor, pair: Tensor
) -> Callable[..., Tensor]:
    """A forward method that runs on one row of each pair; ``arguments`` are those that have rows."""

    def call(*args: Any, **kwargs: Any) -> Tensor:
        few = [value[row_of_pair] if i in arguments else value for i, value in enumerate(args)]
        named = {name: value[row_of_pair] if name in arguments else value for name, value in kwargs.items()}
        return forward(*few, **named)[pair]

    return call


def from_table(table: Tensor, candidate: Tensor) -> Callable[..., Tensor]:
    """A forward method that looks up what was computed before."""
    return lambda *args, **kwargs: table[candidate]


# --- what depends on what --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """One call of a module, without the tensors: these are shapes, and whether they depend on what is asked about."""

    inputs: dict[int | str, tuple[tuple[int, ...], bool]]
    output: tuple[tuple[int, ...], bool] | None
    size: int  # bytes of the output
    embedding: str | None  # which the only input is


def find(
    network: nn.Module,
    predict: Predict,
    x_t: Tensor,
    embeddings: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
) -> Shareable:
    """Modules that depend on x_t and t only, or on one embedding only, for inputs like ``x_t`` (M, C, h, w).

    Raises:
        RuntimeError, NotImplementedError or TypeError: if the network does not run on tensors without data.
    """
    by_prompt = _watch(network, predict, x_t, embeddings, shared, rows=2, prompts_matter=True)
    by_input = _watch(network, predict, x_t, embeddings, shared, rows=3, prompts_matter=False)
    found, taken = Shareable({}, {}), ""
    for name, _ in network.named_modules():  # a module comes before its parts
        calls = by_prompt.get(name, []), by_input.get(name, [])
        if not name or (taken and name.startswith(taken)) or [len(one) for one in calls] != [1, 1]:
            continue
        (two,), (three,) = calls
        kinds = {key: _kind(two.inputs[key][0], three.inputs.get(key, ((), False))[0]) for key in two.inputs}
        if two.output is None or three.output is None or two.inputs.keys() != three.inputs.keys() or not kinds:
            continue
        if _kind(two.output[0], three.output[0]) != "rows" or "other" in kinds.values():
            continue
        arguments = frozenset(key for key, kind in kinds.items() if kind == "rows")
        vector = len(two.output[0]) < 3  # of the time: to compute it costs less than to gather it
        if arguments and not vector and not two.output[1] and not any(depends for _, depends in two.inputs.values()):
            found.of_input[name] = arguments
        elif two.embedding is not None and two.embedding == three.embedding and not three.output[1]:
            found.of_prompt[name] = two.embedding, two.size // 2
        else:
            continue
        taken = f"{name}."
    return found


def _kind(two: tuple[int, ...], three: tuple[int, ...]) -> str:
    """Of a tensor's shapes among two and among three rows: whether it has rows."""
    if two == three:
        return "constant"
    return "rows" if two[:1] == (2,) and three[:1] == (3,) and two[1:] == three[1:] else "other"


class _WithoutData:
    """A network that is called with weights on the meta device; all else is the network's own."""

    def __init__(self, network: nn.Module) -> None:
        named = [*network.named_parameters(), *network.named_buffers()]
        self._network, self._weights = network, {n: torch.empty_like(v.detach(), device="meta") for n, v in named}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._network, self._weights, args, kwargs)


def _watch(
    network: nn.Module,
    predict: Predict,
    x_t: Tensor,
    embeddings: Mapping[str, Tensor],
    shared: Mapping[str, Tensor],
    rows: int,
    prompts_matter: bool,
) -> dict[str, list[_Seen]]:
    """Calls of each module in a run on so many rows, and what depends on prompts there, or else on x_t and t."""
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.empty(rows, *x_t.shape[1:], dtype=x_t.dtype, device="meta", requires_grad=not prompts_matter)
        t = torch.empty(rows, device="meta", requires_grad=not prompts_matter)  # floating, whatever it is: for autograd
        given = {n: torch.empty(rows, *v.shape[1:], dtype=v.dtype, device="meta") for n, v in embeddings.items()}
        for value in given.values():
            value.requires_grad_(prompts_matter)
        common = {n: torch.empty(rows, *v.shape[1:], dtype=v.dtype, device="meta") for n, v in shared.items()}
        seen: dict[str, list[_Seen]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                seen.setdefault(name, []).append(_note(args, kwargs, output, given))

            return hook

        handles = [m.register_forward_hook(note(n), with_kwargs=True) for n, m in network.named_modules()]
        try:
            predict(_WithoutData(network), x, t, given | common)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _note(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, embeddings: Mapping[str, Tensor]) -> _Seen:
    values = dict[int | str, Any](enumerate(args)) | kwargs
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    simple = all(value is None or isinstance(value, (Tensor, bool, int, float, str)) for value in values.values())
    names = [name for name, value in embeddings.items() for one in tensors.values() if one is value]
    return _Seen(
        inputs={key: (tuple(value.shape), value.requires_grad) for key, value in tensors.items()},
        output=(tuple(output.shape), output.requires_grad) if simple and isinstance(output, Tensor) else None,
        size=output.numel() * output.element_size() if isinstance(output, Tensor) else 0,
        embedding=names[0] if len(names) == len(tensors) == 1 else None,
    )
