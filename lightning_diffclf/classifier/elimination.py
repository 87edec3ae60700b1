"""Which candidates survive: the rules that stop spending draws on candidates that cannot win."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from torch import Tensor

Needs = Literal["scores", "errors", "predictions"]


@dataclass(frozen=True)
class Round:
    """What a rule is shown at each of its stops: the draws since the stop before (R) and the candidates in play (A).

    Rules run under the caller's autocast; one that multiplies predictions has to switch it off to stay in float32.

    Attributes:
        done: Draws finished, those of this round included.
        active_A: Positions of the candidates in play among the image's own candidates (A,), int64.
        scores_A: Mean error over all ``done`` draws (A,), float64. All candidates in play have seen the same draws.
        errors_RA: Error of each draw of this round (R, A), float32; None unless the rule needs errors.
        predictions_RAD: Predicted noise of each draw of this round (R, A, D), float32, on the network's device, D the
            number of values of x0; None unless the rule needs predictions.
        noise_RD: True noise of those draws (R, D), likewise.
    """

    done: int
    active_A: np.ndarray
    scores_A: np.ndarray
    errors_RA: np.ndarray | None = None
    predictions_RAD: Tensor | None = None
    noise_RD: Tensor | None = None


class Elimination:
    """A rule that drops candidates before all draws are spent. This one drops none; others override what they need.

    Attributes:
        needs: What :class:`Round` must hold. ``scores`` costs no memory, ``errors`` R × A numbers and ``predictions``
            R × A × D numbers for each image in flight.
    """

    needs: Needs = "scores"

    def order(self, count: int) -> Sequence[int] | None:
        """Order in which the ascending grid of timesteps is visited: positions, as many as the rule spends at most.

        None leaves both to :class:`Draws`; ``count`` is the number of draws that it allows.
        """
        return None

    def start(self, num_candidates: int) -> Any:
        """Whatever the rule remembers about one image between its stops."""
        return None

    def next_stop(self, done: int, total: int) -> int:
        """Number of draws, in done+1 … total, after which :meth:`survivors` is asked next."""
        return total

    def survivors(self, state: Any, current: Round) -> np.ndarray:
        """Which candidates stay in play: bool (A,), at least one True."""
        return np.ones(len(current.active_A), dtype=bool)


@dataclass(frozen=True)
class Exhaustive(Elimination):
    """Every candidate sees every draw. The reference for all other rules."""


@dataclass(frozen=True)
class Stages(Elimination):
    """The paper's adaptive evaluation (Li et al. 2023, Algorithm 2), grid for grid as its authors ran it.

    After each stage the ``keep`` best candidates go on. Stage i covers every (count // samples[i])-th point of the grid
    of ``count = samples[-1]`` timesteps, from the middle of the first gap on, without the points already spent. These
    grids are not always nested, so an early stage may leave more to spend than the difference of the sample counts.

    Args:
        samples: Timesteps that each survivor has seen after each stage, rising; the last is the number of draws.
        keep: Candidates kept after each stage, never rising.

    Raises:
        ValueError: if lengths differ, ``samples`` does not rise or ``keep`` rises or goes below 1.

    Example:
        >>> rule = Stages(samples=(2, 8), keep=(2, 1))
        >>> rule.order(8)  # two timesteps spread over the grid, then the other six
        [2, 6, 0, 1, 3, 4, 5, 7]
        >>> rule.next_stop(0, 8), rule.next_stop(2, 8)
        (2, 8)
    """

    samples: Sequence[int] = (50, 500)
    keep: Sequence[int] = (5, 1)

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.keep) or not self.samples:
            raise ValueError(
                f"Stages: samples {self.samples} and keep {self.keep}, expected equally many, at least one"
            )
        if min(self.samples) < 1 or any(a >= b for a, b in zip(self.samples, self.samples[1:], strict=False)):
            raise ValueError(f"Stages: samples {self.samples}, expected rising numbers from 1 on")
        if min(self.keep) < 1 or any(a < b for a, b in zip(self.keep, self.keep[1:], strict=False)):
            raise ValueError(f"Stages: keep {self.keep}, expected numbers that never rise, at least 1")

    @cached_property
    def _plan(self) -> tuple[list[int], list[int]]:
        """Visiting order of the grid, and the number of draws spent after each stage."""
        count = self.samples[-1]
        order: list[int] = []
        stops: list[int] = []
        for samples in self.samples:
            stride = count // samples
            seen = set(order)
            order += [i for i in range(stride // 2, count, stride)[:samples] if i not in seen]
            stops.append(len(order))
        return order, stops

    def order(self, count: int) -> Sequence[int]:
        return self._plan[0]

    def next_stop(self, done: int, total: int) -> int:
        return next(stop for stop in self._plan[1] if stop > done)

    def survivors(self, state: Any, current: Round) -> np.ndarray:
        # Stages that add no timestep share a stop: the last of them decides.
        keep = self.keep[bisect_right(self._plan[1], current.done) - 1]
        survives = np.zeros(len(current.active_A), dtype=bool)
        survives[np.argsort(current.scores_A, kind="stable")[:keep]] = True
        return survives
