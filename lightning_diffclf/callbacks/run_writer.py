"""Writing: what an evaluation leaves in its folder, from the claim to the pictures."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from lightning_diffclf.callbacks.first_rank import on_first_rank
from lightning_diffclf.classifier import Classification, DiffusionClassifier
from lightning_diffclf.classifier.discriminative import Classifier
from lightning_diffclf.files import FolderLock, write_json
from lightning_diffclf.results.calibration import Sample, calibrate
from lightning_diffclf.results.columns import show
from lightning_diffclf.results.conformal import RightScores, sets_of
from lightning_diffclf.results.curves import Sureness
from lightning_diffclf.results.error_maps import error_map
from lightning_diffclf.results.errors import ErrorsInfo
from lightning_diffclf.results.groups import Grouped
from lightning_diffclf.results.parts import together
from lightning_diffclf.results.predictions import Record, from_table
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.shown import shown
from lightning_diffclf.results.store import Store, claim, clean, finish, refresh
from lightning_diffclf.results.stored import Stored, scan
from lightning_diffclf.results.summary import Outline, Summary
from lightning_diffclf.results.thumbnails import thumbnail

PICTURES = ("thumbnail", "error_map", "trail")  # what numbers are not made of


class Picture(NamedTuple):
    """What is kept of an image until it is decided: its thumbnail, and for an error map, itself."""

    thumbnail: bytes | None
    image: Tensor | None


def claimed(trainer: L.Trainer, folder: Path, settings: Settings, next_free: bool) -> tuple[Path, FolderLock | None]:
    """The folder that the first rank claims for all ranks, and, on that rank, its lock; they agree on what came of it.

    Raises:
        UserError: on all ranks, as :func:`~lightning_diffclf.results.store.claim`.
    """
    locks: list[FolderLock] = []

    def claim_it() -> Path:
        found = claim(folder, settings, next_free)
        locks.append(FolderLock(found))
        clean(found)
        refresh(found, settings)
        return found

    try:
        return on_first_rank(trainer, claim_it), locks[0] if locks else None
    except BaseException:
        for lock in locks:
            lock.release()
        raise


class RunWriter:
    """Writes the decisions of one rank, and on rank 0 what they come to. Made on all ranks before long work.

    Args:
        trainer: The Trainer that evaluates.
        folder: Where results should go.
        settings: Those of the run.
        classifier: What classifies.
        next_free: See :func:`~lightning_diffclf.results.store.claim`.
        flush_every: Images after which decisions are written to the disk, at most.
        error_maps: Wrongly decided images over all ranks that get an error map.
        keep_errors: Write all errors as well.
        keep_distances: And the distances between predictions.

    Attributes:
        folder: Where results go.
        finished: Ids of the images that were decided before.

    Raises:
        UserError: on all ranks, if the folder cannot be used: it holds another run, another process writes to it, or a
            part cannot be read.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        folder: Path,
        settings: Settings,
        classifier: Classifier,
        *,
        next_free: bool,
        flush_every: int,
        error_maps: int,
        keep_errors: bool,
        keep_distances: bool,
    ) -> None:
        self._lock: FolderLock | None = None
        self._classifier, self._device = classifier, trainer.strategy.root_device
        self._rank, self._ranks = trainer.global_rank, trainer.world_size
        try:
            self.folder, self._lock = claimed(trainer, folder, settings, next_free)
            errors = ErrorsInfo.of(classifier) if keep_errors and isinstance(classifier, DiffusionClassifier) else None
            self._store = Store(self.folder, settings, self._rank, flush_every, errors, keep_distances)
            self.finished = self._store.finished
            self._mine = self._found_before()
            self._maps = -(-error_maps // self._ranks)  # that this rank may still make
            if classifier.terms.logits:
                self._maps = 0  # there is no noise to look at
        except BaseException:
            self.close()
            raise

    def _found_before(self) -> pa.Array:
        """Of what was decided before, the images that count on this rank: that which decided them; seconds add up."""
        mine = [pa.array([], pa.string())]
        for table in self._store.before.chunks(["rank"]):
            mine += table.filter(pa.array(table["rank"].to_numpy() % self._ranks == self._rank))["id"].chunks
        return pa.concat_arrays(mine)

    @property
    def run(self) -> str:
        """Short name of what results depend on."""
        return self._store.settings.digest

    def decided_before(self) -> Iterator[pa.Table]:
        """What counts on this rank of that which was decided before, a few megabytes at a time.

        The error maps among it are counted as well: so many fewer will be made.
        """

        def counted() -> Iterator[pa.Table]:
            for table in self._store.before.chunks([*Summary.COLUMNS, "error_map"], self._mine):
                self._maps -= len(table) - table["error_map"].null_count
                yield table.drop_columns("error_map")

        return together(counted())

    # --- images --------------------------------------------------------------------------------------------------

    def picture(self, image: Tensor, label: int | None) -> Picture:
        """What to keep of an image (C, H, W) until :meth:`add`."""
        return Picture(thumbnail(image), image.cpu() if self._maps > 0 and label is not None else None)

    def add(self, record: Record, result: Classification, key: int | str, picture: Picture) -> None:
        """Write a decision.

        Args:
            record: The decision.
            result: It again, with its errors.
            key: What the noise of the image was keyed by.
            picture: What :meth:`picture` kept.
        """
        error_map = None
        if record.label not in (None, record.prediction) and picture.image is not None and self._maps > 0:
            error_map = self._error_map(result, key, record.label, picture.image)
        self._store.add(replace(record, thumbnail=picture.thumbnail, error_map=error_map), result)

    def _error_map(self, result: Classification, key: int | str, label: int | None, image: Tensor) -> Any:
        """How much larger the error of the right class is than that of the chosen one, at each position (h, w)."""
        if result.candidate is None or not isinstance(self._classifier, DiffusionClassifier):
            return None
        classes = self._classifier.candidates.classes
        tried = [k for k in result.candidates_K.tolist() if classes[k] == label]
        difference_of = dict(zip(result.candidates_K.tolist(), result.differences_K.tolist(), strict=True))
        right = min(tried, key=difference_of.__getitem__) if tried else classes.index(label)
        self._maps -= 1
        right_map, chosen_map = error_map(self._classifier, image.to(self._device), key, [right, result.candidate])
        return (right_map - chosen_map).numpy()

    # --- end -----------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Write what is not on the disk yet."""
        self._store.flush()

    def finish(
        self, summary: Summary | None, score: Callable[[list[Record]], dict[str, float]] | None
    ) -> dict[str, float]:
        """Make one file of all parts, write metrics.json, draw, and close. For rank 0, when all ranks have flushed.

        Args:
            summary: That of all ranks; None without labels.
            score: Numbers of the data set's own, made of all records.

        Returns:
            The numbers of the data set's own, by name; and of what is stored, where that is less than the summary of.
        """
        settings, outline = self._store.settings, Outline.of(self._store.settings.info)
        with ThreadPoolExecutor(1) as beside:  # pictures are of the summary, which is there
            pictures = None if summary is None else beside.submit(self._draw, summary)
            written, recounted = self._whole(settings, outline, summary)
            if pictures is not None:
                pictures.result()
        if recounted is not None:
            self._draw(recounted)
        own = {} if score is None else score(self._records())
        described = settings.identity | {"posterior": asdict(outline.posterior)} | settings.info
        self._numbers = own | written
        write_json({"metrics": self._numbers, "settings": described}, self.folder / "metrics.json", 2, "results")
        self.close()
        return own | (recounted.numbers() if recounted is not None else {})

    def _draw(self, summary: Summary) -> None:
        from lightning_diffclf.results import charts  # with altair, which nothing before needs

        charts.save(charts.specs(charts.of_summary(summary)), self.folder, ["png"])

    def _whole(
        self, settings: Settings, outline: Outline, summary: Summary | None
    ) -> tuple[dict[str, Any], Summary | None]:
        """Make one file of all parts; its numbers, and its summary where that has fewer images."""
        counts = sample, sureness, grouped = Sample(outline), Sureness(), Grouped()
        images = finish(self.folder, settings, self._store.before, lambda table: show(table, counts))
        if summary is None:
            return Summary.of(outline, Stored(self.folder, settings, Summary.COLUMNS)).numbers(), None
        recounted = None
        if summary.images > images:  # each process knows its own ids only
            warnings.warn(
                f"{summary.images - images} images have ids that images on other processes had as well, and count "
                "once; expected an id of its own for each image",
                stacklevel=2,
            )
            summary = recounted = Summary.of(outline, Stored(self.folder, settings, Summary.COLUMNS))
        calibrated = calibrate(sample, Stored(self.folder, settings, Sample.COLUMNS))
        numbers = (
            summary.numbers()
            | (asdict(calibrated) if calibrated is not None else {})
            | grouped.numbers()
            | sureness.selective()
            | sets_of(outline, Stored(self.folder, settings, RightScores.COLUMNS))
        )
        return numbers, recounted

    def _records(self) -> list[Record]:
        """All records, without pictures: few, where a data set has numbers of its own."""
        names = [name for name in Record.__dataclass_fields__ if name not in PICTURES]
        return [record for table in scan(self.folder, names, self._store.settings) for record in from_table(table)]

    def close(self) -> None:
        """Let other processes write to the folder."""
        if self._lock is not None:
            self._lock.release()

    def print(self) -> None:
        """Show what :meth:`finish` found as a table."""
        classifier = self._classifier
        kind = "discriminative" if classifier.terms.logits else "diffusion"
        title = f"{kind} classifier, {classifier.terms.loss}, {classifier.rule}"
        table = Table(title=escape(title), show_header=False)
        for name, text in shown(self._numbers).items():
            table.add_row(name, text)
        table.add_row("results in", escape(str(self.folder)))
        Console(soft_wrap=True).print(table)
