"""What bench_load.py measures in processes of their own: folders of large evaluations, and how one is resumed.

``load_runs.py make FOLDER --images 20000`` makes the folders. Decisions are made up, from random numbers that do not
repeat: they compress no better than those of a network. Of each image, all candidates but the winner are dropped after
some draws. ``FOLDER/a`` and ``FOLDER/b`` are two runs on the same images, killed before they ended; ``FOLDER/first``
and ``FOLDER/second`` are the halves of ``a``.

``load_runs.py resume RUN`` does what an evaluation does before its first image, with ``--finish`` also what it does
after the last one.
"""

import argparse
import os
from pathlib import Path

import lightning as L
import numpy as np
import pyarrow as pa
import torch

from lightning_diffclf import Candidates, DiffusionClassifier, NoiseSchedule, Recipe
from lightning_diffclf.callbacks.rank_evaluation import RankEvaluation
from lightning_diffclf.callbacks.run_writer import RunWriter
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.predictions import SCHEMA, write_table
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import PARTS, SETTINGS_KEY, claim
from lightning_diffclf.results.summary import Outline

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
    }
    arrays = [
        array.cast(field.type) if isinstance(array, pa.Array) else pa.array(array, field.type)
        for field, array in zip(SCHEMA, columns.values(), strict=True)
    ]
    return pa.table(arrays, schema=SCHEMA)


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


def make(run: Path, seed: int, images: int, candidates: int, classes: int, parts: int) -> None:
    """A run that was killed when all its images were decided, in random order, as shards have them."""
    its = settings(classes, seed)
    claim(run, its)
    labels = np.random.default_rng(0).integers(classes, size=images)
    rng = np.random.default_rng(seed)
    for part, ids_B in enumerate(np.array_split(rng.permutation(images), parts)):
        number, rank = divmod(part, RANKS)
        table = decisions(rng, ids_B, labels[ids_B], rank, candidates, classes)
        path = run / PARTS / f"{rank:05d}-0123456789ab-{number:06d}.parquet"
        write_table(table.replace_schema_metadata({SETTINGS_KEY: its.digest.encode()}), path)


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


def resume(run: Path, ranks: int, finish: bool) -> None:
    """Count what was decided before, as the first of so many ranks; of the last image on, if asked for, the rest."""
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


def main() -> None:
    parser = argparse.ArgumentParser()
    work = parser.add_subparsers(dest="work", required=True)
    making = work.add_parser("make")
    making.add_argument("folder", type=Path)
    for name, usual in (("images", 20_000), ("candidates", 1000), ("classes", 1000), ("parts", 2000)):
        making.add_argument(f"--{name}", type=int, default=usual)
    resuming = work.add_parser("resume")
    resuming.add_argument("run", type=Path)
    resuming.add_argument("--ranks", type=int, default=1)
    resuming.add_argument("--finish", action="store_true")
    given = parser.parse_args()
    if given.work == "resume":
        resume(given.run, given.ranks, given.finish)
        return
    for seed, name in enumerate(("a", "b")):
        make(given.folder / name, seed, given.images, given.candidates, given.classes, given.parts)
    halve(given.folder / "a", [given.folder / "first", given.folder / "second"], settings(given.classes, 0))


if __name__ == "__main__":
    main()
