"""The method: turns any conditional denoiser into a classifier. Needs torch, numpy and scipy only."""

from typing import TYPE_CHECKING

from lightning_diffclf.lazy import members

if TYPE_CHECKING:
    from lightning_diffclf.classifier.classification import Classification
    from lightning_diffclf.classifier.draws import Draws
    from lightning_diffclf.classifier.elimination import Elimination, Exhaustive, Round, Stages
    from lightning_diffclf.classifier.engine import DiffusionClassifier
    from lightning_diffclf.classifier.posterior import Posterior
    from lightning_diffclf.classifier.recipe import Proposal, Recipe
    from lightning_diffclf.classifier.score import Loss
    from lightning_diffclf.classifier.search import GradientSearch
    from lightning_diffclf.classifier.sequential import LikelihoodRatio, PairedTest

__all__ = [
    "Classification",
    "DiffusionClassifier",
    "Draws",
    "Elimination",
    "Exhaustive",
    "GradientSearch",
    "LikelihoodRatio",
    "Loss",
    "PairedTest",
    "Posterior",
    "Proposal",
    "Recipe",
    "Round",
    "Stages",
]

__getattr__, __dir__ = members(
    __name__,
    {
        "classification": ("Classification",),
        "draws": ("Draws",),
        "elimination": ("Elimination", "Exhaustive", "Round", "Stages"),
        "engine": ("DiffusionClassifier",),
        "posterior": ("Posterior",),
        "recipe": ("Proposal", "Recipe"),
        "score": ("Loss",),
        "search": ("GradientSearch",),
        "sequential": ("LikelihoodRatio", "PairedTest"),
    },
)
