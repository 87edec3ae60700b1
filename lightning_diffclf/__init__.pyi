"""The public names: what is imported here is what the package has."""

from lightning_diffclf.callbacks.diffusion_classifier import DiffusionClassifierCallback as DiffusionClassifierCallback
from lightning_diffclf.callbacks.ema import EMA as EMA
from lightning_diffclf.candidates import Candidates as Candidates
from lightning_diffclf.classifier.cascade import Cascade as Cascade
from lightning_diffclf.classifier.classification import Classification as Classification
from lightning_diffclf.classifier.conformal import Conformal as Conformal
from lightning_diffclf.classifier.covariance_search import CovarianceSearch as CovarianceSearch
from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier as DiffusionClassifier
from lightning_diffclf.classifier.discriminative import DiscriminativeClassifier as DiscriminativeClassifier
from lightning_diffclf.classifier.draws import Draws as Draws
from lightning_diffclf.classifier.elimination import Elimination as Elimination
from lightning_diffclf.classifier.elimination import Exhaustive as Exhaustive
from lightning_diffclf.classifier.elimination import Stages as Stages
from lightning_diffclf.classifier.linear_probe import LinearProbe as LinearProbe
from lightning_diffclf.classifier.logits import DiffusionLogits as DiffusionLogits
from lightning_diffclf.classifier.posterior import Posterior as Posterior
from lightning_diffclf.classifier.recipe import Recipe as Recipe
from lightning_diffclf.classifier.search import GradientSearch as GradientSearch
from lightning_diffclf.classifier.sequential import LikelihoodRatio as LikelihoodRatio
from lightning_diffclf.classifier.sequential import PairedTest as PairedTest
from lightning_diffclf.denoiser import ConditionalDenoiser as ConditionalDenoiser
from lightning_diffclf.denoiser import SearchableDenoiser as SearchableDenoiser
from lightning_diffclf.discriminative import Discriminative as Discriminative
from lightning_diffclf.models.dit import DiT as DiT
from lightning_diffclf.modules.adapters import LoraStableDiffusion as LoraStableDiffusion
from lightning_diffclf.modules.adapters import SoftPrompts as SoftPrompts
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT as ClassConditionalDiT
from lightning_diffclf.modules.published_network import PublishedNetwork as PublishedNetwork
from lightning_diffclf.modules.zero_shot_sd import ZeroShotStableDiffusion as ZeroShotStableDiffusion
from lightning_diffclf.schedule import NoiseSchedule as NoiseSchedule
from lightning_diffclf.zero_shot import pipeline as pipeline

__version__: str
