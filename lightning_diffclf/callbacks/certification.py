"""Within which distance answers cannot change, as a trial: randomised smoothing of each image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_diffclf.callbacks.trial import Group, calls_of
from lightning_diffclf.classifier import DiscriminativeClassifier
from lightning_diffclf.classifier.discriminative import Classifier, DiscriminativeLogits
from lightning_diffclf.classifier.logits import DiffusionLogits
from lightning_diffclf.classifier.smoothing import Denoised, certify, check_smoothing, largest_radius
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.progress import tell
from lightning_diffclf.results import certificates


@dataclass(frozen=True)
class CertificationTrial:
    """A certificate for each image, by :func:`~lightning_diffclf.classifier.smoothing.certify`.

    The base of a denoiser is its own step at noise ``sigma``, then its logits; of another network, its logits of noisy
    images.

    Args:
        sigma: Standard deviation of the noise, in units of images in [0, 1].
        n0: Noisy images that choose the answer.
        n: Others that count its votes.
        alpha: Probability that a certificate is wrong.
        radii: What certified accuracy is said for; those beyond what can be certified are left out.
        seed: Key of the noise, with the id of the image.
        draws: Of a denoiser.
        batch_size: Noisy images of one image at once.

    Raises:
        ValueError: if a number is out of range.
    """

    kind: ClassVar[str] = certificates.KIND
    doing: ClassVar[str] = "Certifying"
    whole_groups: ClassVar[bool] = False
    together: ClassVar[int] = 16  # that are written together

    sigma: float
    n0: int = 100
    n: int = 1000
    alpha: float = 0.001
    radii: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    seed: int = 0
    draws: int | None = None
    batch_size: int = 100

    def __post_init__(self) -> None:
        check_smoothing(self.sigma, self.n0, self.n, self.alpha)
        check_at_least(1, draws=self.draws, batch_size=self.batch_size)
        if not self.radii or not all(radius >= 0 for radius in self.radii):
            raise UserError(f"radii: {list(self.radii)}, expected distances of 0 or more, in units of images in [0, 1]")

    def check(self, classifier: Classifier) -> None:
        """Nothing: every classifier can be smoothed."""

    def identity(self) -> dict[str, Any]:
        """What results depend on."""
        return {name: getattr(self, name) for name in ("sigma", "n0", "n", "alpha", "seed")}

    def rows(self, classifier: Classifier, classes: list[int], group: Group, rank: int) -> Iterator[Any]:
        """See :class:`~.trial.Trial`."""
        if isinstance(classifier, DiscriminativeClassifier):
            base: Any = DiscriminativeLogits(classifier)
        else:
            base = Denoised(classifier.denoiser, DiffusionLogits(classifier), self.sigma)
        for i, image_id in enumerate(group.ids):
            tell("certifying", i, len(group.ids))
            start = time.perf_counter()
            found = certify(
                base,
                group.images[i],
                self.sigma,
                n0=self.n0,
                n=self.n,
                alpha=self.alpha,
                image_id=image_id,
                seed=self.seed,
                batch_size=self.batch_size,
            )
            yield certificates.CertifiedImage(
                id=str(image_id),
                label=group.labels[i],
                prediction=None if found.prediction is None else classes[found.prediction],
                radius=found.radius,
                votes=found.votes,
                seconds=time.perf_counter() - start,
                rank=rank,
            )

    def is_good(self, row: Any) -> bool:
        """Whether an image has the right answer."""
        return bool(row.prediction == row.label)

    def summary(self, classifier: Classifier) -> dict[str, Any]:
        """See :class:`~.trial.Trial`."""
        calls, draws = calls_of(classifier), ""
        if not isinstance(classifier, DiscriminativeClassifier):
            calls += len(classifier.candidates)  # of the step that takes the noise away
            count = classifier.draws.count
            draws = f", {count} fixed draw{'s' * (count > 1)}"
        title = (
            f"certified by smoothing: l2 of images in [0, 1], sigma {self.sigma:g}, n {self.n:,}, alpha "
            f"{self.alpha:g}{draws}, {(self.n0 + self.n) * calls:,} network calls an image"
        )
        most = largest_radius(self.sigma, self.n, self.alpha)
        return {"title": title, "radii": [radius for radius in self.radii if radius <= most]}
