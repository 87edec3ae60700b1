"""Probabilities where classes are not equally common."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diffclf.errors import UserError


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
