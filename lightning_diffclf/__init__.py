"""Turn any conditional denoiser into a classifier, and train one with PyTorch Lightning."""

from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback
from lightning_diffclf.callbacks.ema import EMA
from lightning_diffclf.classifier import (
    Classification,
    DiffusionClassifier,
    Draws,
    Elimination,
    Exhaustive,
    GradientSearch,
    LikelihoodRatio,
    PairedTest,
    Posterior,
    Recipe,
    Stages,
)
from lightning_diffclf.denoiser import Candidates, ConditionalDenoiser, SearchableDenoiser
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
from lightning_diffclf.modules.zero_shot_sd import ZeroShotStableDiffusion
from lightning_diffclf.schedule import NoiseSchedule
from lightning_diffclf.zero_shot import pipeline

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
    "pipeline",
]
