"""A stored run as analysed: its summary and calibration, and what else a report shows of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.classifier.posterior import class_differences
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.calibration import ENOUGH_TO_SAY, CrossFitted, Sample
from lightning_diffclf.results.columns import Counts, show
from lightning_diffclf.results.conformal import RightScores, sets_of
from lightning_diffclf.results.curves import Costs, Sureness, Survivors
from lightning_diffclf.results.groups import Grouped
from lightning_diffclf.results.parts import Seen, together
from lightning_diffclf.results.predictions import SCHEMA, Record, from_table
from lightning_diffclf.results.settings import SETTINGS, Settings
from lightning_diffclf.results.statistics import Interval, Scores
from lightning_diffclf.results.stored import Stored
from lightning_diffclf.results.summary import Outline, Summary


@dataclass(frozen=True)
class Evaluation:
    """Everything that is known about a run, whether it has ended or not.

    Its decisions are read in chunks, as often as needed; what is kept are sums, and a few numbers for each image.

    Args:
        path: Its folder.
        settings: What it was made with.
        kept: Columns of few bytes that are wanted alone; see :class:`~.stored.Stored`.

    Raises:
        ValueError: if it has no images.
    """

    path: Path
    settings: Settings
    kept: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path, kept: tuple[str, ...] = ()) -> Evaluation:
        """The run in the folder ``path``.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be read, or has no images.
        """
        evaluation = cls(Path(path), Settings.read(Path(path)), kept)
        evaluation.settings.check_evaluation(repr(str(path)))
        if evaluation.images == 0:
            raise UserError(f"run: no image in {str(path)!r} yet")
        return evaluation

    @cached_property
    def _stored(self) -> Stored:
        return Stored(self.path, self.settings, kept=self.kept)

    @cached_property
    def outline(self) -> Outline:
        """What summaries need to know."""
        try:
            return Outline.of(self.settings.info)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"run: {str(self.path / SETTINGS)!r} does not say what was evaluated ({error!r}), expected what an "
                "evaluation writes"
            ) from error

    def chunks(self, columns: Sequence[str], ids: Collection[str] | None = None) -> Iterator[pa.Table]:
        """Some columns of the decisions, a few megabytes at a time; of the images ``ids`` only, if given."""
        wanted = None if ids is None else pa.array(ids, pa.string())
        return together(self._stored.chunks(list(dict.fromkeys(columns)), wanted))

    def show(self, *counts: Counts, ids: Collection[str] | None = None) -> None:
        """Let all of ``counts`` count the decisions, which are read once; of the images ``ids`` only, if given."""
        for chunk in self.chunks([name for one in counts for name in one.COLUMNS], ids):
            show(chunk, counts)

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._stored.ids)

    # --- one pass over all decisions -------------------------------------------------------------------------------

    @cached_property
    def _first_pass(self) -> tuple[Summary, Sample, Sureness, Costs, Survivors, Grouped]:
        counts = self._counts()
        self.show(*counts)
        return counts

    def _counts(self) -> tuple[Summary, Sample, Sureness, Costs, Survivors, Grouped]:
        outline = self.outline
        return Summary(outline), Sample(outline), Sureness(), Costs(outline), Survivors(outline), Grouped()

    def watch(self) -> Seen:
        """What counts all decisions as they are written, so that they need not be read for the first pass."""
        counts = vars(self)["_first_pass"] = self._counts()
        return lambda table: show(table, counts)

    @property
    def summary(self) -> Summary:
        """The headline numbers, the confusion matrix and the accuracy of single draws."""
        return self._first_pass[0]

    @property
    def sureness(self) -> Sureness:
        """How sure each decision is."""
        return self._first_pass[2]

    @property
    def costs(self) -> Costs:
        """How accuracy grows with network calls."""
        return self._first_pass[3]

    @property
    def survivors(self) -> Survivors:
        """How many candidates are in play after each draw."""
        return self._first_pass[4]

    @property
    def accuracy(self) -> Interval | None:
        """Share of the labelled images decided rightly, None without any, with a 95 % interval.

        It is Wilson's, or where images come in groups, that of :class:`~lightning_diffclf.results.statistics.Clusters`.
        """
        summary, grouped = self.summary, self._first_pass[5]
        return grouped.accuracy(summary.right, summary.labelled) if summary.labelled else None

    @property
    def numbers(self) -> dict[str, float]:
        """The headline numbers; see :meth:`~lightning_diffclf.results.summary.Summary.numbers`."""
        return self.summary.numbers() | self._first_pass[5].numbers()

    # --- a second one, with fitted temperatures --------------------------------------------------------------------

    @cached_property
    def crossfitted(self) -> CrossFitted | None:
        """All images judged with temperatures of other folds; None if fewer than 50 have a label."""
        sample = self._first_pass[1]
        if sample.labelled < ENOUGH_TO_SAY:
            return None
        crossfitted = CrossFitted(sample)
        self.show(crossfitted)
        return crossfitted

    @cached_property
    def sets(self) -> dict[str, Any]:
        """Numbers of the conformal sets; none where no coverage was asked for, or images are too few."""
        return sets_of(self.outline, Stored(self.path, self.settings, RightScores.COLUMNS))

    @property
    def probabilities(self) -> dict[str, Scores]:
        """Scores of the probabilities as ``configured`` and, with 50 labels, as ``calibrated`` by other folds."""
        kinds = {"configured": self.summary.scores}
        return kinds if self.crossfitted is None else kinds | {"calibrated": self.crossfitted.scores}

    @cached_property
    def posterior(self) -> Posterior:
        """With the temperature that suits the labelled images; that of the run if they are below 50."""
        sample = self._first_pass[1]
        return sample.fit() if sample.labelled >= ENOUGH_TO_SAY else self.outline.posterior

    # --- images ----------------------------------------------------------------------------------------------------

    def gallery(self, most: int = 240) -> list[Record]:
        """Images to look at: wrong ones first, the surest before all; then right ones, the least sure first."""
        sure = self.sureness
        known_B = sure.label >= 0
        wrong = np.flatnonzero(known_B & ~sure.right)
        others = np.flatnonzero(~known_B | sure.right)
        wrong = wrong[np.argsort(-sure.margin[wrong], kind="stable")][: most * 3 // 4]
        others = others[np.argsort(sure.margin[others], kind="stable")][: most - len(wrong)]
        shown = sure.ids.take(pa.array(np.concatenate([wrong, others]))).to_pylist()
        found = {row.id: row for chunk in self.chunks(SCHEMA.names, shown) for row in from_table(chunk)}
        return [found[image_id] for image_id in shown]

    def story(self, row: Record, most: int = 10) -> list[dict[str, Any]]:
        """The best candidates of an image: probability of its class, draws spent on each, how far behind each is."""
        names, outline = self.settings.info["candidate_names"], self.outline
        class_K = np.asarray(outline.classes)[row.candidates_K]
        differences_1C = class_differences(row.differences_K[None], class_K[None], outline.num_classes)
        p_K = self.posterior(differences_1C, row.dims)[0, class_K]
        return [
            {
                "candidate": names[row.candidates_K[k]],
                "draws": int(row.draws_K[k]),
                "behind": float(row.differences_K[k]),
                "probability": float(p_K[k]),
            }
            for k in np.lexsort((row.differences_K, -row.draws_K))[:most]
        ]
