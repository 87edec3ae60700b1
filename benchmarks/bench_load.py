"""How long do resume, finish, report, compare and merge take on large runs? python benchmarks/bench_load.py.

The runs are made up: 20,000 images under 1,000 candidates, and 1,281,167 images of which each has 10 of 1,000 classes
as candidates, in 2,000 parts as eight ranks leave them. Scores are random numbers that do not repeat: they compress no
better than those of a network. Of each image, all candidates but the winner are dropped after some draws.

Reports, comparisons and merges are commands of ``diffclf``, each a process of its own: their seconds and their memory
are with those of what they import.

"resume" counts what was decided before as one rank of one, so that all of it is its own, or as one rank of eight;
"finish" is what follows the last image: one file of all parts, calibration, metrics.json and pictures. Both are work
of an evaluation that runs: each is a fork of a process that has imported torch and all else and done nothing. Their
seconds are without those of the imports; their peak memory is with them. "own" is the peak of what is neither a page of
a file (of a library, say) nor was there when the process began: what the step itself takes. Charts are drawn by another
process: its CPU seconds are in the step's, its memory (some 260 MB, for a second or two) is not added.

On a machine with other work, CPU seconds say more than seconds.
"""

import argparse
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import lightning as L
import numpy as np
import pyarrow as pa
import torch

from lightning_diffclf import Candidates, DiffusionClassifier, NoiseSchedule, Recipe
from lightning_diffclf.callbacks.rank_evaluation import RankEvaluation
from lightning_diffclf.callbacks.run_writer import RunWriter
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.predictions import SCHEMA
from lightning_diffclf.results.row_files import PART_SUFFIX, write_part
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import claim
from lightning_diffclf.results.stored import PARTS, SETTINGS_KEY
from lightning_diffclf.results.summary import Outline
from lightning_diffclf.results.trails import CLASSES, KIND, STOPS

DRAWS, RANKS = 100, 8


def outline(classes: int) -> Outline:
    """Of an evaluation in which each class has one candidate."""
    names = tuple(f"class {c}" for c in range(classes))
    timesteps = tuple(np.random.default_rng(0).permutation(1000)[:DRAWS].tolist())
    return Outline(tuple(range(classes)), names, timesteps, proposes=True)


def settings(classes: int, seed: int) -> Settings:
    """Those of a run."""
    found = outline(classes)
    return Settings({"seed": seed}, found.to_info() | {"candidate_names": list(found.class_names)})


def decisions(
    rng: np.random.Generator, ids_B: np.ndarray, labels_B: np.ndarray, rank: int, candidates: int, classes: int
) -> pa.Table:
    """Decisions of a rank on images each of which has ``candidates`` of all ``classes``."""
    shape = images, _ = len(labels_B), candidates
    row_B = np.arange(images)
    steps_BK = rng.integers(1, classes // candidates + 1, shape)  # so that no class comes twice
    candidates_BK = (labels_B[:, None] + steps_BK.cumsum(1) - steps_BK[:, :1]) % classes
    winner_B = np.where(rng.random(images) < 0.7, 0, rng.integers(candidates, size=images))
    draws_BK = np.minimum(4 + rng.exponential(12, shape).astype(np.int64), DRAWS)
    draws_BK[row_B, winner_B] = draws_BK.max(1)
    differences_BK = rng.exponential(0.02, shape)
    differences_BK[row_B, winner_B] = 0
    prediction_B, spent_B = candidates_BK[row_B, winner_B], draws_BK.max(1)
    votes = [answers(rng, candidates_BK, prediction_B, spent_B, agree) for agree in (0.5, 0.9)]
    thumbnails = [rng.bytes(size) if candidates == classes else None for size in rng.integers(1500, 3000, images)]
    columns = {
        "id": ids_B.astype(str).tolist(),
        "label": labels_B,
        "prediction": prediction_B,
        "top5": listed(np.concatenate([prediction_B[:, None], candidates_BK[:, 1:5]], 1)),
        "margin": rng.exponential(5, images),
        "abstained": np.zeros(images, dtype=bool),
        "candidates_K": listed(candidates_BK),
        "scores_K": listed(rng.normal(0.3, 0.05, (images, 1)) + differences_BK),
        "differences_K": listed(differences_BK),
        "draws_K": listed(draws_BK),
        "nfe": draws_BK.sum(1),
        "dims": np.full(images, 4 * 32 * 32),
        "choice_S": votes[0],
        "leader_S": votes[1],
        "seconds": rng.exponential(1, images),
        "rank": np.full(images, rank),
        "thumbnail": thumbnails,
        "error_map": pa.nulls(images),
        "search_nfe": np.zeros(images, dtype=int),
        "dropped_draws": np.zeros(images, dtype=int),
        "trail": trails(rng, candidates_BK[:, :CLASSES]),
        "group": pa.nulls(images),
        "reused": np.zeros(images, dtype=int),
    }
    assert list(columns) == SCHEMA.names, "what is stored has changed"
    arrays = [
        array.cast(field.type) if isinstance(array, pa.Array) else pa.array(array, field.type)
        for field, array in zip(SCHEMA, columns.values(), strict=True)
    ]
    return pa.table(arrays, schema=SCHEMA)


def trails(rng: np.random.Generator, classes_BC: np.ndarray) -> pa.Array:
    """Lines of some classes over the draws: that of the first to the last stop, the others half as far on average."""
    images, lines = classes_BC.shape
    draws_P = np.unique(np.geomspace(1, DRAWS, STOPS).round().astype(int))
    length_BC = rng.integers(1, len(draws_P) + 1, classes_BC.shape)
    length_BC[:, 0] = len(draws_P)
    behind = rng.exponential(0.02, length_BC.sum()).astype(np.float32)
    ends = np.concatenate([[0], length_BC.ravel().cumsum()])
    every = np.arange(images + 1)
    behind_BC = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(behind))
    columns = {
        "draws": listed(np.tile(draws_P, (images, 1))),
        "classes": listed(classes_BC),
        "behind": pa.ListArray.from_arrays(pa.array(every * lines, pa.int32()), behind_BC),
    }
    fields = [KIND.field(name) for name in columns]
    arrays = [array.cast(field.type) for field, array in zip(fields, columns.values(), strict=True)]
    return pa.StructArray.from_arrays(arrays, fields=fields)


def listed(values_BK: np.ndarray) -> pa.Array:
    """A list for each row."""
    ends = np.arange(len(values_BK) + 1) * values_BK.shape[1]
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(values_BK.ravel()))


def answers(
    rng: np.random.Generator, candidates_BK: np.ndarray, prediction_B: np.ndarray, spent_B: np.ndarray, agree: float
) -> pa.Array:
    """For each draw spent on an image a class, which is ``agree`` times the one decided for."""
    row = np.repeat(np.arange(len(spent_B)), spent_B)
    others = candidates_BK[row, rng.integers(candidates_BK.shape[1], size=len(row))]
    values = np.where(rng.random(len(row)) < agree, prediction_B[row], others)
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], spent_B.cumsum()]), pa.int32()), pa.array(values))


def make_run(run: Path, seed: int, images: int, candidates: int, classes: int, parts: int) -> None:
    """A run that was killed when all its images were decided, in random order, as shards have them."""
    its = settings(classes, seed)
    claim(run, its)
    labels = np.random.default_rng(0).integers(classes, size=images)
    rng = np.random.default_rng(seed)
    for part, ids_B in enumerate(np.array_split(rng.permutation(images), parts)):
        number, rank = divmod(part, RANKS)
        table = decisions(rng, ids_B, labels[ids_B], rank, candidates, classes)
        path = run / PARTS / f"{rank:05d}-0123456789ab-{number:06d}{PART_SUFFIX}"
        write_part(table.replace_schema_metadata({SETTINGS_KEY: its.digest.encode()}), path)


def halve(run: Path, halves: list[Path], its: Settings) -> None:
    """Runs that share the files of ``run``, each some of them."""
    for number, half in enumerate(halves):
        (claim(half, its) / PARTS).mkdir()
        for path in sorted((run / PARTS).iterdir())[number :: len(halves)]:
            os.link(path, half / PARTS / path.name)


class Denoiser:
    """What is known of the network that decided; it is not called any more."""

    schedule = NoiseSchedule.linear()

    def __init__(self, names: list[str]) -> None:
        self.candidates = Candidates(names)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def resume(run: Path, ranks: int = 1, finish: bool = False) -> None:
    """What an evaluation does before its first image, as the first of so many ranks, and what after the last one."""
    its = Settings.read(run)
    names, timesteps_S = its.info["candidate_names"], Outline.of(its.info).timesteps_S
    classifier = DiffusionClassifier(Denoiser(names), Recipe(draws=len(timesteps_S)), keep_errors=True)
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.world_size = ranks
    metrics = ClassifierMetrics(Outline.of(its.info))
    options = {"next_free": False, "flush_every": 100, "error_maps": 24, "keep_errors": False, "keep_distances": False}
    writer = RunWriter(trainer, run, its, classifier, **options)
    RankEvaluation(trainer, classifier, metrics, None, None, None, writer)
    if finish:
        writer.finish(metrics.compute(), None)


class Cost(NamedTuple):
    """What a process took."""

    seconds: float
    cpu: float
    megabytes: float  # resident at most
    own: float  # of these, what is no file's, and was not there when it began


def watched(child: int, begin: float) -> tuple[float, float, float, float]:
    """Wait for a process that began at ``begin``: its cost. Looks every hundredth of a second what memory it has."""
    anonymous, ended = list[float](), 0
    while not ended:
        with open(f"/proc/{child}/status") as file:
            anonymous += [int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon")]
        time.sleep(0.01)
        ended, status, used = os.wait4(child, os.WNOHANG)
    if status != 0:
        raise SystemExit("the step failed")
    own = max(anonymous) - anonymous[0] if anonymous else 0.0
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, own


def forked(work: Callable[[], object]) -> Cost:
    """Of ``work`` in a fork, which prints nothing."""
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return Cost(*watched(child, begin))


# A process counts the memory of the one that began it as its own: one in between, which has imported little.
BETWEEN = f"""
import json, os, subprocess, sys, time
{inspect.getsource(watched)}
begin = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
print(json.dumps(watched(child.pid, begin)))
"""


def python(*args: str) -> Cost:
    """Of a process of its own, which prints nothing."""
    command = [sys.executable, "-c", BETWEEN, sys.executable, *args]
    return Cost(*json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def diffclf(*args: str | Path) -> Cost:
    """Of a command."""
    return python("-m", "lightning_diffclf", *map(str, args))


def make(folder: Path, *sizes: int) -> None:
    """``a`` and ``b``, two runs on the same images; ``first`` and ``second``, the halves of ``a``, and ``copy``."""
    its = settings(sizes[2], 0)
    for seed, name in enumerate(("a", "b")):
        make_run(folder / name, seed, *sizes)
    halve(folder / "a", [folder / "first", folder / "second"], its)
    halve(folder / "a", [folder / "copy"], its)


def steps(folder: Path) -> dict[str, Callable[[], Cost]]:
    """What is measured, in an order in which each leaves what the next needs."""
    a, b, first, second, copy, whole = (folder / name for name in ("a", "b", "first", "second", "copy", "whole"))
    return {
        "report": lambda: diffclf("report", a),
        "compare": lambda: diffclf("compare", a, b),
        "merge two halves": lambda: diffclf("merge", first, second, "--out", whole),
        "report of one file": lambda: diffclf("report", whole),
        "resume": lambda: forked(lambda: resume(a)),
        "resume, one rank of eight": lambda: forked(lambda: resume(a, ranks=8)),
        "resume from one file, one rank of eight": lambda: forked(lambda: resume(whole, ranks=8)),
        "resume and finish": lambda: forked(lambda: resume(copy, finish=True)),
    }


def measure(folder: Path, images: int, candidates: int, classes: int, parts: int) -> None:
    """Print the table of one size."""
    forked(lambda: make(folder, images, candidates, classes, parts))
    print(f"\n{images:,} images, {candidates:,} of {classes:,} candidates each, {parts:,} parts\n")
    print("| what | s | CPU, s | peak, MB | own, MB |\n" + "| --- " * 5 + "|")
    imports = {
        "imports of the commands": lambda: python("-c", "import lightning_diffclf.commands.results"),
        "imports of an evaluation": lambda: python("-c", "import lightning_diffclf.callbacks.rank_evaluation"),
        "a fork that does nothing": lambda: forked(lambda: None),
    }
    for what, work in (imports | steps(folder)).items():
        seconds, cpu, megabytes, own = work()
        print(f"| {what} | {seconds:.1f} | {cpu:.1f} | {megabytes:.0f} | {own:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, usual in (("images", [20_000, 1_281_167]), ("candidates", [1000, 10]), ("classes", [1000, 1000])):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=usual)
    parser.add_argument("--parts", type=int, nargs="+", default=[2000, 2000])
    parser.add_argument("--folder", type=Path, help="for the runs, some 2 GB; a temporary one if omitted")
    given = parser.parse_args()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "pyarrow"))
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, {versions}")
    print(f"{os.cpu_count()} cores, on which {os.getloadavg()[0]:.0f} processes ran when it began", flush=True)
    for sizes in zip(given.images, given.candidates, given.classes, given.parts, strict=True):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            measure(Path(folder), *sizes)


if __name__ == "__main__":
    main()
