"""DiffusionClassifierCallback: a thin Lightning shell over classifier/ that classifies what a Trainer evaluates."""

from __future__ import annotations

import sys
from collections.abc import Sized
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import IterableDataset

from lightning_diffclf.callbacks.pictures import log_picture
from lightning_diffclf.callbacks.plan import Planner
from lightning_diffclf.callbacks.probe import ProbeFitting
from lightning_diffclf.callbacks.rank_evaluation import RankEvaluation
from lightning_diffclf.callbacks.run_settings import run_settings
from lightning_diffclf.callbacks.run_writer import RunWriter
from lightning_diffclf.callbacks.sharding import batches_within_limit, images_on_this_rank, parse_part, the_loader
from lightning_diffclf.classifier import (
    Classification,
    DiffusionClassifier,
    DiscriminativeClassifier,
    Exhaustive,
    Recipe,
)
from lightning_diffclf.classifier.conformal import check_images
from lightning_diffclf.classifier.discriminative import Classifier
from lightning_diffclf.data.corruptions import Corruption
from lightning_diffclf.data.protocols import HasScore, NeedsEveryDraw
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.discriminative import Discriminative
from lightning_diffclf.errors import FailedWrite, UserError, WrongType, check_at_least
from lightning_diffclf.results.conformal import CalibrationRun
from lightning_diffclf.results.errors import ErrorsInfo
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.plan import Plan
from lightning_diffclf.results.reuse import Reused
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.summary import Outline


class DiffusionClassifierCallback(L.Callback):
    """Classifies what ``validate``, ``test``, ``predict`` and the validation of ``fit`` see, by its denoising error.

    Works with any LightningModule that is a :class:`~lightning_diffclf.denoiser.ConditionalDenoiser`, or gives logits
    (:class:`~lightning_diffclf.discriminative.Discriminative`: CLIP, classifiers of timm), and with batches as
    :func:`~lightning_diffclf.data.batch.unpack` describes. Images without ids are keyed by a digest of their values.
    The network runs in the Trainer's precision, with averaged weights where an EMA callback puts them in place. Every
    image counts once, also when a DistributedSampler pads its shards.

    Logged as ``diffclf/…``: ``accuracy`` (top-1), ``top5``, ``mean_per_class`` (over classes that occur), ``nll``,
    ``brier`` and ``ece`` of the posterior (natural logarithm; 15 bins), ``nfe_per_image``, ``images``, ``seconds`` and
    ``images_per_second``. With ``abstain`` also ``coverage``, the share of images with an answer, and
    ``answered_accuracy`` among them; with a ``proposal`` also ``proposal_recall``, the share of images whose class it
    named, ``kept_per_image``, ``search_nfe_per_image``, ``contest_nfe_per_image`` and ``dropped_draws``.

    A :class:`~.linear_probe.LinearProbe` or :class:`~.covariance_search.CovarianceSearch` that was not fitted is fitted
    to the training images of the data module (:class:`~lightning_diffclf.data.protocols.HasTrainingImages`) before the
    first image, and kept in ``output_dir``; validation during ``fit`` does without it.

    Args:
        microbatch: Rows (image, candidate, draw) of one network call. Does not change results.
        compile: Compile the network for micro-batches of one size; pays in long evaluations.
        fit_images: Images that validation during ``fit`` classifies, over all ranks; None for all, 0 for none.
        every_n_validations: Classify in every n-th validation of ``fit``.
        output_dir: Folder for ``predictions.parquet``, ``metrics.json`` and pictures, outside ``fit``; nothing is
            written if omitted. Results of the same settings that it already holds are resumed: finished images are
            skipped. Of other settings, they are an error.
        next_free: In place of that error, use the next free of ``…-2``, ``…-3``.
        part: ``i/n``: outside ``fit``, classify only the i-th of n parts of the images, 1 … n, in a folder of its own.
            Parts are about equal and depend on ids only; ``diffclf merge`` joins them.
        corruption: ``KIND/SEVERITY``: outside ``fit``, make the images worse first
            (:class:`~lightning_diffclf.data.corruptions.Corruption`), whatever the data are: ``gaussian_noise/3``.
        flush_every: Images after which decisions are written to the disk, at most; also after a minute. What a kill
            may cost.
        error_maps: Of so many wrongly decided images, also find out where in the image the class decided for fits
            better than the right one: 32 more network calls each, not counted as theirs.
        keep_errors: Write the error of every (image, candidate, draw) to ``errors.parquet`` as well, outside ``fit``:
            4 bytes each before compression. ``diffclf replay`` tries elimination rules and weights on them.
        keep_distances: Write the distances between the candidates' predictions to ``errors.parquet`` as well, which
            :class:`~.elimination.LikelihoodRatio` needs to be replayed: K - 1 bytes for each error.
        reuse: Folder of an evaluation by the same network of the same data whose errors were kept: they are taken in
            place of network calls, outside ``fit``. Its draws must begin as these do (``grid``). Elimination, weights,
            candidates and the rest of the recipe may differ. ``nfe`` counts new calls only.
        calibration: Folder of an evaluation of other labelled images by the same network and recipe, which conformal
            sets (``coverage``) are calibrated on, outside ``fit``. If omitted, those of an image are calibrated on
            other images of this evaluation.
        plan: Only measure what an evaluation will cost, outside ``fit``: on the first batch, for some twenty seconds.
            Prints a table and writes nothing else.
        plan_file: JSON file for the numbers of the plan.
        name: Prefix of what is logged; give each a name of its own to use two of these callbacks.
        **recipe: What decides results: the arguments of :class:`~lightning_diffclf.classifier.Recipe`.

    Attributes:
        recipe: What decides results.
        results: Decisions of this rank in the last evaluation, without errors and distances, some 16 bytes a
            candidate; empty where they were written, which is to be read with
            :func:`~lightning_diffclf.results.stored.scan`.
        metrics: Metrics of the last evaluation over all ranks; empty without labels.
        fitting: What fits the probe of the recipe to training images, where it has to be.
        planned: What the last evaluation would have cost, after a run with ``plan``; else None.

    Raises:
        TypeError: from ``setup``, if the module is no ConditionalDenoiser.
        ValueError: if a setting is out of range (some only from ``setup``, when the module is known), or a label
            belongs to no candidate.
    """

    def __init__(
        self,
        *,
        microbatch: int = 256,
        compile: bool = False,
        fit_images: int | None = 128,
        every_n_validations: int = 1,
        output_dir: str | None = None,
        next_free: bool = False,
        part: str | None = None,
        corruption: str | None = None,
        flush_every: int = 100,
        error_maps: int = 24,
        keep_errors: bool = False,
        keep_distances: bool = False,
        reuse: str | None = None,
        calibration: str | None = None,
        plan: bool = False,
        plan_file: str | None = None,
        name: str = "diffclf",
        **recipe: Any,
    ) -> None:
        check_at_least(1, microbatch=microbatch, every_n_validations=every_n_validations, flush_every=flush_every)
        check_at_least(0, fit_images=fit_images, error_maps=error_maps)
        if keep_distances and not keep_errors:
            raise UserError("keep_distances: distances are written beside errors, expected keep_errors as well")
        self.recipe = Recipe(**recipe)
        if calibration is not None and self.recipe.coverage is None:
            raise UserError("calibration: given without a coverage, expected one, such as 0.9")
        if plan_file is not None and not plan:
            raise UserError(f"plan_file: {plan_file!r}, but nothing is planned; expected plan as well")
        self.reuse, self.calibration, self.plan_file = reuse, calibration, plan_file
        self.microbatch, self.compile, self.plan, self.name = microbatch, compile, plan, name
        self.fit_images, self.every_n_validations = fit_images, every_n_validations
        self.part, self._part = part, None if part is None else parse_part(part)
        self.corruption = None if corruption is None else Corruption.parse(corruption)
        if output_dir is not None and (not output_dir.strip() or "\0" in output_dir):
            raise UserError(f"output_dir: {output_dir!r}, expected the name of a folder, or null")
        self.output_dir, self.next_free, self.flush_every = output_dir, next_free, flush_every
        self.error_maps, self.keep_errors, self.keep_distances = error_maps, keep_errors, keep_distances
        self.results: list[Classification] = []
        self.metrics: dict[str, float] = {}
        self.planned: Plan | None = None
        self._validations = 0  # seen in this fit
        self.fitting: ProbeFitting | None = None
        self._planner: Planner | None = None
        self._evaluation: RankEvaluation | None = None  # that is running
        self._writer: RunWriter | None = None  # of the last evaluation

    @property
    def state_key(self) -> str:
        return f"DiffusionClassifierCallback.{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.classifier, recipe = self._classifier_of(trainer, pl_module, stage), self.recipe
        candidates = self.classifier.candidates
        if recipe.candidates is not None and not all(0 <= c < len(candidates) for c in recipe.candidates):
            raise UserError(f"candidates: {recipe.candidates}, expected indices in 0 … {len(candidates) - 1}")
        data, rule = getattr(trainer, "datamodule", None), self.classifier.rule
        exhaustive = type(rule) is Exhaustive and recipe.budget is None
        if stage != "fit" and isinstance(data, NeedsEveryDraw) and data.needs_every_draw and not exhaustive:
            raise UserError(
                f"{type(data).__name__}: its score compares errors across images and candidates, which is fair only "
                f"over the same draws; found {rule}, budget {recipe.budget}, expected neither"
            )
        self._calibrated: CalibrationRun | None = None
        if self.calibration is not None and recipe.coverage is not None and stage != "fit":
            self._calibrated = CalibrationRun.read(self.calibration, recipe.coverage, recipe.coverage_by_class)
        conformal = None if self._calibrated is None else self._calibrated.conformal
        self.outline = Outline.of_classifier(self.classifier, conformal)
        self._metrics = ClassifierMetrics(self.outline)
        # On the module, so that Lightning moves them to its device. They have no parameters and save nothing.
        pl_module.add_module(f"{self.name}_metrics", self._metrics)
        self._planner = None
        if self.plan and stage != "fit":
            calls = 0 if self.fitting is None else self.fitting.calls(len(self.classifier.candidates))
            self._planner = Planner(self.classifier, recipe.candidates, calls)
            self._planner.limit_batches(trainer)

    def _classifier_of(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> Classifier:
        """What classifies with ``pl_module``, and fills in ``fitting``."""
        if isinstance(pl_module, Discriminative):
            self.fitting = None
            for name in ("compile", "keep_errors", "reuse"):
                if value := getattr(self, name):
                    found, expected = ("true", "false") if value is True else (value, "null")
                    raise UserError(
                        f"{name}: {found}, but {type(pl_module).__name__} adds no noise: it is called once for each "
                        f"image, and what it says is in predictions.parquet; expected {expected}"
                    )
            return DiscriminativeClassifier(pl_module, self.recipe, microbatch=self.microbatch)
        if not isinstance(pl_module, ConditionalDenoiser):
            missing = [m for m in ("schedule", "candidates", "encode", "predict") if not hasattr(pl_module, m)]
            raise WrongType(
                f"{type(pl_module).__name__} lacks {missing}, expected a ConditionalDenoiser, or one that gives logits"
            )
        recipe, self.fitting = ProbeFitting.of(self.recipe, trainer, stage)
        return DiffusionClassifier(
            pl_module,
            recipe,
            microbatch=self.microbatch,
            keep_errors=True,
            keep_distances=self.keep_distances and stage != "fit",
            compile=self.compile,
        )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        fits = trainer.state.fn == "fit"
        if fits:
            self._validations += 1
            if self.fit_images == 0 or self._validations % self.every_n_validations != 0:
                return
        loader, part = the_loader(trainer, self.name), None if fits else self._part
        images = images_on_this_rank(loader, trainer.global_rank, trainer.world_size, self.fit_images if fits else None)
        self.metrics, self.planned, self._writer = {}, None, None
        reused: Reused | None = None
        if self._planner is not None:
            self._planner.begin(trainer, loader, images, 1 if part is None else part[1])
        if not fits and trainer.state.fn != "predict":
            self._check_coverage(trainer, loader)
        if self._planner is None and not fits:
            if self.output_dir is not None or self.reuse is not None:
                settings = run_settings(self, trainer, pl_module, loader)
                reused = self._open_reused(settings)
                self._writer = self._open_writer(trainer, settings)
            elif self.keep_errors:
                raise UserError("keep_errors: no folder to write to, expected output_dir as well")
        if self.fitting is not None and isinstance(self.classifier, DiffusionClassifier):
            self.fitting.prepare(trainer, self.classifier.denoiser, self._writer, briefly=self._planner is not None)
        self._evaluation = RankEvaluation(
            trainer,
            self.classifier,
            self._metrics,
            images,
            part,
            self._planner,
            self._writer,
            self._calibrated,
            None if fits else self.corruption,
            reused,
        )
        self.results = self._evaluation.results

    def _check_coverage(self, trainer: L.Trainer, loader: Any) -> None:
        """Raise UserError where it is clear from the start that images are too few to calibrate each other's sets."""
        recipe, dataset = self.recipe, getattr(loader, "dataset", None)
        if recipe.coverage is None or self._calibrated is not None:
            return
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            return
        count, batches = len(dataset), batches_within_limit(trainer, loader)
        resumes = self.output_dir is not None and Path(self.output_dir).exists()  # what it holds counts as well
        if batches is not None and getattr(loader, "batch_size", None) is not None and not resumes:
            count = min(count, batches * loader.batch_size * trainer.world_size)
        check_images(count, recipe.coverage, self.outline.num_classes if recipe.coverage_by_class else 1)

    def _open_reused(self, settings: Settings) -> Reused | None:
        """Errors of an earlier run, if there are any to take."""
        c = self.classifier
        if self.reuse is None or not isinstance(c, DiffusionClassifier):
            return None
        measures = c.rule.needs == "distances" or c.keep_distances
        return Reused(self.reuse, settings, ErrorsInfo.of(c), measures)

    def _open_writer(self, trainer: L.Trainer, settings: Settings) -> RunWriter | None:
        if self.output_dir is None:
            return None
        if self._calibrated is not None:
            self._calibrated.check(settings.identity)
        return RunWriter(
            trainer,
            Path(self.output_dir),
            settings,
            self.classifier,
            next_free=self.next_free,
            flush_every=self.flush_every,
            error_maps=self.error_maps,
            keep_errors=self.keep_errors,
            keep_distances=self.keep_distances,
        )

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._evaluation is not None:
            self._evaluation.add(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._evaluation is None:
            return
        self._evaluation.finish()
        labelled, self._evaluation = self._evaluation.labelled, None
        if self._planner is not None:
            self.planned = self._planner.finish(trainer)
            return
        summary = self._metrics.compute() if labelled else None  # on all ranks: it syncs
        if summary is not None:
            self.metrics = summary.numbers()
            pl_module.log_dict(
                {f"{self.name}/{name}": value for name, value in self.metrics.items()},
                sync_dist=trainer.world_size > 1,  # equal on all ranks already; says so to Lightning
            )
        if trainer.is_global_zero and self._writer is not None:
            data = getattr(trainer, "datamodule", None)
            score = data.score if isinstance(data, HasScore) else None
            self.metrics |= self._writer.finish(summary, score)
        elif trainer.is_global_zero and summary is not None and trainer.loggers and trainer.state.fn == "fit":
            from lightning_diffclf.results import charts  # with altair, which nothing else needs

            folder = Path(trainer.default_root_dir) / "validation"
            for path in charts.save(charts.specs(charts.of_summary(summary)), folder, ["png"]):
                log_picture(trainer, f"{self.name}/{path.stem}", path)

    # All evaluations go the same way.
    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        ended = trainer.is_global_zero and self._evaluation is None
        if ended and self._planner is not None and self.planned is not None:
            self._planner.show(self.planned, self.plan_file)
        elif ended and self._writer is not None:
            self._writer.print()  # not earlier: the progress bar still owned the terminal
        self._writer = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._planner is not None:
            self._planner.restore_limits(trainer)
        if self._writer is not None:
            try:
                self._writer.flush()  # what was decided before the error is not lost
            except FailedWrite as second:
                print(f"error: the last decisions could not be written: {second}", file=sys.stderr)
            self._writer.close()
        self._evaluation = self._writer = None
