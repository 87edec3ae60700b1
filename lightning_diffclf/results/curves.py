"""What curves over all images are made of, counted chunk by chunk."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from lightning_diffclf.results.columns import Chunk, Columns
from lightning_diffclf.results.statistics import selective_scores
from lightning_diffclf.results.summary import Outline

POINTS = 200  # of a curve: more cannot be seen


def thin(count: int) -> np.ndarray:
    """At most :data:`POINTS` positions of ``count``, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))


class Sureness:
    """A few numbers for each image, in the order given: how sure the decision is, and whether it is right."""

    COLUMNS = ("id", "label", "prediction", "margin", "choice_S")

    def __init__(self) -> None:
        self._ids: list[pa.ChunkedArray] = []
        self._parts: list[tuple[np.ndarray, ...]] = []

    def update(self, chunk: Chunk) -> None:
        """Take more images."""
        columns = Columns.of(chunk, self.COLUMNS)
        prediction_B, choice = columns.numbers("prediction"), columns.lists("choice_S")
        agree = (choice.values == prediction_B[choice.row]) & (choice.values >= 0)
        votes_B = np.bincount(choice.row[agree], minlength=len(columns)) / np.maximum(choice.length, 1)
        # An image without an answer has no rival either, so that its margin is infinite: it is the least sure of all.
        margin_B = np.where(prediction_B >= 0, columns.numbers("margin"), -np.inf)
        self._ids.append(columns.table["id"])
        self._parts.append((columns.numbers("label"), prediction_B, margin_B, votes_B))

    @cached_property
    def _columns(self) -> list[np.ndarray]:
        return [np.concatenate(parts) for parts in zip(*self._parts, strict=True)]

    @cached_property
    def ids(self) -> pa.ChunkedArray:
        """Id of each image (B,)."""
        return pa.chunked_array([piece for some in self._ids for piece in some.chunks], pa.string())

    @property
    def label(self) -> np.ndarray:
        """Class of each image (B,), int64; -1 if unknown."""
        return self._columns[0]

    @property
    def right(self) -> np.ndarray:
        """Whether it was decided rightly (B,), bool."""
        return np.asarray(self._columns[0] == self._columns[1]) & (self._columns[0] >= 0)

    @property
    def margin(self) -> np.ndarray:
        """Evidence in nats (B,), float64; minus infinity without an answer."""
        return self._columns[2]

    def selective(self) -> dict[str, float]:
        """:func:`~.statistics.selective_scores` of the labelled images by their margin, on which ``abstain`` acts."""
        known_B = self.label >= 0
        return selective_scores(self.margin[known_B], self.right[known_B])

    @property
    def votes(self) -> np.ndarray:
        """Share of the draws that alone would have decided likewise (B,), float64."""
        return self._columns[3]


class Costs:
    """Accuracy of the answer so far, and network calls so far, after each draw.

    Args:
        outline: The evaluation.

    Attributes:
        labelled: Images with a label.
        draws: Draws spent on the image that took most.
    """

    COLUMNS = ("label", "draws_K", "leader_S", "search_nfe")

    def __init__(self, outline: Outline) -> None:
        self.labelled = self.draws = self._searches = 0
        self._right_S, self._alive_S = (np.zeros(len(outline.timesteps_S), dtype=np.int64) for _ in range(2))

    def update(self, chunk: Chunk) -> None:
        """Count more images."""
        columns = Columns.of(chunk, self.COLUMNS)
        self.draws = max(self.draws, int(columns.lists("leader_S").length.max(initial=0)))
        columns = columns.labelled
        label_B, draws, leader = columns.numbers("label"), columns.lists("draws_K"), columns.lists("leader_S")
        self.labelled += len(columns)
        self._searches += int(columns.numbers("search_nfe").clip(min=0).sum())  # spent before the first draw
        total = len(self._right_S)
        self._alive_S += seen_by(draws.values, total)
        hit = leader.values == label_B[leader.row]
        self._right_S += np.bincount(leader.position[hit], minlength=total)
        # After the decision, the answer stays.
        ended = leader.length[leader.row[hit & (leader.position + 1 == leader.length[leader.row])]]
        self._right_S += np.bincount(ended, minlength=total + 1)[:total].cumsum()

    @property
    def accuracy_S(self) -> np.ndarray:
        """Of the answer after each draw (S,), 0 … 1."""
        return self._right_S[: self.draws] / max(self.labelled, 1)

    @property
    def nfe_S(self) -> np.ndarray:
        """Network calls for an image until then, on average (S,)."""
        return (self._searches + self._alive_S[: self.draws].cumsum()) / max(self.labelled, 1)


class Survivors:
    """Candidates in play at each draw, 1 or 0 after the decision: how often there were how many.

    Args:
        outline: The evaluation.
    """

    COLUMNS = ("draws_K",)

    def __init__(self, outline: Outline) -> None:
        self._draws = len(outline.timesteps_S)
        self._at = thin(self._draws)
        self._counts_PK = np.zeros((len(self._at), 2), dtype=np.int64)
        self._longest = 0

    def update(self, chunk: Chunk) -> None:
        """Count more images."""
        columns = Columns.of(chunk, self.COLUMNS)
        draws, total = columns.lists("draws_K"), self._draws
        self._longest = max(self._longest, int(draws.values.max(initial=0)))
        ended_BS = np.bincount(draws.row * (total + 1) + draws.values, minlength=len(columns) * (total + 1))
        alive_BS = ended_BS.reshape(len(columns), total + 1)[:, ::-1].cumsum(1)[:, ::-1][:, 1:]
        most = int(draws.length.max(initial=0)) + 1
        if most > self._counts_PK.shape[1]:
            self._counts_PK = np.pad(self._counts_PK, ((0, 0), (0, most - self._counts_PK.shape[1])))
        for point, s in enumerate(self._at):
            self._counts_PK[point] += np.bincount(alive_BS[:, s], minlength=self._counts_PK.shape[1])

    @property
    def draw(self) -> np.ndarray:
        """Draws 1 … S, or some of them (P,)."""
        return np.asarray(self._at[self._at < self._longest] + 1)

    @property
    def mean(self) -> np.ndarray:
        """Candidates in play at each (P,), on average."""
        counts_PK = self._counts_PK[: len(self.draw)]
        return np.asarray(counts_PK @ np.arange(counts_PK.shape[1]) / counts_PK.sum(1))

    def quantile(self, q: float) -> np.ndarray:
        """That many candidates or fewer in a share ``q`` of the images (P,), with linear interpolation."""
        below_PK = self._counts_PK[: len(self.draw)].cumsum(1)
        place = q * (below_PK[0, -1] - 1)
        low, high = ((below_PK <= rank).sum(1) for rank in (np.floor(place), np.ceil(place)))
        return np.asarray(low + (high - low) * (place % 1))


def seen_by(draws: np.ndarray, total: int) -> np.ndarray:
    """How many of those that saw ``draws`` (N,) saw each of ``total`` draws (total,)."""
    return np.bincount(draws, minlength=total + 1)[::-1].cumsum()[::-1][1 : total + 1]
