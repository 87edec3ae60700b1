"""``diffclf attack|certify``: how much an answer can be trusted when somebody changes the image."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace
from lightning import Trainer

from lightning_diffclf.callbacks.attack import AttackTrial
from lightning_diffclf.callbacks.certification import CertificationTrial
from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback
from lightning_diffclf.callbacks.trial import Trial, TrialCallback
from lightning_diffclf.cli import DiffClfCLI, test_arguments
from lightning_diffclf.errors import UserError, check_at_least

OF_EVALUATIONS = ("plan", "corruption", "keep_errors", "calibration")
"""Options of the classifier that nothing else takes over."""


class TrialCLI(DiffClfCLI):
    """``test`` with a trial in place of the classifier, whose recipe and folder it takes over.

    Args:
        args: Those of ``test``.
        trial: What is tried.
        limit: Images at most.
    """

    def __init__(self, args: list[str], trial: Trial, limit: int | None) -> None:
        self._trial, self._limit = trial, limit
        super().__init__(args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = super().instantiate_trainer(**kwargs)
        for place, one in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(one, DiffusionClassifierCallback):
                for name in OF_EVALUATIONS:
                    if getattr(one, name):
                        raise UserError(f"{name}: {getattr(one, name)!r} is of evaluations, expected none here")
                assert one.output_dir is not None  # as test_arguments() says
                trainer.callbacks[place] = TrialCallback(  # type: ignore[attr-defined]
                    self._trial,
                    one.recipe,
                    one.output_dir,
                    microbatch=one.microbatch,
                    limit=self._limit,
                    part=one.part,
                    next_free=one.next_free,
                )
        return trainer


def attack_command(given: Namespace) -> None:
    """``diffclf attack``: robust accuracy of a checkpoint."""
    own = ("eps", "norm", "steps", "restarts", "seeds", "randomness", "eot", "auto", "seed", "draws", "batch_size")
    run(given, AttackTrial(**{name: given[name] for name in own}))


def certify_command(given: Namespace) -> None:
    """``diffclf certify``: certified accuracy of a checkpoint."""
    own = ("sigma", "n0", "n", "alpha", "radii", "seed", "draws", "batch_size")
    run(given, CertificationTrial(**{name: given[name] for name in own}))


def run(given: Namespace, trial: Trial) -> None:
    """Try something on the test images."""
    check_at_least(1, limit=given.limit)
    args = test_arguments(given, trial.kind, ["--trainer.inference_mode=false"])
    TrialCLI(args, trial, given.limit)
