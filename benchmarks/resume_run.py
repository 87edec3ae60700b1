"""Resume a run of make_runs.py, of which all images are decided: python benchmarks/resume_run.py RUN [--finish]."""

import argparse
from pathlib import Path

import lightning as L
import torch

from lightning_diffclf import Candidates, DiffusionClassifier, NoiseSchedule, Recipe
from lightning_diffclf.callbacks.rank_evaluation import RankEvaluation
from lightning_diffclf.callbacks.run_writer import RunWriter
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.summary import Outline


class Denoiser:
    """What is known of the network that decided; it is not called any more."""

    schedule = NoiseSchedule.linear()

    def __init__(self, names: list[str]) -> None:
        self.candidates = Candidates(names)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--ranks", type=int, default=1, help="be the first of so many")
    parser.add_argument("--finish", action="store_true")
    given = parser.parse_args()
    settings = Settings.read(given.run)
    outline = Outline.of(settings.info)
    classifier = DiffusionClassifier(
        Denoiser(settings.info["candidate_names"]), Recipe(draws=len(outline.timesteps_S)), keep_errors=True
    )
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    trainer.strategy.world_size = given.ranks  # of what was decided before, a rank counts its own
    metrics = ClassifierMetrics(outline)
    writer = RunWriter(
        trainer, given.run, settings, classifier,
        next_free=False, flush_every=100, error_maps=24, keep_errors=False, keep_distances=False,
    )
    RankEvaluation(trainer, classifier, metrics, None, None, None, writer)
    if given.finish:
        writer.finish(metrics.compute(), None)


if __name__ == "__main__":
    main()
