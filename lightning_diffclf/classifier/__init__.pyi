"""What the method offers: what is imported here is what the package has."""

from lightning_diffclf.classifier.cascade import Cascade as Cascade
from lightning_diffclf.classifier.classification import Classification as Classification
from lightning_diffclf.classifier.conformal import Conformal as Conformal
from lightning_diffclf.classifier.covariance_search import CovarianceSearch as CovarianceSearch
from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier as DiffusionClassifier
from lightning_diffclf.classifier.discriminative import DiscriminativeClassifier as DiscriminativeClassifier
from lightning_diffclf.classifier.draws import Draws as Draws
from lightning_diffclf.classifier.elimination import Elimination as Elimination
from lightning_diffclf.classifier.elimination import Exhaustive as Exhaustive
from lightning_diffclf.classifier.elimination import Round as Round
from lightning_diffclf.classifier.elimination import Stages as Stages
from lightning_diffclf.classifier.flight import Landed as Landed
from lightning_diffclf.classifier.linear_probe import LinearProbe as LinearProbe
from lightning_diffclf.classifier.logits import DiffusionLogits as DiffusionLogits
from lightning_diffclf.classifier.posterior import Posterior as Posterior
from lightning_diffclf.classifier.recipe import Proposal as Proposal
from lightning_diffclf.classifier.recipe import Recipe as Recipe
from lightning_diffclf.classifier.score import Loss as Loss
from lightning_diffclf.classifier.search import GradientSearch as GradientSearch
from lightning_diffclf.classifier.sequential import LikelihoodRatio as LikelihoodRatio
from lightning_diffclf.classifier.sequential import PairedTest as PairedTest
