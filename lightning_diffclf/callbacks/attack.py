"""How robust answers are, as a trial: an attack on each image."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf.callbacks.trial import DRAWS, Group, calls_of
from lightning_diffclf.classifier import DiffusionClassifier, DiscriminativeClassifier
from lightning_diffclf.classifier.attack import APGD, Norm, auto_attack, check_eps, margin_loss
from lightning_diffclf.classifier.discriminative import Classifier, DiscriminativeLogits
from lightning_diffclf.classifier.logits import SHARED_ID, DiffusionLogits
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.progress import tell
from lightning_diffclf.results import attacks

Randomness = Literal["fixed", "fresh"]


class Counted(nn.Module):
    """A network that counts the images it was asked about."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images = network, 0

    def forward(self, images: Tensor) -> Tensor:
        """What the network says."""
        self.images += len(images)
        tell("attack: queries", self.images)  # of AutoAttack, the one sign of life for minutes
        logits: Tensor = self.network(images)
        return logits


@dataclass(frozen=True)
class AttackTrial:
    """An attack on the differentiable logits of a classifier.

    With fixed draws, there is a network for each seed, which is attacked by itself and judges the images found against
    it. With fresh draws, each call of the network sees other ones; the attack climbs the mean over ``eot`` of them, and
    what it found is judged by ``seeds`` further ones. Either way, an image is robust if all seeds decide rightly.

    Args:
        eps: Radius, in units of images in [0, 1].
        norm: ``linf`` or ``l2``.
        steps: Of APGD.
        restarts: Of APGD.
        seeds: Draws that must all decide rightly.
        randomness: Whether draws are ``fixed``, and known to the attacker, or ``fresh`` at each call.
        eot: Calls that a gradient is the mean of; 1 with fixed draws, 5 with fresh ones if omitted.
        auto: AutoAttack in place of APGD: "standard", with fresh draws "rand".
        seed: Key of random starts.
        draws: Of a denoiser.
        batch_size: Images that are attacked together. Of AutoAttack, which draws its noise for all of them, part of the
            identity; else, it changes nothing but rounding.

    Raises:
        ValueError: if a number is out of range, or settings contradict each other.
    """

    kind: ClassVar[str] = attacks.KIND
    doing: ClassVar[str] = "Attacking"
    whole_groups: ClassVar[bool] = True  # rounding depends on the batch, and an attack makes much of it

    eps: float
    norm: Norm = "linf"
    steps: int = 100
    restarts: int = 1
    seeds: int = 1
    randomness: Randomness = "fixed"
    eot: int | None = None
    auto: bool = False
    seed: int = 0
    draws: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        check_eps(self.eps, self.norm)
        check_at_least(
            1,
            steps=self.steps,
            restarts=self.restarts,
            seeds=self.seeds,
            eot=self.eot,
            draws=self.draws,
            batch_size=self.batch_size,
        )
        if self.eot not in (None, 1) and (self.randomness == "fixed" or self.auto):
            raise UserError(f"eot: {self.eot}, expected it with fresh draws, and of AutoAttack its own")

    @property
    def together(self) -> int:
        """Images of a group."""
        return self.batch_size

    @property
    def name(self) -> str:
        """Of the attack."""
        return ("AutoAttack rand" if self._fresh else "AutoAttack standard") if self.auto else "APGD"

    @property
    def _fresh(self) -> bool:
        return self.randomness == "fresh"

    def check(self, classifier: Classifier) -> None:
        """Raise ValueError where draws are asked for that the network has not."""
        if isinstance(classifier, DiscriminativeClassifier) and (self._fresh or self.seeds > 1):
            raise UserError(
                f"randomness: {self.randomness}, seeds: {self.seeds}, but {type(classifier.network).__name__} adds no "
                "noise; expected fixed and 1"
            )

    def identity(self) -> dict[str, Any]:
        """What results depend on; of AutoAttack, whose settings are its own, less."""
        names = ("eps", "norm", "seeds", "randomness", "seed")
        own = {} if self.auto else {"steps": self.steps, "restarts": self.restarts, "eot": self._eot}
        return {"attack": self.name} | {name: getattr(self, name) for name in names} | own

    @property
    def _eot(self) -> int:
        return self.eot or (5 if self._fresh else 1)

    def rows(self, classifier: Classifier, classes: list[int], group: Group, rank: int) -> Iterator[Any]:
        """See :class:`~.trial.Trial`."""
        start, label_B = time.perf_counter(), group.column_B
        judges = [Counted(one) for one in self._judges(classifier)]
        before_SBK = [self._asked(judge, group.images) for judge in judges]
        if self._fresh and isinstance(classifier, DiffusionClassifier):
            attacker = Counted(DiffusionLogits(classifier, fresh=True))
            right_B = torch.stack([logits.argmax(1) == label_B for logits in before_SBK]).all(0)
            images_SBCHW = [self._attacked(attacker, group, right_B)] * len(judges)
            networks = [*judges, attacker]
        else:
            images_SBCHW = [
                self._attacked(judge, group, logits.argmax(1) == label_B)
                for judge, logits in zip(judges, before_SBK, strict=True)
            ]
            networks = judges
        after_SBK = [self._asked(judge, images) for judge, images in zip(judges, images_SBCHW, strict=True)]
        clean_BS, attacked_BS = (
            torch.stack([o.argmax(1) for o in some], 1).tolist() for some in (before_SBK, after_SBK)
        )
        before_B, after_B = (
            torch.stack([-margin_loss(logits, label_B) for logits in some]).amin(0).tolist()
            for some in (before_SBK, after_SBK)
        )
        order = torch.inf if self.norm == "linf" else 2
        moved_SB = [(images - group.images).flatten(1).norm(order, dim=1) for images in images_SBCHW]
        distance_B = torch.stack(moved_SB).amax(0).tolist()
        count, named = len(group.ids), np.array(classes, dtype=np.int32)
        queries = sum(network.images for network in networks) / count
        seconds = (time.perf_counter() - start) / count
        for i, image_id in enumerate(group.ids):
            yield attacks.AttackedImage(
                id=str(image_id),
                label=group.labels[i],
                clean_S=named[clean_BS[i]],
                attacked_S=named[attacked_BS[i]],
                margin_before=before_B[i],
                margin_after=after_B[i],
                distance=distance_B[i],
                queries=queries,
                seconds=seconds,
                rank=rank,
            )

    def _judges(self, classifier: Classifier) -> list[nn.Module]:
        if isinstance(classifier, DiscriminativeClassifier):
            return [DiscriminativeLogits(classifier)]
        if self._fresh:  # not what the attack has seen
            return [DiffusionLogits(classifier, f"judge {number}") for number in range(self.seeds)]
        others = [f"{SHARED_ID}, {number}" for number in range(1, self.seeds)]
        return [DiffusionLogits(classifier, key) for key in (SHARED_ID, *others)]

    def _asked(self, network: nn.Module, images: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = network(images)
        return logits

    def _attacked(self, network: nn.Module, group: Group, right_B: Tensor) -> Tensor:
        """The images that the attack found; of those that are decided wrongly anyway, themselves."""
        places = right_B.nonzero()[:, 0].tolist()
        found = group.images.clone()
        if places:
            some = group.take(places)
            if self.auto:
                version = "rand" if self._fresh else "standard"
                settings = {"version": version, "seed": self.seed}
                found[right_B] = auto_attack(network, some.images, some.column_B, self.eps, self.norm, **settings)
            else:
                attack = APGD(self.eps, self.norm, self.steps, self.restarts, self.seed, self._eot)
                found[right_B] = attack(network, some.images, some.column_B, some.ids).images
        return found

    def is_good(self, row: Any) -> bool:
        """Whether an image is robust."""
        return bool((row.clean_S == row.label).all() and (row.attacked_S == row.label).all())

    def summary(self, classifier: Classifier) -> dict[str, Any]:
        """See :class:`~.trial.Trial`."""
        draws = None if isinstance(classifier, DiscriminativeClassifier) else self.draws or DRAWS
        return {"title": attacks.described(self.identity() | {"draws": draws}), "calls": calls_of(classifier)}
