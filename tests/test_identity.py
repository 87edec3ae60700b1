"""What is the same and what is not: every kind of value, in every process."""

import dataclasses
import enum
import functools
import json
import random
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_diffclf import LikelihoodRatio, PairedTest, Stages
from lightning_diffclf.classifier import Elimination, Recipe
from lightning_diffclf.identity import (
    ByArguments,
    arguments_identity,
    digest_of_tensor,
    digest_of_weights,
    identity_of,
)

SCALE = 2


class Colour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: float
    label: str = "a"


class Plain:
    def __init__(self, **attributes: object) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x: object) -> None:
        self.x = x


class Caching(Plain):
    @functools.cached_property
    def expensive(self) -> int:
        return random.randrange(1000)


class CustomRule(Elimination):
    """A user's rule, without ``__repr__``."""

    def __init__(self, share: float) -> None:
        self._share = share


class Says:
    def __init__(self, what: object) -> None:
        self.what = what

    def identity(self) -> object:
        return self.what


def closing_over(value):
    return lambda images: images * value


def uses_a_global(images):
    return images * SCALE


def recursive(n):
    return recursive(n - 1) if n else 0


def network(inplace: bool = False, gain: float = 1.0) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace), nn.BatchNorm1d(4))
    net[0].weight.data.mul_(gain)
    return net


def same_and_other():
    """(a thing, the same thing made again, others of its kind)."""
    big = torch.arange(1000, dtype=torch.float32).reshape(10, 100)
    return {
        "none": (None, None, [0, False]),
        "numbers": (1.5, 1.5, [1.25, float("nan"), float("inf"), "1.5"]),
        "not a number": (float("nan"), float("nan"), [float("inf")]),
        "strings": ("a", "a", ["b", ""]),
        "enums": (Colour.RED, Colour.RED, [1, "RED"]),
        "paths": (Path("a/b"), Path("a") / "b", [Path("a")]),
        "bytes": (b"ab", bytes([97, 98]), [b"ac"]),
        "dtypes": (torch.float16, torch.float16, [torch.bfloat16]),
        "sequences": ([1, 2], (1, 2), [[2, 1], [1], [[1, 2]]]),
        "long sequences": (list(range(100)), tuple(range(100)), [range(101), [0, *range(99)]]),
        "sets": ({"a", "b", "c"}, frozenset("cba"), [{"a", "b"}]),
        "mappings": ({"a": 1, "b": 2}, {"b": 2, "a": 1}, [{"a": 1}, {"a": 1, "b": 3}]),
        "keys of all kinds": ({1: "a", "1": "b"}, {"1": "b", 1: "a"}, [{1: "b", "1": "a"}, {"1": "a"}]),
        "small tensors": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), [torch.tensor([1.0, 3.0])]),
        "large tensors": (big, big.t().contiguous().t(), [big + 1, big.reshape(100, 10), big.double(), big.int()]),
        "half precision": (big.bfloat16(), big.bfloat16(), [big.half()]),
        "arrays": (np.arange(100), np.arange(200)[:100], [np.arange(100.0), np.arange(100)[::-1]]),
        "arrays of strings": (np.array(["a", "b"]), np.array(["a", "b"]), [np.array(["a", "c"])]),
        "functions": (closing_over, closing_over, [uses_a_global, recursive, len]),
        "lambdas": (lambda x: x + 1, lambda x: x + 1, [lambda x: x + 2, lambda x: x - 1, lambda x, y=1: x + 1]),
        "closures": (closing_over(2), closing_over(2), [closing_over(0), closing_over(None), closing_over(False)]),
        "closures over tensors": (closing_over(big), closing_over(big.clone()), [closing_over(big * 2)]),
        "constants that are sets": (lambda x: x in {"a", "b"}, lambda x: x in {"b", "a"}, [lambda x: x in {"a", "c"}]),
        "partials": (
            functools.partial(closing_over, 2),
            functools.partial(closing_over, 2),
            [functools.partial(closing_over, 3), functools.partial(closing_over, value=2), closing_over],
        ),
        "methods": (Says(1).identity, Says(1).identity, [Says(2).identity]),
        "built in": (len, len, [max, torch.relu]),
        "bound to built-in objects": ([1].append, [1].append, [[2].append]),
        "ufuncs": (np.exp, np.exp, [np.log]),
        "patterns": (re.compile("a+"), re.compile("a+"), [re.compile("a+", re.IGNORECASE), re.compile("a")]),
        "classes": (Point, Point, [Plain]),
        "dataclasses": (Point(1.0), Point(1.0, "a"), [Point(2.0), Point(1.0, "b")]),
        "objects": (Plain(a=1), Plain(a=1), [Plain(a=2), Plain(b=1), Plain(), Caching(a=1)]),
        "private attributes": (Plain(_a=1), Plain(_a=1), [Plain(_a=2)]),
        "objects in objects": (Plain(a=Plain(b=[1])), Plain(a=Plain(b=[1])), [Plain(a=Plain(b=[2]))]),
        "slots": (Slotted(1), Slotted(1), [Slotted(2)]),
        "random states": (random.Random(1), random.Random(1), [random.Random(2)]),
        "networks": (network(), network(), [network(gain=2.0), network(inplace=True), network()[0]]),
        "what says its own": (Says({"a": 1}), Says({"a": 1}), [Says({"a": 2}), Says("a")]),
        "rules": (CustomRule(0.5), CustomRule(0.5), [CustomRule(0.25), Elimination(), Stages(), PairedTest()]),
        "rules of ours": (LikelihoodRatio(0.01), LikelihoodRatio(), [LikelihoodRatio(0.02), PairedTest()]),
    }


@pytest.mark.parametrize("kind", same_and_other())
def test_the_same_is_the_same_and_others_are_not(kind):
    thing, again, others = same_and_other()[kind]
    identity = identity_of(thing)
    assert identity == identity_of(again)
    assert json.loads(json.dumps(identity)) == identity  # plain values
    assert "0x" not in json.dumps(identity)
    texts = [json.dumps(identity_of(one), sort_keys=True) for one in (thing, *others)]
    assert len(set(texts)) == len(texts)


def test_every_process_says_the_same():
    """Expected values from another process; strings are hashed with another seed in each."""
    values = {
        "set": set("abcdefgh"),
        "array": np.arange(100.0),
        "weights": torch.ones(3, 40),
        1: [Path("a"), Colour.RED],
    }
    assert identity_of(values) == [
        ["array", "7ec05022b4919982"],
        ["set", ["a", "b", "c", "d", "e", "f", "g", "h"]],
        ["weights", "a9f241e904982a6d"],
        [1, ["a", "tests.test_identity.Colour.RED"]],
    ]


def test_the_order_of_a_set_in_code_does_not_matter():
    def contains(x):
        return x in {0, 8}

    orders = [frozenset([0, 8]), frozenset([8, 0])]  # as they happen to be stored
    assert list(orders[0]) != list(orders[1])
    found = []
    for order in orders:
        constants = tuple(order if isinstance(one, frozenset) else one for one in contains.__code__.co_consts)
        contains.__code__ = contains.__code__.replace(co_consts=constants)
        found.append(identity_of(contains))
    assert found[0] == found[1]


def test_globals_that_a_function_names_are_part_of_it(monkeypatch):
    before = identity_of(uses_a_global)
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3)
    assert identity_of(uses_a_global) != before


def test_what_is_computed_once_is_no_part():
    thing = Caching(a=1)
    before = identity_of(thing)
    assert thing.expensive >= 0
    assert identity_of(thing) == before


def test_what_holds_itself_comes_to_an_end():
    one, two = Plain(), Plain()
    one.me, two.me = one, two
    assert identity_of(one) == identity_of(two)
    two.me = Plain(me=None)
    assert identity_of(one) != identity_of(two)


@pytest.mark.parametrize("thing", [threading.Lock(), (n for n in range(3))])
def test_what_cannot_be_told_from_another_is_refused(thing):
    with pytest.raises(ValueError, match=r"in a Plain cannot be told from another; give what holds it a method"):
        identity_of(Plain(part=thing))


def test_pictures_of_networks_have_no_addresses():
    class Shown(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation = lambda x: x

        def extra_repr(self):
            return f"activation={self.activation}"

    assert identity_of(Shown()) == identity_of(Shown())


# --- weights ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 49_999), st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool]))
def test_one_value_anywhere_changes_the_digest(position, dtype):
    values = torch.zeros(50_000, dtype=dtype)
    before = digest_of_tensor(values)
    values[position] = 1
    assert digest_of_tensor(values) != before


def test_signs_order_and_names_change_the_digest():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    flipped = values.clone()
    flipped[[3, 5]] *= -1
    assert len({digest_of_tensor(one) for one in (values, flipped, -values, values.flip(0), values[:999])}) == 5
    a, b = nn.Module(), nn.Module()
    for module, names in ((a, "xy"), (b, "yx")):
        for name, value in zip(names, (1.0, 2.0), strict=True):
            module.register_buffer(name, torch.tensor(value))
    assert digest_of_weights(a) != digest_of_weights(b)
    assert digest_of_weights(a, b) != digest_of_weights(b, a)


def test_large_and_empty_tensors_and_memory_formats():
    values = torch.arange(5_000_000, dtype=torch.float32)  # more than one chunk
    other = values.clone()
    other[-1] += 1
    assert digest_of_tensor(values) != digest_of_tensor(other)
    assert digest_of_tensor(torch.empty(0)) != digest_of_tensor(torch.empty(0, 3))
    photo = torch.randn(2, 3, 4, 4)
    assert digest_of_tensor(photo.to(memory_format=torch.channels_last)) == digest_of_tensor(photo)
    assert digest_of_tensor(photo[:, 1]) == digest_of_tensor(photo[:, 1].clone())


# --- arguments -------------------------------------------------------------------------------------------------------


class Kept(ByArguments):
    CANNOT_CHANGE_RESULTS = {"workers": "only how fast files are read"}  # noqa: RUF012

    def __init__(self, size: int, workers: int = 0, **more: object) -> None:
        self.hparams = {"size": size, "workers": workers, "_instantiator": "of Lightning", **more}

    def contents(self):
        return {"files": ["a.png"]}


def test_arguments_are_the_identity_but_for_those_that_cannot_matter():
    assert Kept(8).identity() == {"class": f"{__name__}.Kept", "size": 8, "files": ["a.png"]}
    assert Kept(8, workers=4).identity() == Kept(8).identity()
    assert Kept(9).identity() != Kept(8).identity() != Kept(8, crop=2).identity()
    with pytest.raises(ValueError, match=r"Kept did not keep \['workers'\], expected all arguments in hparams"):
        arguments_identity(Kept(8), {"size": 8}, {})


def test_an_argument_of_the_recipe_that_has_no_identity_is_refused():
    with pytest.raises(ValueError, match=r"lock.* cannot be told from another"):
        Recipe(proposal=closing_over(threading.Lock())).identity()
