"""Turn any conditional denoiser into a classifier, and train one with PyTorch Lightning."""

from typing import TYPE_CHECKING

from lightning_diffclf.lazy import members

if TYPE_CHECKING:
    from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback
    from lightning_diffclf.callbacks.ema import EMA
    from lightning_diffclf.candidates import Candidates
    from lightning_diffclf.classifier.classification import Classification
    from lightning_diffclf.classifier.draws import Draws
    from lightning_diffclf.classifier.elimination import Elimination, Exhaustive, Stages
    from lightning_diffclf.classifier.engine import DiffusionClassifier
    from lightning_diffclf.classifier.posterior import Posterior
    from lightning_diffclf.classifier.recipe import Recipe
    from lightning_diffclf.classifier.search import GradientSearch
    from lightning_diffclf.classifier.sequential import LikelihoodRatio, PairedTest
    from lightning_diffclf.denoiser import ConditionalDenoiser, SearchableDenoiser
    from lightning_diffclf.models.dit import DiT
    from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
    from lightning_diffclf.modules.zero_shot_sd import ZeroShotStableDiffusion
    from lightning_diffclf.schedule import NoiseSchedule

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Candidates",
    "ClassConditionalDiT",
    "Classification",
    "ConditionalDenoiser",
    "DiT",
    "DiffusionClassifier",
    "DiffusionClassifierCallback",
    "Draws",
    "Elimination",
    "Exhaustive",
    "GradientSearch",
    "LikelihoodRatio",
    "NoiseSchedule",
    "PairedTest",
    "Posterior",
    "Recipe",
    "SearchableDenoiser",
    "Stages",
    "ZeroShotStableDiffusion",
]

__getattr__, __dir__ = members(
    __name__,
    {
        "callbacks.diffusion_classifier": ("DiffusionClassifierCallback",),
        "callbacks.ema": ("EMA",),
        "candidates": ("Candidates",),
        "classifier.classification": ("Classification",),
        "classifier.draws": ("Draws",),
        "classifier.elimination": ("Elimination", "Exhaustive", "Stages"),
        "classifier.engine": ("DiffusionClassifier",),
        "classifier.posterior": ("Posterior",),
        "classifier.recipe": ("Recipe",),
        "classifier.search": ("GradientSearch",),
        "classifier.sequential": ("LikelihoodRatio", "PairedTest"),
        "denoiser": ("ConditionalDenoiser", "SearchableDenoiser"),
        "models.dit": ("DiT",),
        "modules.class_conditional_dit": ("ClassConditionalDiT",),
        "modules.zero_shot_sd": ("ZeroShotStableDiffusion",),
        "schedule": ("NoiseSchedule",),
    },
)
