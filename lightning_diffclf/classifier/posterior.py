"""From scores to probabilities."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError

CELLS = 2**18  # logits that a fit differentiates together: of many classes, all would take ten times their memory


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

    After elimination, give it differences (:attr:`~.classification.Classification.differences_K`) in place of scores:
    scores are then means over different draws, and the lowest may be another candidate's than the winner's. Where
    classes have several candidates, give it :func:`class_differences`.
    :attr:`~.classification.Classification.probabilities_K` does both. Candidates with infinite or NaN scores get
    probability 0; where no candidate has a finite score, all are equally likely.

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
            scores_BK: Mean error of K candidates for B images, over the same draws; or what they differ by.
            dims: Number of values of x0, D.

        Returns:
            (B, K) float64, each row sums to one.
        """
        return self.log_probabilities(scores_BK, dims).exp()

    def fit(self, scores_BK: Tensor, target_B: Tensor, dims: int) -> Posterior:
        """The same posterior with the temperature that maximises the likelihood of held-out images.

        Args:
            scores_BK: As in :meth:`__call__`, of images that were used for nothing else.
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
        target_B = target_B.to(scores_BK.device)
        # A broken right candidate has probability zero at any temperature: such images say nothing.
        usable_B = scores_BK.gather(1, target_B[:, None])[:, 0].isfinite()
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode cannot be differentiated
            logits_BK, target_B = -scores_BK[usable_B].double(), target_B[usable_B]
            finite = logits_BK.isfinite()
            # Only differences within an image matter, and errors of images differ far more than those of its
            # candidates. In place, as these arrays are large.
            logits_BK.sub_(logits_BK.gather(1, target_B[:, None])).masked_fill_(~finite, 0)
            spread = torch.linalg.vector_norm(logits_BK) / logits_BK.count_nonzero().sqrt()
            if not bool(spread > 0):  # no two candidates differ: all temperatures are equally likely
                return self
            # Start where the logits have unit spread. In log temperature the problem is smooth and has one minimum.
            logits_BK.div_(spread)
        with torch.inference_mode(False), torch.enable_grad():
            log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
            together = max(1, CELLS // num_candidates)
            optimizer = torch.optim.LBFGS([log_temperature], max_iter=200, line_search_fn="strong_wolfe")

            def negative_log_likelihood() -> Tensor:
                optimizer.zero_grad()
                total = torch.zeros((), dtype=torch.float64)
                for logits, known, target in zip(
                    *(t.split(together) for t in (logits_BK, finite, target_B)), strict=True
                ):
                    # Bounded, because the best temperature of a flawless classifier is zero.
                    logits = (logits * torch.exp(-log_temperature.clamp(-10, 10))).where(known, -torch.inf)
                    loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum") / len(target_B)
                    loss.backward()
                    total += loss.detach()
                return total

            optimizer.step(negative_log_likelihood)
        fitted = float(spread * log_temperature.detach().clamp(-10, 10).exp())
        return replace(self, temperature=fitted * (dims if self.reduction == "sum" else 1))


def class_differences(differences_BK: Tensor, class_BK: Tensor, num_classes: int) -> Tensor:
    """What a posterior over classes is made of: each class stands where its best candidate stands.

    So the likeliest class is the one decided for, and a class gains nothing by having more candidates (prompts).

    Args:
        differences_BK: How much larger the mean error of each candidate is than the winner's
            (:attr:`~.classification.Classification.differences_K`).
        class_BK: Class of each candidate, 0 … ``num_classes`` - 1, int64; anything where the difference is infinite.
        num_classes: Number of classes C.

    Returns:
        (B, C) float64; infinite for classes without a candidate whose difference is finite.

    Example:
        >>> differences_1K, class_1K = torch.tensor([[0.5, 0.0, 0.25]]), torch.tensor([[0, 2, 0]])
        >>> class_differences(differences_1K, class_1K, num_classes=3).tolist()
        [[0.25, inf, 0.0]]
    """
    differences_BK = differences_BK.double().nan_to_num(nan=torch.inf, posinf=torch.inf)
    best_BC = differences_BK.new_full((len(differences_BK), num_classes), torch.inf)
    inside_BK = class_BK.to(best_BC.device).clamp(0, num_classes - 1)
    return best_BC.scatter_reduce_(1, inside_BK, differences_BK, "amin")
