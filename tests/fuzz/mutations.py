"""Damages to bytes and to plain values, each by a seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def rounds(usual: int) -> int:
    """How many inputs to try: ``usual``, times the environment variable DIFFCLF_FUZZ (1000 runs for hours)."""
    return usual * int(os.environ.get("DIFFCLF_FUZZ", "1"))


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes as a bad disk or a broken transfer leaves them; never the same."""
    found = content
    while found == content:
        kind = rng.choice(["bit", "byte", "bytes", "zeros", "cut", "gap", "insert", "copy", "swap"])
        place = int(rng.integers(len(content)))
        length = int(min(rng.choice([1, 8, 64, 512, 4096]), len(content) - place))
        found_ = bytearray(content)
        match kind:
            case "bit":
                found_[place] ^= 1 << int(rng.integers(8))
            case "byte":
                found_[place] = int(rng.integers(256))
            case "bytes":
                found_[place : place + length] = rng.bytes(length)
            case "zeros":
                found_[place : place + length] = bytes(length)
            case "cut":
                del found_[place:]
            case "gap":
                del found_[place : place + length]
            case "insert":
                found_[place:place] = rng.bytes(length)
            case "copy":
                other = int(rng.integers(len(content)))
                found_[place : place + length] = content[other : other + length]
            case "swap":
                other = int(rng.integers(len(content)))
                a, b = content[place : place + length], content[other : other + length]
                found_[place : place + length], found_[other : other + length] = b, a
        found = bytes(found_)
    return found


STRANGE: Sequence[Any] = (
    None, True, False, 0, 1, -1, 2, 10**6, 10**12, 2**63, -(2**63), 10**20, 0.0, -0.0, 0.5, 1.5, -1e-9, 1e308,
    float("nan"), float("inf"), -float("inf"), "", " ", "0", "a", "\0", "é", "\ud800", "[red]a[/red]", "{}", "a" * 1000,
    "../x", "/dev/null", "pipe:id", "http://x", b"bytes", [], [0], [[]], [None], (), {}, {"a": 1}, set(), object(),
    int, lambda: 0,
)  # fmt: skip


def strange_text(rng: np.random.Generator) -> str:
    """Text with characters that matter to parsers."""
    letters = [*"ab01 \t\n,;:\"'{}[]()<>&%$#@!?*|/\\.-_=+~`^\0\x07éß漢😀\ufeff\u202e"]
    return "".join(rng.choice(letters, int(rng.integers(0, 40))))


def mutated(value: Any, rng: np.random.Generator) -> Any:
    """A value of nested lists and mappings with one part changed for something strange."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        name = list(value)[int(rng.integers(len(value)))]
        match int(rng.integers(5)):
            case 0:
                return {key: one for key, one in value.items() if key != name}
            case 1:
                return value | {strange_text(rng): value[name]}
        return value | {name: mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = int(rng.integers(len(value)))
        match int(rng.integers(4)):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value * 2
        return [mutated(one, rng) if i == place else one for i, one in enumerate(value)]
    return strange_text(rng) if rng.random() < 0.3 else STRANGE[int(rng.integers(len(STRANGE)))]
