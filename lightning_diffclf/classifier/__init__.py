"""The method: turns any conditional denoiser into a classifier. Needs torch and numpy only."""

from lightning_diffclf.classifier.cascade import Cascade
from lightning_diffclf.classifier.classification import Classification
from lightning_diffclf.classifier.draws import Draws
from lightning_diffclf.classifier.elimination import Elimination, Exhaustive, Round, Stages
from lightning_diffclf.classifier.engine import DiffusionClassifier
from lightning_diffclf.classifier.linear_probe import LinearProbe
from lightning_diffclf.classifier.posterior import Posterior
from lightning_diffclf.classifier.recipe import Proposal, Recipe
from lightning_diffclf.classifier.score import Loss
from lightning_diffclf.classifier.search import GradientSearch
from lightning_diffclf.classifier.sequential import LikelihoodRatio, PairedTest

__all__ = [
    "Cascade",
    "Classification",
    "DiffusionClassifier",
    "Draws",
    "Elimination",
    "Exhaustive",
    "GradientSearch",
    "LikelihoodRatio",
    "LinearProbe",
    "Loss",
    "PairedTest",
    "Posterior",
    "Proposal",
    "Recipe",
    "Round",
    "Stages",
]
