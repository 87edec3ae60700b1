"""JSON files of others: read, and told what is wrong with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lightning_diffclf.errors import UserError


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds.

    Args:
        path: The file.
        what: What it belongs to, for messages.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # RecursionError: nested too deeply
        raise UserError(f"{what}: {str(path)!r} cannot be read ({str(error)[:200]})") from error


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number from 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
