"""Files that come with the package: configurations, and the tiny text-to-image model and CLIP."""

from __future__ import annotations

from pathlib import Path


def shipped(name: str) -> Path:
    """Where ``configs``, ``assets/sd_digits`` and the like are: within the package, or beside it in a clone."""
    package = Path(__file__).resolve().parent
    within = package / name
    return within if within.exists() else package.parent / name
