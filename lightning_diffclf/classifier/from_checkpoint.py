"""The way from a checkpoint to a classifier, for those who have Lightning: what is needed is imported then."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound="FromCheckpoint")


class FromCheckpoint:
    """A classifier that can be made from a checkpoint alone."""

    @classmethod
    def from_checkpoint(
        cls: type[C], path: str | PathLike[str], *, vae: str | None = None, raw: bool = False, **settings: Any
    ) -> C:
        """The classifier of a training: its network, and the recipe in its settings.

        No code from the file is run, and its settings may name classes of this package only. Needs Lightning.

        Args:
            path: Checkpoint that ``fit`` wrote. One without settings, of a Trainer in Python, gets the default recipe.
            vae: Autoencoder in place of the network's own.
            raw: Take the weights in training rather than their average.
            **settings: Fields of the recipe, in place of those in the settings; and the other arguments of this class.

        Returns:
            A classifier on the CPU; ``classifier.denoiser.to("cuda")`` moves it.

        Raises:
            FileNotFoundError: if there is no such file.
            TypeError: if there is no such setting.
            ValueError: if it cannot be read, is no checkpoint of a ClassConditionalDiT, or has settings that it may
                not have.

        Example:
            >>> path = "runs/dit_digits/checkpoints/last.ckpt"
            >>> classifier = DiffusionClassifier.from_checkpoint(path, draws=50)  # doctest: +SKIP
            >>> classifier(images)[0].top(2)  # doctest: +SKIP
            [('3', 0.98), ('8', 0.02)]
        """
        from lightning_diffclf.trained import trained_classifier

        return trained_classifier(cls, Path(path), vae=vae, raw=raw, settings=settings)
