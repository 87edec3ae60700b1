"""``diffclf fid``: how good generated images are."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.commands.running import progress
from lightning_diffclf.results.sample_quality import (
    PUBLISHED,
    Extractor,
    Features,
    cache_file,
    features_of,
    find_pictures,
    inception,
    joined,
    load_features,
    sample_quality,
    save_features,
)


def fid_command(args: Sequence[str]) -> None:
    """``diffclf fid``: FID, Inception Score, precision and recall of a folder of images."""
    parser = Parser(
        prog="diffclf fid",
        description="FID, Inception Score, precision and recall of generated images with regard to real ones. Features "
        "of the real ones are kept in a file beside their folder.",
    )
    parser.add_argument("folder", type=str, help="generated images, also in folders below")
    parser.add_argument("--reference", type=str, required=True, help="real images, or a file of features of them")
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="file of the Inception network (default: it is downloaded)",
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images at once")
    parser.add_argument("--device", type=str, default="auto", help="cuda, cpu, …")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(list(args))
    if given.batch_size < 1:
        raise ValueError(f"batch_size: {given.batch_size}, expected at least 1")
    generated, reference = find_pictures(given.folder), Path(given.reference)
    real = [] if reference.suffix == ".npz" else find_pictures(given.reference)
    cached = reference if reference.suffix == ".npz" else cache_file(real, given.reference)
    if not cached.is_file() and not real:
        raise ValueError(f"reference: no file {given.reference!r}")
    automatic = "cuda" if torch.cuda.is_available() else "cpu"
    extract = inception(given.weights, torch.device(automatic if given.device == "auto" else given.device))
    if cached.is_file():
        of_real = load_features(cached)
    else:
        of_real = extracted(real, extract, given.batch_size, "real images")
        save_features(of_real, cached)
    found = sample_quality(extracted(generated, extract, given.batch_size, "generated images"), of_real)
    if min(found.images, found.reference_images) < PUBLISHED:
        print(
            f"warning: FID of {found.images} images with regard to {found.reference_images} is larger than that of "
            f"{PUBLISHED:,}, with which it is reported",
            file=sys.stderr,
        )
    if given.json:
        print(json.dumps(asdict(found)))
        return
    table = Table(title=f"{given.folder} with regard to {given.reference}", show_header=False)
    for name, value in asdict(found).items():
        table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    Console(soft_wrap=True).print(table)


def extracted(paths: Sequence[Path], extract: Extractor, batch_size: int, what: str) -> Features:
    """Features of images, with a progress bar."""
    parts = []
    with progress() as bar:
        task = bar.add_task(what, total=len(paths))
        for part in features_of(paths, extract, batch_size):
            parts.append(part)
            bar.advance(task, len(part.values))
    return joined(parts)
