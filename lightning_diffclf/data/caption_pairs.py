"""SugarCrepe and ARO: images with a right caption and one that is wrong in a detail, or several in another order.

Unlike Winoground's, a pair has one image: what counts is which of its captions fits it best.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
from PIL import Image
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.images import open_image, stacked, transform
from lightning_diffclf.data.prompts import PromptSet
from lightning_diffclf.data.protocols import Decided, own_preparation, own_size
from lightning_diffclf.data.stream import evaluation_loader
from lightning_diffclf.errors import MissingFile, UserError, check_at_least
from lightning_diffclf.files import read_json
from lightning_diffclf.identity import ByArguments

RIGHT, WRONG = "right caption", "wrong caption"

CAPTIONS = (("caption", "negative_caption"), ("true_caption", "false_caption"))  # of SugarCrepe, of ARO
OPTIONS = "caption_options"  # of ARO's orders: a list, the right one first
IMAGES = ("filename", "image_path", "image")


class Pair(NamedTuple):
    """An image and its captions; ``box`` is (left, top, right, bottom) of the part that they are about, in pixels."""

    id: str
    image: Path
    right: str
    wrong: tuple[str, ...]
    tag: str
    box: tuple[int, int, int, int] | None = None


def read_pairs(source: str | Path, images: str | Path) -> list[Pair]:
    """Pairs of a JSON file, or of all in a folder, in the form of SugarCrepe or of ARO.

    SugarCrepe's files are objects of ``filename``, ``caption`` and ``negative_caption``; the file's name is the tag.
    ARO's are lists of ``image_path``, ``true_caption``, ``false_caption`` and a box (``bbox_x``, ``bbox_y``,
    ``bbox_w``, ``bbox_h``); the tag is ``relation_name``, or the file's name. ARO's orders of words (COCO,
    Flickr30k) are lists of ``image`` and ``caption_options``, of which the first is right; a wrong one that is the same
    as another is left out.

    Args:
        source: The file, or folder of files.
        images: Folder of the images, such as COCO's ``val2017`` or Visual Genome's.

    Raises:
        FileNotFoundError: if a file or an image is missing.
        ValueError: if a file is of another form, or leads out of the folder of images.
    """
    path, folder = Path(source), Path(images)
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise MissingFile(
            f"captions: no JSON file {str(source)!r}, expected one of SugarCrepe or ARO, or a folder of them"
        )
    pairs = [pair for file in files for pair in _of_file(file, folder)]
    if not pairs:
        raise UserError(f"captions: {str(source)!r} has no pairs")
    return pairs


def _of_file(file: Path, folder: Path) -> list[Pair]:
    found = read_json(file, "captions")
    rows = list(found.items()) if isinstance(found, dict) else list(enumerate(found)) if isinstance(found, list) else []
    pairs = []
    for key, row in rows:
        try:
            right, *wrong = _captions_of(row)
            name = next(row[one] for one in IMAGES if one in row)
            corner = [int(row[f"bbox_{side}"]) for side in "xywh"] if "bbox_x" in row else None
            texts = [right, *wrong, name, row.get("relation_name", file.stem)]
            if not all(isinstance(one, str) and one.strip() for one in texts):
                raise TypeError(f"{texts} are not all texts")
            wrong = [one for one in dict.fromkeys(wrong) if one != right]
            if not wrong:
                raise ValueError("no caption differs from the right one")
        except (StopIteration, KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"captions: {str(file)!r}, pair {key}: {repr(error)[:200]}, expected filename, caption and "
                "negative_caption; image_path, true_caption and false_caption; or image and caption_options"
            ) from error
        box = None if corner is None else (corner[0], corner[1], corner[0] + corner[2], corner[1] + corner[3])
        pairs.append(Pair(f"{file.stem}/{key}", _image(folder, name), right, tuple(wrong), texts[-1], box))
    return pairs


def _captions_of(row: Any) -> list[Any]:
    """The right one first."""
    if OPTIONS in row:
        return list(row[OPTIONS])
    return next([row[a], row[b]] for a, b in CAPTIONS if a in row and b in row)


def _image(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"captions: image {name[:200]!r} is not in the folder {str(folder)!r}")
    if not path.is_file():
        raise MissingFile(f"captions: no image {name[:200]!r} in {str(folder)!r}")
    return path


class _Images(Dataset[dict[str, Any]]):
    """The image of pair i at position i; its captions come after those of the pairs before it."""

    def __init__(self, pairs: Sequence[Pair], prepare: Callable[[Image.Image], Tensor], root: str) -> None:
        self.pairs, self.prepare, self.root = pairs, prepare, root
        self._first = [0, *accumulate(1 + len(pair.wrong) for pair in pairs)]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        image = open_image(pair.image)
        if pair.box is not None:
            image = image.crop(_inside(pair, image))
        return {
            "image": self.prepare(image),
            "label": 0,  # the right caption
            "id": pair.id,
            "candidates": list(range(self._first[index], self._first[index + 1])),
        }


def _inside(pair: Pair, image: Image.Image) -> tuple[int, int, int, int]:
    left, top, right, bottom = pair.box or (0, 0, image.width, image.height)
    box = max(0, left), max(0, top), min(image.width, right), min(image.height, bottom)
    if box[0] >= box[2] or box[1] >= box[3]:
        raise UserError(
            f"captions: pair {pair.id}: box {pair.box} is not in its image of {image.width} × {image.height}"
        )
    return box


class CaptionPairsDataModule(ByArguments, L.LightningDataModule):
    """SugarCrepe (Hsieh et al. 2023) or ARO (Yuksekgonul et al. 2023): which of its captions fits an image best.

    There are two classes, right captions and wrong ones, and each image is asked about its own captions, of which one
    is right: so accuracy is the share of images told right, where chance is 50 %, or 20 % in ARO's orders, which have
    four wrong captions. Rules may drop a caption early, unlike for
    Winoground. Prompts are embedded beforehand: 100,000 take some ten gigabytes, so choose a file, tags or ``limit``.

    Args:
        source: JSON file, or folder of them: SugarCrepe's ``swap_att.json``, …; ARO's ``visual_genome_relation.json``;
            its orders of COCO and Flickr, as lists of ``image`` and ``caption_options``.
        images: Folder of the images: COCO's ``val2017``, Visual Genome's.
        tags: Only pairs of these tags: SugarCrepe's files, ARO's relations.
        limit: At most so many pairs of each tag, the first ones.
        size: Height and width of images; if null, as for :class:`~.zero_shot.ZeroShotDataModule`.
        eval_batch_size: Images in a batch of one process.
        num_workers: Processes that read images.

    Raises:
        ValueError: if a number is out of range; later, if a file is of another form, or no pair has the tags.
        FileNotFoundError: later, if a file or an image is missing.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "tags": "the pairs are in `pairs`",
        "limit": "likewise",
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
    }

    def __init__(
        self,
        source: str,
        images: str,
        tags: list[str] | None = None,
        limit: int | None = None,
        size: int | tuple[int, int] | None = None,
        eval_batch_size: int = 16,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        check_at_least(1, eval_batch_size=eval_batch_size, limit=limit)
        check_at_least(0, num_workers=num_workers)
        self.save_hyperparameters()
        self.source, self.images, self.tags, self.limit = source, images, tags, limit
        self.size = (size, size) if isinstance(size, int) else size
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self._pairs: list[Pair] = []

    @property
    def pairs(self) -> list[Pair]:
        """The pairs that are asked about, read at first use."""
        if not self._pairs:
            taken: dict[str, int] = {}
            for pair in read_pairs(self.source, self.images):
                if (self.tags is None or pair.tag in self.tags) and taken.get(pair.tag, 0) < (self.limit or 10**9):
                    taken[pair.tag] = taken.get(pair.tag, 0) + 1
                    self._pairs.append(pair)
            if not self._pairs:
                known = sorted({pair.tag for pair in read_pairs(self.source, self.images)})
                raise UserError(f"tags: {self.tags}, expected some of {known}")
        return self._pairs

    @property
    def prompt_set(self) -> PromptSet:
        """The right caption and the wrong ones of each pair."""
        prompts = [caption for pair in self.pairs for caption in (pair.right, *pair.wrong)]
        names = [f"{pair.id}: {caption}" for pair in self.pairs for caption in (pair.right, *pair.wrong)]
        classes = [c for pair in self.pairs for c in (0, *(1 for _ in pair.wrong))]
        return PromptSet(Candidates(names, classes, [RIGHT, WRONG]), prompts)

    @property
    def class_names(self) -> list[str]:
        """Two."""
        return [RIGHT, WRONG]

    @property
    def _own_preparation(self) -> Callable[[Any], Tensor] | None:
        return own_preparation(self.size, self.trainer)

    def contents(self) -> dict[str, Any]:
        own = self._own_preparation
        prepared = {"size": own_size(self.size, self.trainer)} if own is None else {"preparation": own}
        return prepared | {"pairs": [(*pair[:1], pair.image.name, *pair[2:]) for pair in self.pairs]}

    def setup(self, stage: str | None = None) -> None:
        prepare = self._own_preparation or transform(*own_size(self.size, self.trainer))
        self.test = _Images(self.pairs, prepare, self.images)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return evaluation_loader(self.test, self.eval_batch_size, self.trainer, self.num_workers, stacked)

    def score(self, rows: Sequence[Decided]) -> dict[str, float]:
        """Share of images that fit their right caption best, overall and by tag, with Wilson's 95 % intervals.

        Of a caption that a rule dropped, one that stayed is better, whatever the means over different draws say.
        """
        tag_of = {pair.id: pair.tag for pair in self.pairs}
        right: dict[str, list[bool]] = {}
        for row in rows:
            right.setdefault(tag_of[row.id], []).append(_is_right(row))
        if not right:
            return {}
        overall = [one for some in right.values() for one in some]
        share = binomtest(sum(overall), len(overall))
        low, high = share.proportion_ci(method="wilson")
        found = {"pairs": len(overall), "caption": float(share.statistic)}
        found |= {"caption_low": float(low), "caption_high": float(high)}
        return found | {f"caption_{tag}": sum(some) / len(some) for tag, some in sorted(right.items())}


def _is_right(row: Decided) -> bool:
    """Whether the right caption, which has the lowest number, saw more draws than each other, or has a lower error."""
    order = np.argsort(row.candidates_K)
    draws, scores = row.draws_K[order], row.scores_K[order]
    if not np.isfinite(scores[0]):
        return False
    beaten = ~np.isfinite(scores[1:]) | (draws[0] > draws[1:]) | ((draws[0] == draws[1:]) & (scores[0] < scores[1:]))
    return bool(beaten.all())
