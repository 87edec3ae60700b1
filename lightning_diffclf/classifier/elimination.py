"""Which candidates survive: the rules that stop spending draws on candidates that cannot win."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from lightning_diffclf.errors import UserError

Needs = Literal["scores", "errors", "distances"]


@dataclass(frozen=True)
class Round:
    """What a rule is shown at each of its stops: the draws since the stop before (R) and the contestants in play (A).

    Contestants are the candidates; or classes, where means over their candidates (prompts) decide.

    Attributes:
        loss: Name of the error, as :class:`~.score.Loss` has it.
        done: Draws finished, those of this round included.
        total: Draws that an image may spend.
        dims: Number of values of x0, D.
        active_A: Which of the image's contestants are in play (A,), int64, ascending. One whose error was NaN or
            infinite is in play no more.
        scores_A: Mean weighted error over all ``done`` draws (A,), float64. All candidates in play have seen the same
            draws.
        log_snr_R: Log signal-to-noise ratio of each draw of this round (R,), float64.
        weights_R: Weight of each draw of this round (R,), float64, mean 1 over all draws of an image.
        errors_RA: Error of each draw of this round without its weight (R, A), float32; None unless the rule needs
            errors or distances.
        distances_RAA: Mean squared difference between the noise that two candidates predict, over the D values of x0
            (R, A, A), float32; None unless the rule needs distances.
    """

    loss: str
    done: int
    total: int
    dims: int
    active_A: np.ndarray
    scores_A: np.ndarray
    log_snr_R: np.ndarray
    weights_R: np.ndarray
    errors_RA: np.ndarray | None = None
    distances_RAA: np.ndarray | None = None


class Elimination:
    """A rule that drops candidates before all draws are spent. This one drops none; others override what they need.

    Attributes:
        needs: What :class:`Round` must hold. ``scores`` costs no memory, ``errors`` R × A numbers for each image in
            flight, ``distances`` R × A × A, and R × A × D on the network's device until a round is complete.
    """

    needs: ClassVar[Needs] = "scores"

    def check(self, loss: str) -> None:
        """Raise ValueError if the rule makes no sense for errors of this :class:`~.score.Loss`."""

    def informed(self, inflation: float | None) -> Elimination:
        """With what was measured of a network, where the rule left it open.

        Args:
            inflation: How many times as much differences of errors vary within an image as :class:`~.LikelihoodRatio`
                assumes; None if that is still to be measured.
        """
        return self

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

    def survivors_of(self, states: Sequence[Any], rounds: Sequence[Round]) -> list[np.ndarray]:
        """:meth:`survivors` of several images; for rules that can think about them together."""
        return [self.survivors(state, current) for state, current in zip(states, rounds, strict=True)]


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
            raise UserError(f"Stages: samples {self.samples} and keep {self.keep}, expected equally many, at least one")
        if min(self.samples) < 1 or any(a >= b for a, b in zip(self.samples, self.samples[1:], strict=False)):
            raise UserError(f"Stages: samples {self.samples}, expected rising numbers from 1 on")
        if min(self.keep) < 1 or any(a < b for a, b in zip(self.keep, self.keep[1:], strict=False)):
            raise UserError(f"Stages: keep {self.keep}, expected numbers that never rise, at least 1")

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
