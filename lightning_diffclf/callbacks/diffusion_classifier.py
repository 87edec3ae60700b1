"""DiffusionClassifierCallback: a thin Lightning shell over classifier/ that classifies what a Trainer evaluates."""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_diffclf.callbacks.pictures import log_picture
from lightning_diffclf.callbacks.progress import ClassifierProgressBar
from lightning_diffclf.callbacks.run_settings import class_names, run_settings
from lightning_diffclf.callbacks.sharding import (
    BATCH_LIMITS,
    batches_within_limit,
    images_on_this_rank,
    in_part,
    parse_part,
)
from lightning_diffclf.classifier import (
    Classification,
    DiffusionClassifier,
    Elimination,
    Exhaustive,
    Posterior,
    Recipe,
)
from lightning_diffclf.data.batch import content_ids, unpack
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.errors import UserError, WrongType
from lightning_diffclf.results import charts
from lightning_diffclf.results.calibration import calibrate
from lightning_diffclf.results.errors import ErrorsInfo
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.plan import Measurement, Plan, measure
from lightning_diffclf.results.predictions import Row, from_table
from lightning_diffclf.results.store import Store, claim, finish
from lightning_diffclf.results.summary import Outline, Summary
from lightning_diffclf.results.thumbnails import thumbnail


class DiffusionClassifierCallback(L.Callback):
    """Classifies what ``validate``, ``test``, ``predict`` and the validation of ``fit`` see, by its denoising error.

    Works with any LightningModule that is a :class:`~lightning_diffclf.denoiser.ConditionalDenoiser`, and with batches
    as :func:`~lightning_diffclf.data.batch.unpack` describes. Images without ids are keyed by a digest of their values.
    The network runs in the Trainer's precision, with averaged weights where an EMA callback puts them in place. Every
    image counts once, also when a DistributedSampler pads its shards.

    Logged as ``diffclf/…``: ``accuracy`` (top-1), ``top5``, ``mean_per_class`` (over classes that occur), ``nll``,
    ``brier`` and ``ece`` of the posterior (natural logarithm; 15 bins), ``nfe_per_image``, ``images``, ``seconds`` and
    ``images_per_second``.

    Args:
        draws: (t, noise) pairs for each image; 250, or what the elimination rule spends, if omitted.
        seed: Key of the noise.
        loss: Error terms: ``l2``, ``l1``, ``huber``, ``kl``, ``nll``, or several joined by ``+``.
        elimination: Rule that drops candidates early; none if omitted.
        microbatch: Rows (image, candidate, draw) of one network call. Does not change results.
        candidates: Indices of the candidates in play; all if omitted.
        reduction: ``mean`` or ``sum``: how the posterior reads scores.
        temperature: Temperature of the posterior.
        weights: What the draws weigh in the score: ``uniform``, ``sample``, ``velocity``, ``clark_jaini``, or a number
            for each draw from the cleanest to the noisiest.
        budget: Network calls for one image at most; then the draws so far decide.
        abstain: Margin in nats below which an answer counts as not given. Then ``coverage``, the share of images with
            an answer, and ``answered_accuracy`` among them are logged as well.
        proposal: Names the candidates to try for each image: any callable from images (B, C, H, W) to indices (B, m);
            see :mod:`~lightning_diffclf.classifier.proposal`. Then ``proposal_recall`` is logged as well: the share of
            images whose class it named. Not used where ``candidates`` are given.
        ensemble: ``best`` or ``mean``: what counts where a class has several candidates (prompts), its best one or the
            mean over all.
        compile: Compile the network for micro-batches of one size; pays in long evaluations.
        fit_images: Images that validation during ``fit`` classifies, over all ranks; None for all, 0 for none.
        every_n_validations: Classify in every n-th validation of ``fit``.
        output_dir: Folder for ``predictions.parquet``, ``metrics.json`` and pictures, outside ``fit``; nothing is
            written if omitted. Results of the same settings that it already holds are gone on with: finished images are
            skipped. Of other settings, they are an error.
        elsewhere: In place of that error, use the next free of ``…-2``, ``…-3``.
        part: ``i/n``: outside ``fit``, classify only the i-th of n parts of the images, 1 … n, in a folder of its own.
            Parts are about equal and depend on ids only; ``diffclf merge`` joins them.
        flush_every: Images after which decisions are written to the disk, at most; also after a minute. What a kill
            may cost.
        error_maps: Of so many wrongly decided images, also find out where in the image the class decided for fits
            better than the right one: 32 more network calls each, not counted as theirs.
        keep_errors: Write the error of every (image, candidate, draw) to ``errors.parquet`` as well, outside ``fit``:
            4 bytes each before compression. ``diffclf replay`` tries elimination rules and weights on them.
        keep_distances: Write the distances between the candidates' predictions to ``errors.parquet`` as well, which
            :class:`~.elimination.LikelihoodRatio` needs to be replayed: K - 1 bytes for each error.
        plan: Only measure what an evaluation will cost, outside ``fit``: on the first batch, for some twenty seconds.
            Prints a table and writes nothing.
        name: Prefix of what is logged; give each a name of its own to use two of these callbacks.

    Attributes:
        results: Decisions of this rank in the last evaluation.
        metrics: Metrics of the last evaluation over all ranks; empty without labels.
        planned: What the last evaluation would have cost, after a run with ``plan``; else None.

    Raises:
        TypeError: from ``setup``, if the module is no ConditionalDenoiser.
        ValueError: if a setting is out of range (some only from ``setup``, when the module is known), or a label
            belongs to no candidate.
    """

    def __init__(
        self,
        draws: int | None = None,
        seed: int = 0,
        loss: str = "l2",
        elimination: Elimination | None = None,
        microbatch: int = 256,
        candidates: list[int] | None = None,
        reduction: Literal["mean", "sum"] = "sum",
        temperature: float = 1.0,
        weights: str | list[float] = "uniform",
        budget: int | None = None,
        abstain: float = 0.0,
        proposal: Callable[[Tensor], Any] | None = None,
        compile: bool = False,
        ensemble: Literal["best", "mean"] = "best",
        fit_images: int | None = 128,
        every_n_validations: int = 1,
        output_dir: str | None = None,
        elsewhere: bool = False,
        part: str | None = None,
        flush_every: int = 100,
        error_maps: int = 24,
        keep_errors: bool = False,
        keep_distances: bool = False,
        plan: bool = False,
        name: str = "diffclf",
    ) -> None:
        for what, value, least in (
            ("draws", draws, 1),
            ("microbatch", microbatch, 1),
            ("fit_images", fit_images, 0),
            ("every_n_validations", every_n_validations, 1),
            ("flush_every", flush_every, 1),
            ("error_maps", error_maps, 0),
        ):
            if value is not None and value < least:
                raise UserError(f"{what}: {value}, expected at least {least}")
        if candidates is not None and not candidates:
            raise UserError("candidates: an empty list, expected at least one index, or null for all")
        self.draws, self.seed, self.loss, self.elimination, self.microbatch = draws, seed, loss, elimination, microbatch
        if keep_distances and not keep_errors:
            raise UserError("keep_distances: distances are written beside errors, expected keep_errors as well")
        self.candidates = candidates
        self.posterior = Posterior(reduction, temperature)
        self.weights, self.budget, self.abstain = weights, budget, abstain
        self.proposal, self.compile, self.ensemble = proposal, compile, ensemble
        self.fit_images, self.every_n_validations = fit_images, every_n_validations
        self.output_dir, self.elsewhere, self.flush_every = output_dir, elsewhere, flush_every
        self.part = part
        self._part = None if part is None else parse_part(part)  # of this evaluation
        self.error_maps = error_maps
        self.keep_errors, self.keep_distances, self.plan = keep_errors, keep_distances, plan
        self.name = name
        self.results: list[Classification] = []
        self.metrics: dict[str, float] = {}
        self.planned: Plan | None = None
        self._labels: list[int | None] = []
        self._ids: list[int | str] = []
        self._pictures: deque[tuple[bytes | None, Tensor | None]] = deque()  # thumbnail and image of undecided images
        self._maps = 0  # error maps that this rank may still make
        self._late = 0.0  # seconds since the last decision
        self._validations = 0  # seen in this fit
        self._active = False
        self._remaining: int | None = None  # images to classify on this rank; None if unknown
        self._folder: Path | None = None  # where this evaluation's results go
        self._store: Store | None = None  # of this rank
        self._planning = False
        self._measured: Measurement | None = None  # by this rank
        self._limits: dict[str, int | float] = {}  # on the Trainer's batches, where a plan has set them to one
        self._batches: int | None = None  # that the evaluation would have on this rank, if the Trainer limits them
        self._correct = self._nfe = 0  # of this evaluation on this rank, for the progress bar

    @property
    def state_key(self) -> str:
        return f"DiffusionClassifierCallback.{self.name}"

    def state_dict(self) -> dict[str, Any]:
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validations = state_dict["validations"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, ConditionalDenoiser):
            missing = [m for m in ("schedule", "candidates", "encode", "predict") if not hasattr(pl_module, m)]
            raise WrongType(f"{type(pl_module).__name__} lacks {missing}, expected a ConditionalDenoiser")
        self._planning = self.plan and stage != "fit"
        if self._planning:
            self._limit_batches(trainer)
        self.classifier = DiffusionClassifier(
            pl_module,
            Recipe(
                self.draws,
                self.seed,
                self.loss,
                self.elimination,
                self.weights,
                self.budget,
                self.abstain,
                self.ensemble,
                None,
                self.proposal,
            ),
            microbatch=self.microbatch,
            keep_errors=True,
            keep_distances=self.keep_distances and stage != "fit",
            compile=self.compile,
        )
        known = len(pl_module.candidates)
        if self.candidates is not None and not all(0 <= c < known for c in self.candidates):
            raise UserError(f"candidates: {self.candidates}, expected indices in 0 … {known - 1}")
        # On the module, so that Lightning moves them to its device. They have no parameters and save nothing.
        pl_module.add_module(
            self._metrics_name,
            ClassifierMetrics(self.outline),
        )

    @property
    def outline(self) -> Outline:
        """What must be known to sum decisions up; from ``setup`` on."""
        return Outline(
            classes=tuple(self.classifier.denoiser.candidates.classes),
            class_names=tuple(class_names(self.classifier.denoiser)),
            timesteps_S=tuple(self.classifier.timesteps_S.tolist()),
            posterior=self.posterior,
            abstains=self.abstain > 0,
            proposes=self.proposal is not None,
        )

    @property
    def _metrics_name(self) -> str:
        return f"{self.name}_metrics"

    def _metrics(self, pl_module: L.LightningModule) -> ClassifierMetrics:
        metrics = getattr(pl_module, self._metrics_name)
        assert isinstance(metrics, ClassifierMetrics)
        return metrics

    # --- begin -----------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if trainer.state.fn != "fit":
            self._begin(trainer, pl_module, trainer.val_dataloaders, cap=None)
            return
        self._validations += 1
        if self.fit_images != 0 and self._validations % self.every_n_validations == 0:
            self._begin(trainer, pl_module, trainer.val_dataloaders, cap=self.fit_images)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, trainer.test_dataloaders, cap=None)

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module, trainer.predict_dataloaders, cap=None)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule, loaders: Any, cap: int | None) -> None:
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                f"{self.name}: weights are sharded ({type(trainer.strategy).__name__}), but each process makes its own "
                "number of network calls; evaluate with ddp, and set fit_images to 0 in training"
            )
        loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
        if len(loaders) != 1:
            raise UserError(f"dataloaders: {len(loaders)}, expected one to classify")
        self._remaining = images_on_this_rank(loaders[0], trainer.global_rank, trainer.world_size, cap)
        if self._planning:
            self._restore_limits(trainer)
            self._batches = batches_within_limit(trainer, loaders[0])
        self._metrics(pl_module).reset()
        self.results, self._labels, self._ids, self.metrics = [], [], [], {}
        self._correct, self._nfe, self._late = 0, 0, 0.0
        self._pictures.clear()
        self._run = self.classifier.run()
        self._folder, self._store, self._measured, self.planned = None, None, None, None
        if trainer.state.fn != "fit" and not self._planning:
            if self.keep_errors and self.output_dir is None:
                raise UserError("keep_errors: no folder to write to, expected output_dir as well")
            if self.output_dir is not None:
                self._open_store(trainer, pl_module, loaders[0], Path(self.output_dir))
        self._part = None if self.part is None or trainer.state.fn == "fit" else parse_part(self.part)
        self._active = True
        if isinstance(trainer.progress_bar_callback, ClassifierProgressBar):
            trainer.progress_bar_callback.start_images(self._remaining)

    def _open_store(self, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, folder: Path) -> None:
        """Before long work: fails here if the folder cannot be used. All ranks agree on it."""
        settings = run_settings(self, trainer, pl_module, loader)
        outcome: Path | Exception | None = None
        if trainer.is_global_zero:
            try:
                outcome = claim(folder, settings, self.elsewhere)
            except (ValueError, OSError) as error:
                outcome = error
        outcome = trainer.strategy.broadcast(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        assert outcome is not None
        errors = ErrorsInfo.of(self.classifier, self.weights) if self.keep_errors else None
        rank, ranks = trainer.global_rank, trainer.world_size
        store = Store(outcome, settings, rank, self.flush_every, errors, self.keep_distances)
        self._folder, self._store = outcome, store
        trainer.strategy.barrier("store")  # nobody writes before all have read
        # What was decided before counts on the rank that decided it, so that seconds add up.
        before = [row for row in from_table(store.stored) if row.rank % ranks == rank]
        self._maps = -(-self.error_maps // ranks) - sum(row.error_map is not None for row in before)
        if trainer.state.fn != "predict":
            self._metrics(pl_module).update(before)
        if store.finished and trainer.is_global_zero:
            print(f"going on with {outcome}: {len(store.finished)} images are finished")

    # --- classify --------------------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._active:
            self._classify(trainer, pl_module, batch, last=batch_idx + 1 == trainer.num_val_batches[0])

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._classify(trainer, pl_module, batch, last=batch_idx + 1 == trainer.num_test_batches[0])

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._classify(trainer, pl_module, batch, last=batch_idx + 1 == trainer.num_predict_batches[0])

    def _classify(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, last: bool) -> None:
        images, labels, ids, lists, keys = unpack(batch)
        batch_size = len(images)
        count = batch_size if self._remaining is None else min(batch_size, self._remaining)
        if count > 0:
            images, ids = images[:count], list(content_ids(images) if ids is None else ids)[:count]
            known: list[Any] = [None] * count if labels is None else labels[:count].tolist()
            if trainer.state.fn != "predict":
                self._check_labels(known, ids)
            if self._planning:
                if self._batches is not None:
                    most = self._batches * batch_size
                    self._remaining = most if self._remaining is None else min(most, self._remaining)
                if self._part is not None and self._remaining is not None:
                    self._remaining = round(self._remaining / self._part[1])
                with trainer.precision_plugin.forward_context():  # hooks run outside autocast
                    self._measured = measure(self.classifier, images, ids, self.candidates)
                return
            keys = ids if keys is None else list(keys)[:count]
            if self._remaining is not None:
                self._remaining -= count
            new = [i for i in range(count) if self._is_due(ids[i])]
            if len(new) < count:
                images, known = images[new], [known[i] for i in new]
                ids, keys = [ids[i] for i in new], [keys[i] for i in new]
                lists = None if lists is None else [lists[i] for i in new]
                if isinstance(trainer.progress_bar_callback, ClassifierProgressBar):
                    trainer.progress_bar_callback.skip_images(count - len(new))
            if self._store is not None:
                for image, label in zip(images, known, strict=True):
                    for_map = self._maps > 0 and label is not None
                    self._pictures.append((thumbnail(image), image.cpu() if for_map else None))
            if len(images):
                with trainer.precision_plugin.forward_context():  # a proposal may call the network
                    self._run.add(images, keys, self.candidates if lists is None else list(lists)[: len(images)])
                self._labels += known
                self._ids += ids
                self._decide(trainer, pl_module, self._run.work())
        # What does not fill a micro-batch waits for the next batch, but not for the end of the epoch: hooks of other
        # callbacks may change the weights there.
        if last or self._remaining == 0:
            self._decide(trainer, pl_module, self._run.finish())

    def _is_due(self, image_id: int | str) -> bool:
        """Whether an image belongs to this run's part of the data and was not decided before."""
        finished = self._store is not None and str(image_id) in self._store.finished
        return not finished and (self._part is None or in_part(image_id, *self._part))

    def _decide(self, trainer: L.Trainer, pl_module: L.LightningModule, decisions: Iterator[Classification]) -> None:
        bar, begun = trainer.progress_bar_callback, len(self.results)
        classes = self.classifier.denoiser.candidates.classes
        start = time.perf_counter() - self._late
        rows: list[Row] = []
        with trainer.precision_plugin.forward_context():  # hooks run outside autocast
            for result in decisions:
                seconds, label = time.perf_counter() - start, self._labels[begun + len(rows)]
                key, result = result.image_id, replace(result, image_id=self._ids[begun + len(rows)])
                extra: dict[str, Any] = {"seconds": seconds, "rank": trainer.global_rank}
                if self._store is not None:
                    extra["thumbnail"], image = self._pictures.popleft()
                    if label not in (None, result.label) and image is not None and self._maps > 0:
                        extra["error_map"] = self._error_map(
                            replace(result, image_id=key), label, image.to(pl_module.device)
                        )
                row = Row.of(result, classes, self.classifier.weights_S, label, self.ensemble, **extra)
                rows.append(replace(row, thumbnail=None, error_map=None))
                self.results.append(replace(result, errors_KS=None, distances_SKK=None))
                if self._store is not None:
                    self._store.add(row, result)
                self._nfe += result.nfe
                self._correct += label == result.label
                if isinstance(bar, ClassifierProgressBar):
                    bar.update_images(begun + len(rows), None if label is None else self._correct, self._nfe)
                start = time.perf_counter()  # what came since the decision was not the classifier's time
        self._late = time.perf_counter() - start
        if trainer.state.fn != "predict":
            self._metrics(pl_module).update(rows)

    def _error_map(self, result: Classification, label: int | None, image: Tensor) -> Any:
        """How much larger the error of the right class is than that of the chosen one, at each position (h, w)."""
        classes = self.classifier.denoiser.candidates.classes
        tried = [k for k in result.candidates_K.tolist() if classes[k] == label]
        difference_of = dict(zip(result.candidates_K.tolist(), result.differences_K.tolist(), strict=True))
        right = min(tried, key=difference_of.__getitem__) if tried else classes.index(label)
        if result.candidate is None:
            return None
        self._maps -= 1
        right_map, chosen_map = self.classifier.error_map(image, result.image_id, [right, result.candidate])
        return (right_map - chosen_map).numpy()

    def _check_labels(self, labels: list[int | None], ids: list[int | str]) -> None:
        classes = self.classifier.denoiser.candidates.classes
        allowed = set(classes if self.candidates is None else [classes[c] for c in self.candidates])
        for label, image_id in zip(labels, ids, strict=True):
            if label is None:
                raise UserError("batch: no labels, expected a label for each image; use predict for unlabelled images")
            if label not in allowed:
                raise UserError(
                    f"label: {label} of image {image_id!r} belongs to no candidate, expected one of the "
                    f"{len(allowed)} classes in {min(allowed)} … {max(allowed)}"
                )

    # --- end -------------------------------------------------------------------------------------------------------

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._active:
            self._end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end(trainer, pl_module)

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._decide(trainer, pl_module, self._run.finish())  # nothing, unless the last batch was not known to be it
        if self._store is not None:
            self._store.flush()
            trainer.strategy.barrier("decisions")
        self._active = False
        if isinstance(trainer.progress_bar_callback, ClassifierProgressBar):
            trainer.progress_bar_callback.stop_images()
        if self._planning:
            self.planned = self._make_plan(trainer)
            return
        summary: Summary | None = None
        if trainer.state.fn != "predict":
            summary = self._metrics(pl_module).compute()  # by all ranks: it syncs
            self.metrics = summary.numbers()
            pl_module.log_dict(
                {f"{self.name}/{name}": value for name, value in self.metrics.items()},
                sync_dist=trainer.world_size > 1,  # equal on all ranks already; says so to Lightning
            )
        if trainer.is_global_zero and self._folder is not None:
            self._write(self._folder, summary is not None, getattr(trainer, "datamodule", None))
        if trainer.is_global_zero and summary is not None:
            if self._folder is not None:
                charts.save(charts.of_summary(summary), self._folder, ["png"])
            elif trainer.loggers and trainer.state.fn == "fit":
                folder = Path(trainer.default_root_dir) / "validation"
                for path in charts.save(charts.of_summary(summary), folder, ["png"]):
                    log_picture(trainer, f"{self.name}/{path.stem}", path)

    def _write(self, folder: Path, labelled: bool, datamodule: Any) -> None:
        assert self._store is not None
        settings = self._store.settings
        table = finish(folder, settings)
        metrics: dict[str, Any] = self.metrics or Summary.of(self.outline, [table]).numbers()
        if labelled:
            calibrated = calibrate([table], self.outline)
            metrics = self.metrics | (asdict(calibrated) if calibrated is not None else {})
        score = getattr(datamodule, "score", None)  # numbers of the data set's own
        if score is not None:
            self.metrics = metrics = score(from_table(table)) | metrics
        posterior = asdict(self.posterior)
        report = {"metrics": metrics, "settings": settings.identity | {"posterior": posterior} | settings.info}
        (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")

    # --- plan ------------------------------------------------------------------------------------------------------

    def _limit_batches(self, trainer: L.Trainer) -> None:
        """Let the Trainer load one batch only; a limit of no batch stays."""
        for name in BATCH_LIMITS.values():
            limit = getattr(trainer, name)
            if limit not in (0, 1) or isinstance(limit, float):
                self._limits[name] = limit
                setattr(trainer, name, 1 if limit else 0)

    def _restore_limits(self, trainer: L.Trainer) -> None:
        for name, limit in self._limits.items():
            setattr(trainer, name, limit)
        self._limits = {}

    def _make_plan(self, trainer: L.Trainer) -> Plan:
        """What all ranks measured; call it on all ranks."""
        m = self._measured
        images = float("nan") if self._remaining is None else self._remaining
        mine = [0.0] * 5 if m is None else [images, m.rows_per_second, m.flops_per_row, m.nfe_sum, m.nfe_images]
        gathered = [mine]
        if trainer.world_size > 1:
            tensor = torch.tensor(mine, dtype=torch.float64, device=trainer.strategy.root_device)
            gathered = trainer.strategy.all_gather(tensor).tolist()
        used = [values for values in gathered if values[1] > 0]  # a rank may have no image
        if not used:
            raise UserError("plan: no image to measure on")
        count = len(self.candidates or self.classifier.denoiser.candidates)
        shared = count, len(self.classifier.timesteps_S), self.microbatch
        return Plan(
            ranks=[Measurement(*shared, rate, flops, int(spent), int(tried)) for _, rate, flops, spent, tried in used],
            images=[None if math.isnan(images) else int(images) for images, *_ in used],
            rule=repr(self.classifier.rule),
            exact=type(self.classifier.rule) is Exhaustive and self.budget is None,
        )

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and self._planning and self.planned is not None:
            Console(soft_wrap=True).print(self.planned.to_table())
        elif trainer.is_global_zero and self._folder is not None and not self._active:
            self._print()  # not earlier: the progress bar still owns the terminal
            self._folder = None

    def _print(self) -> None:
        table = Table(title=f"diffusion classifier, {self.loss}, {self.classifier.rule}", show_header=False)
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
        table.add_row("results in", str(self._folder))
        Console(soft_wrap=True).print(table)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore_limits(trainer)
        if self._active and self._store is not None:
            try:
                self._store.flush()  # what was decided before the error is not lost
            except OSError as second:
                print(f"error: the last decisions could not be written: {second}", file=sys.stderr)
