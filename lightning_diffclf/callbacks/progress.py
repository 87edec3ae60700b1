"""Rich progress bar: training steps of the whole run, and classified images with their running accuracy."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from rich.progress import TaskID

from lightning_diffclf.progress import described


class ClassifierProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, counting what matters here.

    Where training ends at ``max_steps``, the bar shows steps and the time left of the whole run, not of an epoch. While
    DiffusionClassifierCallback is at work, a line of its own shows images, time left, accuracy and cost.
    """

    _images: TaskID | None = None
    _skipped = _decided = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._said: set[str] = set()  # before there was a bar

    # --- training --------------------------------------------------------------------------------------------------

    def _whole_run(self, trainer: L.Trainer) -> bool:
        return trainer.max_epochs == -1 and trainer.max_steps > 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._whole_run(trainer):
            super().on_train_epoch_start(trainer, pl_module)
        elif self.progress is not None and self.is_enabled and self.train_progress_bar_id is None:
            self._initialize_train_progress_bar_id()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step - 1 if self._whole_run(trainer) else batch_idx
        super().on_train_batch_end(trainer, pl_module, outputs, batch, step)

    @property
    def total_train_batches(self) -> int | float:
        return self.trainer.max_steps if self._whole_run(self.trainer) else super().total_train_batches

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training" if self._whole_run(self.trainer) else super()._get_train_description(current_epoch)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)  # a logger's number of the run: its folder has a name
        return metrics

    # --- evaluation -------------------------------------------------------------------------------------------------

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_test_epoch_end(trainer, pl_module)
        if self.is_enabled and self.progress is not None and self.test_progress_bar_id is not None:
            done = self.test_progress_bar.completed  # a limit of images may end it before the last batch
            self.progress.update(self.test_progress_bar_id, total=done)
            self.refresh()

    # --- classification --------------------------------------------------------------------------------------------

    def start_images(self, total: int | None, what: str = "Classifying") -> None:
        """Show the line; ``total`` images are expected on this rank, None if unknown."""
        if self.progress is not None and self.is_enabled:
            self._images = self.progress.add_task(what, total=float("inf") if total is None else total)
            self._skipped = self._decided = 0

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Show what is done until the first image is decided: in the line, or as one of its own before there is any.

        Arguments as :data:`~lightning_diffclf.progress.Listener` has them.
        """
        if self.progress is not None and self._images is not None and self.is_enabled:
            if self._decided == 0:
                self.progress.update(self._images, description=described(what, done, total).capitalize())
        elif what not in self._said and self.progress is None:
            self._said.add(what)
            rank_zero_only(print)(described(what, 0, total), flush=True)

    def skip_images(self, count: int) -> None:
        """So many images had been decided before."""
        if self.progress is not None and self._images is not None and self.is_enabled:
            self._skipped += count
            self.progress.update(self._images, advance=count)

    def update_images(self, done: int, correct: int | None, nfe: int) -> None:
        """Bring the line up to date.

        Args:
            done: Images decided so far on this rank.
            correct: How many of them rightly; None if unknown.
            nfe: Network calls spent on them.
        """
        accuracy = "" if correct is None else f", {correct / done:.1%} right"
        self.show_images(done, f"Classifying{accuracy}, {nfe / done:.0f} NFE/image")

    def show_images(self, done: int, description: str) -> None:
        """Bring the line up to date: ``done`` images on this rank so far, and what to say of them."""
        self._decided = done
        if self.progress is not None and self._images is not None and self.is_enabled:
            self.progress.update(self._images, completed=self._skipped + done, description=description)
            self.refresh()

    def stop_images(self) -> None:
        """Take the line away."""
        if self.progress is not None and self._images is not None and self.is_enabled:
            self.progress.update(self._images, visible=False)
            self.refresh()
        self._images = None
