"""From scores to probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError


@dataclass(frozen=True)
class Posterior:
    """Class probabilities by a softmax of negative errors (Li et al. 2023, equation 6), uniform prior.

    The error of a candidate is a *mean* over the D values of x0, so errors of candidates differ by thousandths
    and a softmax of them is nearly flat, however sure the decision is. What the numbers mean depends on two choices:

    * ``reduction="mean"``: softmax of -score. A ranking, not a probability: always close to 1/K.
    * ``reduction="sum"``: softmax of -D · score, the error summed over values as equation 6 has it: a bound on the log
      likelihood with its timestep weights set to one. It moves with the number of values and of what the
      network cannot predict at all, and is usually overconfident.
    * ``temperature``: the logits are divided by it. Fitted on labelled images that were not used otherwise
      (:meth:`fit`), it makes the probabilities match how often such decisions are right. Then the reduction does not
      matter any more: the temperature absorbs the factor D.

    Scores of candidates that were dropped early are means over fewer draws; they enter as they are, so the
    probability of a dropped candidate is an approximation. Candidates with infinite or NaN scores get probability 0;
    where no candidate has a finite score, all are equally likely.

    Args:
        reduction: ``mean`` or ``sum``.
        temperature: Positive; 1 leaves the logits alone.

    Raises:
        ValueError: if the reduction is unknown or the temperature not positive.

    Example:
        >>> scores_BK = torch.tensor([[0.101, 0.103, 0.105]])
        >>> [round(p, 3) for p in Posterior("mean")(scores_BK, dims=4096)[0].tolist()]
        [0.334, 0.333, 0.333]
        >>> [round(p, 3) for p in Posterior("sum", temperature=4.0)(scores_BK, dims=4096)[0].tolist()]
        [0.873, 0.113, 0.015]
    """

    reduction: Literal["mean", "sum"] = "sum"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise UserError(f"posterior: reduction {self.reduction!r}, expected 'mean' or 'sum'")
        if not self.temperature > 0:
            raise UserError(f"posterior: temperature {self.temperature}, expected a positive number")

    def log_probabilities(self, scores_BK: Tensor, dims: int) -> Tensor:
        """Logarithm of :meth:`__call__`, (B, K) float64."""
        logits_BK = -scores_BK.double() * (dims if self.reduction == "sum" else 1) / self.temperature
        logits_BK = logits_BK.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        return logits_BK.where(logits_BK.isfinite().any(1, keepdim=True), 0).log_softmax(1)

    def __call__(self, scores_BK: Tensor, dims: int) -> Tensor:
        """Probability of each candidate.

        Args:
            scores_BK: Mean error of K candidates for B images.
            dims: Number of values of x0, D.

        Returns:
            (B, K) float64, each row sums to one.
        """
        return self.log_probabilities(scores_BK, dims).exp()

    def fit(self, scores_BK: Tensor, target_B: Tensor, dims: int) -> Posterior:
        """The same posterior with the temperature that maximises the likelihood of held-out images.

        Args:
            scores_BK: Mean error of K candidates for B images that were used for nothing else.
            target_B: Position of the right candidate of each image, 0 … K-1, int64.
            dims: Number of values of x0, D.

        Raises:
            ValueError: if there are no images, or a target is not a position in 0 … K-1.
        """
        num_images, num_candidates = scores_BK.shape
        if num_images == 0 or len(target_B) != num_images:
            raise UserError(f"fit: {num_images} rows of scores and {len(target_B)} targets, expected equally many, ≥ 1")
        if int(target_B.min()) < 0 or int(target_B.max()) >= num_candidates:
            raise UserError(f"fit: targets {target_B.min()} … {target_B.max()}, expected 0 … {num_candidates - 1}")
        logits_BK = -scores_BK.double()
        finite = logits_BK.isfinite()
        # A broken right candidate has probability zero at any temperature: such images say nothing.
        usable_B = finite.gather(1, target_B.to(finite.device)[:, None])[:, 0]
        logits_BK, finite, target_B = logits_BK[usable_B], finite[usable_B], target_B.to(finite.device)[usable_B]
        # Only differences within an image matter, and errors of images differ far more than those of its candidates.
        logits_BK = (logits_BK - logits_BK.gather(1, target_B[:, None])).where(finite, 0)
        spread = logits_BK[logits_BK != 0].square().mean().sqrt()
        if not bool(spread > 0):  # no two candidates differ: all temperatures are equally likely
            return self
        # Start where the logits have unit spread. In log temperature the problem is smooth and has one minimum.
        with torch.inference_mode(False), torch.enable_grad():
            # Tensors of inference mode cannot be differentiated: copies.
            logits_BK, target_B, finite = logits_BK.clone() / float(spread), target_B.clone(), finite.clone()
            log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
            optimizer = torch.optim.LBFGS([log_temperature], max_iter=200, line_search_fn="strong_wolfe")

            def negative_log_likelihood() -> Tensor:
                optimizer.zero_grad()
                # Bounded, because the best temperature of a flawless classifier is zero.
                logits = logits_BK * torch.exp(-log_temperature.clamp(-10, 10))
                loss = torch.nn.functional.cross_entropy(logits.where(finite, -torch.inf), target_B)
                loss.backward()
                return loss

            optimizer.step(negative_log_likelihood)
        fitted = float(spread * log_temperature.detach().clamp(-10, 10).exp())
        return replace(self, temperature=fitted * (dims if self.reduction == "sum" else 1))


def sum_by_class(probabilities_BK: Tensor, classes: Sequence[int], num_classes: int) -> Tensor:
    """Probability of each class (B, num_classes): the sum over its candidates; ``classes`` (K,) says whose they are."""
    index = torch.as_tensor(classes, device=probabilities_BK.device)
    result = probabilities_BK.new_zeros(len(probabilities_BK), num_classes)
    return result.index_add(1, index, probabilities_BK)


def correct_prior(probabilities_BC: Tensor, prior_C: Tensor) -> Tensor:
    """Probabilities where classes are not equally common: proportional to p · prior.

    Args:
        probabilities_BC: Of a classifier that takes classes as equally likely beforehand (B, C).
        prior_C: How common each class is (C,), in any unit.

    Raises:
        ValueError: if the prior has another length, is negative, not finite or all zero.
    """
    if prior_C.shape != probabilities_BC.shape[1:]:
        raise UserError(f"prior: shape {tuple(prior_C.shape)} for {probabilities_BC.shape[1]} classes")
    if not bool(prior_C.isfinite().all()) or float(prior_C.min()) < 0 or float(prior_C.sum()) == 0:
        raise UserError("prior: expected finite shares from 0 on, not all of them 0")
    weighted_BC = probabilities_BC * prior_C
    total_B1 = weighted_BC.sum(1, keepdim=True)
    # Where only impossible classes fit, the prior is all that is left.
    return torch.where(total_B1 > 0, weighted_BC / total_B1.clamp_min(1e-300), prior_C / prior_C.sum())


def estimate_prior(probabilities_BC: Tensor, iterations: int = 200) -> Tensor:
    """How common each class is among unlabelled images (C,): expectation maximisation (Saerens et al. 2002).

    Args:
        probabilities_BC: Calibrated, of a classifier that takes classes as equally likely beforehand (B, C).
        iterations: Of the algorithm.
    """
    prior_C = probabilities_BC.new_full(probabilities_BC.shape[1:], 1 / probabilities_BC.shape[1])
    for _ in range(iterations):
        prior_C = correct_prior(probabilities_BC, prior_C).mean(0)
    return prior_C
