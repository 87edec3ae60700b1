"""``diffclf fid``: how good generated images are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_diffclf.commands.running import progress
from lightning_diffclf.errors import UserError, check_at_least, first_line
from lightning_diffclf.results.sample_quality import (
    PUBLISHED,
    Extractor,
    Features,
    Reference,
    cache_file,
    check_writable,
    digest_of,
    features_of,
    find_pictures,
    inception,
    is_kept,
    joined,
    load_reference,
    sample_quality,
    save_reference,
)


def fid_command(given: Namespace) -> None:
    """``diffclf fid``: FID, Inception Score, precision and recall of a folder of images."""
    check_at_least(1, batch_size=given.batch_size, size=given.size)
    device, generated = usable_device(given.device), find_pictures(given.folder)
    if given.reference.endswith(".npz"):
        for name in ("size", "stats"):
            if given[name] is not None:
                raise UserError(f"{name}: {given[name]!r} needs a folder of real images, found {given.reference!r}")
        of_real = load_reference(Path(given.reference))
        extract = inception(given.weights, device)
    else:
        real = find_pictures(given.reference)
        kept = Path(given.stats) if given.stats else cache_file(given.reference)
        digest = digest_of(real, given.reference, given.size)
        known = is_kept(kept, digest)
        if not known:
            check_writable(kept)
        extract = inception(given.weights, device)
        if known:
            of_real = load_reference(kept)
        else:
            of_real = Reference.of(extracted(real, extract, given.batch_size, given.size, "real images").values)
            save_reference(of_real, digest, kept)
    found = sample_quality(extracted(generated, extract, given.batch_size, None, "generated images"), of_real)
    few = min(found.images, PUBLISHED if found.reference_images is None else found.reference_images)
    if few < PUBLISHED:
        print(
            f"warning: with {few:,} images FID is larger than with {PUBLISHED:,}, for which it is reported: compare it "
            "among equal numbers only",
            file=sys.stderr,
        )
    if given.json:
        print(json.dumps(asdict(found)))
        return
    table = Table(title=escape(f"{given.folder} with regard to {given.reference}"), show_header=False)
    for name, value in asdict(found).items():
        text = "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), text)
    Console(soft_wrap=True).print(table)


def usable_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is a GPU where there is one.

    Raises:
        ValueError: if there is none of this name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name!r} cannot be used ({first_line(error)})") from error


def extracted(paths: Sequence[Path], extract: Extractor, batch_size: int, size: int | None, what: str) -> Features:
    """Features of images, with a progress bar."""
    parts = []
    with progress() as bar:
        task = bar.add_task(what, total=len(paths))
        for part in features_of(paths, extract, batch_size, size):
            parts.append(part)
            bar.advance(task, len(part.values))
    return joined(parts)
