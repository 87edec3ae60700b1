"""TrialCallback: what else than a decision is found out about each image of a test set, in a folder that resumes.

A thin Lightning shell, in the place that DiffusionClassifierCallback has in an evaluation: data, networks, identity and
store are those of evaluations. What is tried is in :mod:`~.attack` and :mod:`~.certification`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from lightning_diffclf.callbacks.progress import ClassifierProgressBar
from lightning_diffclf.callbacks.run_settings import data_identity, data_module, made_by, module_identity
from lightning_diffclf.callbacks.run_writer import claimed
from lightning_diffclf.callbacks.sharding import images_on_this_rank, in_part, parse_part, the_loader
from lightning_diffclf.classifier import DiffusionClassifier, DiscriminativeClassifier, Recipe
from lightning_diffclf.classifier.discriminative import Classifier
from lightning_diffclf.data.batch import DistinctIds, unpack
from lightning_diffclf.denoiser import ConditionalDenoiser
from lightning_diffclf.discriminative import Discriminative
from lightning_diffclf.errors import FailedWrite, UserError, WrongType, check_at_least
from lightning_diffclf.files import FolderLock
from lightning_diffclf.identity import identity_of
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import Store, finish
from lightning_diffclf.results.trials import to_table, write_metrics

DRAWS = 10  # of a denoiser that is tried, where nobody says how many: each costs as much as an evaluation by one

OF_LOGITS = ("seed", "loss", "weights", "ensemble", "candidates", "reduction", "temperature")
"""Fields of a recipe that differentiable logits depend on: no rule drops anything, and nothing is left out."""


class Group(NamedTuple):
    """Images that are tried together.

    Attributes:
        images: (B, C, H, W), in [0, 1].
        column_B: The column of the logits that is right (B,), int64.
        labels: Their classes.
        ids: Their ids.
    """

    images: Tensor
    column_B: Tensor
    labels: list[int]
    ids: list[int | str]

    def take(self, places: list[int]) -> Group:
        """Some of them."""
        some = torch.tensor(places, device=self.images.device)
        return Group(
            self.images[some], self.column_B[some], [self.labels[i] for i in places], [self.ids[i] for i in places]
        )


class Trial(Protocol):
    """What is tried."""

    @property
    def kind(self) -> str:
        """Which rows come of it: one of :data:`~lightning_diffclf.results.stored.SCHEMAS`."""
        ...

    @property
    def doing(self) -> str:
        """What the progress bar calls it."""
        ...

    @property
    def draws(self) -> int | None:
        """Draws of the denoiser; :data:`DRAWS` if None."""
        ...

    @property
    def together(self) -> int:
        """Images of a group at most."""
        ...

    @property
    def whole_groups(self) -> bool:
        """Whether what is found of an image depends on its group, which then is tried again as a whole."""
        ...

    def check(self, classifier: Classifier) -> None:
        """Raise ValueError where it cannot be tried on a classifier."""
        ...

    def identity(self) -> dict[str, Any]:
        """What results depend on besides the classifier and the data."""
        ...

    def rows(self, classifier: Classifier, classes: list[int], group: Group, rank: int) -> Iterator[Any]:
        """A row for each image of the group, in order; ``classes`` are those of the columns of logits."""
        ...

    def is_good(self, row: Any) -> bool:
        """Whether a row counts for the classifier, for the progress bar."""
        ...

    def summary(self, classifier: Classifier) -> dict[str, Any]:
        """What tables of the numbers say besides: read by :mod:`~lightning_diffclf.results.trials`."""
        ...


class TrialCallback(L.Callback):
    """Tries something on each image that ``test`` sees, and writes what was found to a folder.

    The folder is as that of an evaluation (docs/results.md): ``settings.json``, ``predictions.parquet`` with a row for
    each image, ``metrics.json``. The same run goes on where it was interrupted; another one is refused.

    Args:
        trial: What is tried.
        recipe: How the module classifies; rule, budget and proposal do not count.
        output_dir: The folder.
        microbatch: Rows (image, candidate, draw) of one network call. Does not change results.
        limit: Only the first images, over all ranks; all if omitted.
        part: ``i/n``: only the i-th of n parts of these, 1 … n, in a folder of its own; by the ids of images, or where
            groups are tried as a whole, every n-th group.
        next_free: Where the folder holds other results, use the next free of ``…-2``, ``…-3``.

    Attributes:
        metrics: What was found, on the first rank; empty before.

    Raises:
        TypeError: from ``setup``, if the module classifies nothing.
        ValueError: if a setting is out of range, or cannot be tried on the module.
    """

    def __init__(
        self,
        trial: Trial,
        recipe: Recipe,
        output_dir: str,
        *,
        microbatch: int = 256,
        limit: int | None = None,
        part: str | None = None,
        next_free: bool = False,
    ) -> None:
        check_at_least(1, microbatch=microbatch, limit=limit)
        self.trial, self.recipe, self.output_dir = trial, recipe, output_dir
        self.microbatch, self.limit, self.next_free = microbatch, limit, next_free
        self.part, self._part = part, None if part is None else parse_part(part)
        self.metrics: dict[str, Any] = {}
        self._lock: FolderLock | None = None
        self._store: Store | None = None
        self._trained: list[torch.nn.Parameter] = []

    @property
    def state_key(self) -> str:
        return "DiffusionClassifierCallback.diffclf"  # in whose place it stands: a checkpoint's Trainer had one

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.test_loop.inference_mode:
            raise UserError("inference_mode: true, but gradients are needed; expected Trainer(inference_mode=False)")
        self.classifier = self._classifier_of(pl_module)
        self.trial.check(self.classifier)
        candidates, chosen = self.classifier.candidates, self.recipe.candidates
        self._classes = sorted({candidates.classes[k] for k in chosen or range(len(candidates))})

    def _classifier_of(self, pl_module: L.LightningModule) -> Classifier:
        trial, name = self.trial, type(pl_module).__name__
        if isinstance(pl_module, Discriminative):
            if trial.draws is not None:
                raise UserError(f"draws: {trial.draws}, but {name} adds no noise; expected none")
            return DiscriminativeClassifier(pl_module, self.recipe, microbatch=self.microbatch)
        if not isinstance(pl_module, ConditionalDenoiser):
            raise WrongType(f"{trial.kind}: {name} is no ConditionalDenoiser and gives no logits, expected either")
        draws = DRAWS if trial.draws is None else trial.draws
        kept = {field: getattr(self.recipe, field) for field in OF_LOGITS}
        return DiffusionClassifier(pl_module, Recipe(draws=draws, **kept), microbatch=self.microbatch)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = the_loader(trainer, self.trial.kind)
        self._left = images_on_this_rank(loader, trainer.global_rank, trainer.world_size, self.limit)
        self.settings = self._settings(trainer, pl_module, loader)
        self.folder, self._lock = claimed(trainer, Path(self.output_dir), self.settings, self.next_free)
        self._store = Store(self.folder, self.settings, trainer.global_rank)
        trainer.strategy.barrier("store")  # nobody writes before all have read
        if self._store.finished and trainer.is_global_zero:
            print(f"resuming {self.folder}: {len(self._store.finished)} images are finished")
        self._trained = [one for one in pl_module.parameters() if one.requires_grad]
        for weight in self._trained:  # whose gradients nobody wants
            weight.requires_grad_(False)
        self._done = self._good = self._groups = 0
        self._distinct = DistinctIds()
        if self._bar(trainer) is not None:
            self._bar(trainer).start_images(self._left, self.trial.doing)

    def _settings(self, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any) -> Settings:
        c, trial = self.classifier, self.trial
        recipe = c.recipe if isinstance(c, DiscriminativeClassifier) else c.recipe.resolved(c.draws, c.rule)
        posterior = {"reduction": recipe.reduction, "temperature": recipe.temperature}
        identity = {
            "kind": trial.kind,
            trial.kind: identity_of(trial.identity()),
            "recipe": identity_of(recipe) | posterior,
            "module": module_identity(pl_module),
            "data": data_identity(data_module(trainer), loader),
            "precision": str(trainer.precision),
        }
        if trial.whole_groups:
            identity["groups"] = [trial.together, getattr(loader, "batch_size", None), trainer.world_size]
        info = made_by(trainer) | {
            "part": self.part,
            "microbatch": self.microbatch,
            "class_names": list(c.candidates.class_names),
            "summary": trial.summary(c),
        }
        return Settings(trainer.strategy.broadcast(identity), info)

    def _bar(self, trainer: L.Trainer) -> Any:
        bar = trainer.progress_bar_callback
        return bar if isinstance(bar, ClassifierProgressBar) else None

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self._left == 0:
            raise StopIteration  # by which the Trainer's loop ends: what is left of the data need not be read
        group = self._group_of(batch)
        if self._left is not None:
            self._left -= len(group.ids)
        for first in range(0, len(group.ids), self.trial.together):
            self._try(trainer, group.take(list(range(len(group.ids)))[first : first + self.trial.together]))

    def _group_of(self, batch: Any) -> Group:
        """Those images of a batch that count.

        Raises:
            UserError: if they have no labels, or some of no candidate, or are no pixels in [-1, 1].
        """
        images, labels, ids, lists, *_ = unpack(batch)
        count = len(images) if self._left is None else min(len(images), self._left)
        if labels is None or lists is not None:
            found = "no labels" if labels is None else "candidates of their own"
            raise UserError(f"{self.trial.kind}: images with {found}, expected labelled images of the same classes")
        known = labels[:count].tolist()
        ids = self._distinct(None if ids is None else ids[:count], images[:count])
        column_of = {one: column for column, one in enumerate(self._classes)}
        for label, image_id in zip(known, ids, strict=True):
            if label not in column_of:
                raise UserError(f"label: {label} of image {image_id!r}, expected a class in play: {self._classes}")
        low, high = (float(end) for end in images.aminmax())
        if not (low >= -1.001 and high <= 1.001):
            raise UserError(
                f"images: values in [{low:.4g}, {high:.4g}], expected pixels in [-1, 1]: {self.trial.kind} needs "
                "images, not latents, of which no distance means anything"
            )
        columns = torch.tensor([column_of[label] for label in known], device=images.device)
        return Group((images[:count].float() / 2 + 0.5).clamp(0, 1), columns, known, ids)

    def _try(self, trainer: L.Trainer, group: Group) -> None:
        store, trial, bar = self._store, self.trial, self._bar(trainer)
        assert store is not None
        ours = self._in_part(group.ids)
        due = [i for i, image_id in enumerate(group.ids) if ours[i] and str(image_id) not in store.finished]
        if bar is not None:
            bar.skip_images(len(group.ids) - len(due))
        if not due:
            return
        wanted = {str(group.ids[i]) for i in due}
        tried = group if trial.whole_groups else group.take(due)
        with trainer.precision_plugin.forward_context():  # hooks run outside autocast
            for row in trial.rows(self.classifier, self._classes, tried, trainer.global_rank):
                if row.id in wanted:
                    store.add(row)
                    self._done, self._good = self._done + 1, self._good + trial.is_good(row)
                    if bar is not None:
                        bar.show_images(self._done, f"{trial.doing}, {self._good / self._done:.1%} right")
        store.flush()

    def _in_part(self, ids: list[int | str]) -> list[bool]:
        """Which images of the next group are in this run's part."""
        self._groups += 1
        if self._part is None:
            return [True] * len(ids)
        number, count = self._part
        if self.trial.whole_groups:  # as they are in a run of all images
            return [self._groups % count == number % count] * len(ids)
        return [in_part(image_id, number, count) for image_id in ids]

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        store = self._store
        assert store is not None
        store.flush()
        trainer.strategy.barrier("rows")
        if self._bar(trainer) is not None:
            self._bar(trainer).stop_images()
        if trainer.is_global_zero:
            finish(self.folder, self.settings)
            self.metrics = write_metrics(self.folder, self.settings)
        self._close()

    def _close(self) -> None:
        for weight in self._trained:
            weight.requires_grad_(True)
        self._store, self._trained = None, []
        if self._lock is not None:
            self._lock.release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.metrics:
            console = Console(soft_wrap=True)
            console.print(to_table(self.settings, self.metrics))  # the bar has left the terminal
            console.print(f"results in {self.folder}", markup=False, highlight=False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._store is not None:
            try:
                self._store.flush()  # what was found before is not lost
            except FailedWrite as second:
                print(f"error: the last rows could not be written: {second}", file=sys.stderr)
        self._close()


def calls_of(classifier: Classifier) -> int:
    """Network calls of one query about one image."""
    if isinstance(classifier, DiscriminativeClassifier):
        return 1
    return classifier.draws.count * len(classifier.recipe.candidates or classifier.candidates)
