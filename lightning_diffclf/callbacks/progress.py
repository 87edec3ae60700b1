"""Rich progress bar that counts classified images, with running accuracy and time left."""

from __future__ import annotations

from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import TaskID


class ClassifierProgressBar(RichProgressBar):
    """Lightning's Rich progress bar, with a line of its own while DiffusionClassifierCallback is at work."""

    _images: TaskID | None = None

    def start_images(self, total: int | None) -> None:
        """Show the line; ``total`` images are expected on this rank, None if unknown."""
        if self.progress is not None and self.is_enabled:
            self._images = self.progress.add_task("Classifying images", total=float("inf") if total is None else total)

    def update_images(self, done: int, correct: int | None, nfe: int) -> None:
        """Bring the line up to date.

        Args:
            done: Images decided so far on this rank.
            correct: How many of them rightly; None if unknown.
            nfe: Network calls spent on them.
        """
        if self.progress is not None and self._images is not None and self.is_enabled:
            accuracy = "" if correct is None else f", {correct / done:.1%} right"
            self.progress.update(
                self._images, completed=done, description=f"Classifying images{accuracy}, {nfe / done:.0f} NFE each"
            )
            self.refresh()

    def stop_images(self) -> None:
        """Take the line away."""
        if self.progress is not None and self._images is not None and self.is_enabled:
            self.progress.update(self._images, visible=False)
            self.refresh()
        self._images = None
