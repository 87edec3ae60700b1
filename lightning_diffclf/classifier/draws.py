"""Which (timestep, noise) pairs an image is judged by.

Noise is keyed: it depends on (seed, image id, draw index) and on nothing else, so results do not depend on batch size,
order, ranks or resume. Timesteps are the middles of equal parts of the time axis, visited in a nested order, so
that any prefix covers the axis evenly and stopping early is never lopsided; antithetic ones, middle first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.errors import UserError, WrongType, check_at_least
from lightning_diffclf.noise import KeyedNoise
from lightning_diffclf.schedule import NoiseSchedule

__all__ = ["Draws", "KeyedNoise", "middle_first", "nested_order"]

GOLDEN_RATIO = (5**0.5 - 1) / 2


def nested_order(count: int) -> Tensor:
    """A permutation (count,) of 0 … count-1 whose every prefix is spread evenly (golden-ratio sequence).

    The multiples of the golden ratio modulo 1 fill the unit interval with at most three gap lengths after any number of
    points (Steinhaus' three-gap theorem); their ranks are the order in which an even grid is visited. It starts in the
    middle, because the first draws decide most and the ends of the time axis say least: nearly all noise, or nearly
    none.

    Example:
        >>> nested_order(8).tolist()
        [3, 0, 5, 2, 7, 4, 1, 6]
    """
    return ((torch.arange(count, dtype=torch.float64) * GOLDEN_RATIO + 0.5) % 1).argsort().argsort()


def middle_first(count: int) -> Tensor:
    """A permutation (count,) of 0 … count-1 whose prefixes are spread as 6 x (1 - x) is: densely in the middle.

    As :func:`nested_order`, on an axis that is measured by the share of this density, 3 x² - 2 x³, each time the
    nearest place that was not visited. The ends say least, and come last. To be spent to the end, or until a
    rule that weighs what is left has decided: means of the first ones are not those of an even grid.

    Example:
        >>> middle_first(8).tolist()
        [3, 1, 5, 2, 6, 4, 0, 7]
    """
    place = (np.arange(count) + 0.5) / count
    share = place**2 * (3 - 2 * place)
    visited = np.empty(count, dtype=np.int64)
    for number, rank in enumerate(nested_order(count).tolist()):
        visited[number] = nearest = np.abs(share - place[rank]).argmin()
        share[nearest] = np.inf
    return torch.from_numpy(visited)


@dataclass(frozen=True, eq=False)
class Draws:
    """The (t, noise) pairs of every image: how many at most, and where they come from.

    Args:
        count: Number of draws that an image may spend, at most the number of distinct timesteps.
        grid: Timesteps of the even grid that draws are taken from, ``count`` if omitted. Of a finer one, the first
            ``count`` in nested order are spent, so that runs on one grid have their first draws in common, whatever
            their number.
        seed: Seed of the keyed noise.
        timesteps: Fixed timesteps (count,) to use instead of the even grid, in the order to visit them.
        noise: Fixed noise (count, C, h, w) to use for every image instead of keyed noise: ``noise[j]`` belongs to
            the j-th draw, as in the paper's DiT and Winoground runs.
        antithetic: Take draws in pairs, with noise ε and then -ε at the same timestep (Hammersley & Morton 1956).
            What noise does to the difference between two candidates' errors is mostly odd in ε, and cancels. There are
            then half as many timesteps as draws, visited :func:`middle_first`; of a ``grid``, in nested order.

    Raises:
        ValueError: if ``count`` is below 1, above ``grid``, or does not match ``timesteps`` or ``noise``; if a grid
            is given beside fixed timesteps; or if antithetic draws are odd in number, or beside what is fixed.

    Example:
        >>> Draws(4).visit(NoiseSchedule.linear(num_timesteps=1000)).tolist()
        [625, 125, 875, 375]
        >>> [Draws(n, grid=1000).visit(NoiseSchedule.linear(num_timesteps=1000)).tolist() for n in (2, 3)]
        [[500, 118], [500, 118, 736]]
        >>> Draws(4, antithetic=True).visit(NoiseSchedule.linear(num_timesteps=1000)).tolist()
        [750, 750, 250, 250]
    """

    count: int = 250
    seed: int = 0
    timesteps: Tensor | None = None
    noise: Tensor | None = None
    grid: int | None = None
    antithetic: bool = False

    def __post_init__(self) -> None:
        check_at_least(1, draws=self.count, grid=self.grid)
        for name, given in (("timesteps", self.timesteps), ("noise", self.noise)):
            if given is not None and not (isinstance(given, Tensor) and given.ndim > 0):
                raise WrongType(f"draws: {name} are a {type(given).__name__}, expected a tensor of {self.count}")
            if given is not None and len(given) != self.count:
                raise UserError(f"draws: count is {self.count} but {len(given)} {name} are given")

        if self.grid is not None and self.timesteps is not None:
            raise UserError(f"draws: a grid of {self.grid} beside fixed timesteps, expected one of them")
        if self.antithetic and (self.timesteps is not None or self.noise is not None):
            raise UserError("draws: antithetic ones beside fixed timesteps or noise, expected one of them")
        if self.antithetic and self.count % 2:
            raise UserError(f"draws: {self.count} antithetic ones, expected an even number: two for each timestep")
        if self.grid is not None and self.grid < self._timesteps:
            raise UserError(f"grid: {self.grid} timesteps for {self.count} draws, expected at least {self._timesteps}")

    @property
    def _timesteps(self) -> int:
        """How many timesteps are visited."""
        return self.count // 2 if self.antithetic else self.count

    def fill(self, keyed: KeyedNoise, out: np.ndarray, key: np.ndarray, draw: int) -> None:
        """Write the noise of one draw into ``out``, as :meth:`KeyedNoise.fill` does."""
        second = self.antithetic and draw % 2 == 1
        keyed.fill(out, key, draw - second)
        if second:
            np.negative(out, out=out)

    def visit(self, schedule: NoiseSchedule, order: Sequence[int] | None = None) -> Tensor:
        """Timesteps in the order in which they are spent.

        Args:
            schedule: Says which timesteps exist.
            order: Positions on the ascending grid of ``len(order)`` timesteps; the nested order of ``count`` if None.

        Raises:
            ValueError: if there are more draws than distinct timesteps, fewer draws than ``order`` needs, or fixed
                timesteps that the schedule has not.
        """
        if order is not None and len(order) > self.count:
            raise UserError(f"draws: {self.count}, but the elimination rule spends up to {len(order)}")
        if self.timesteps is not None:
            _check(self.timesteps, schedule)
            return self.timesteps if order is None else self.timesteps[torch.as_tensor(order)]
        if order is None:
            grid = self._timesteps if self.grid is None else self.grid
            visits = middle_first if self.antithetic and self.grid is None else nested_order
            visited = schedule.timesteps(grid)[visits(grid)[: self._timesteps]]
            return visited.repeat_interleave(2) if self.antithetic else visited
        if self.antithetic:
            raise UserError("antithetic: true, but the elimination rule has grids of its own; expected false")
        if self.grid is not None:
            raise UserError(f"grid: {self.grid}, but the elimination rule has grids of its own; expected null")
        return schedule.timesteps(len(order))[torch.as_tensor(order)]


def _check(timesteps: Tensor, schedule: NoiseSchedule) -> None:
    """Raise ValueError unless fixed timesteps are on the schedule: an index below zero would count from the end."""
    last: Any = getattr(schedule, "num_timesteps", None)
    if last is not None:
        whole = not (timesteps.dtype.is_floating_point or timesteps.dtype == torch.bool)
        right = whole and bool(((timesteps >= 0) & (timesteps < last)).all())
        expected = f"integers in 0 … {last - 1}"
    else:
        levels = torch.stack([schedule.alpha(timesteps), schedule.sigma(timesteps)])
        right = bool((levels.isfinite() & (levels >= 0)).all())
        expected = "times at which the schedule has a noise level"
    if timesteps.ndim != 1 or not right:
        low, high = (f"{float(end):g}" for end in timesteps.aminmax())
        found = f"shape {tuple(timesteps.shape)}, {timesteps.dtype}, from {low} to {high}"
        raise UserError(f"draws: timesteps of {found}, expected {expected} (count,)")
