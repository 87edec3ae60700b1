"""Winoground: groups of two images and two captions that differ in what goes with what (Thrush et al. 2022)."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.digit_scenes import caption_of_two, two_digits
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.data.images import open_image, stacked, transform
from lightning_diffclf.data.prompts import PromptSet
from lightning_diffclf.data.protocols import DEFAULT_SIZE, Decided, own_preparation
from lightning_diffclf.data.stream import evaluation_loader
from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.identity import ByArguments

HUB = "facebook/winoground"


class Group(NamedTuple):
    """Two images (files, or tensors (3, H, W) in [-1, 1]) and two captions, of which each fits one image."""

    id: str
    images: tuple[Any, Any]
    captions: tuple[str, str]
    tag: str


def read_groups(root: str | Path) -> list[Group]:
    """Groups of a folder with ``examples.jsonl`` and images, as the Hub has them, or of a JSONL file.

    Each line has ``image_0``, ``image_1``, ``caption_0``, ``caption_1``; maybe ``id``, ``collapsed_tag`` or ``tag``.
    Images are files beside it, or in ``images/``; the ending ``.png`` may be left out.

    Raises:
        FileNotFoundError: if there is no such file, or an image is missing.
        ValueError: if a line lacks something.
    """
    path = Path(root)
    if path.is_dir():
        path = next((p for p in (path / "examples.jsonl", path / "data" / "examples.jsonl") if p.is_file()), path)
    if not path.is_file():
        raise MissingFile(f"winoground: no examples.jsonl in {str(root)!r}, and it is no JSONL file")
    groups: dict[str, Group] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"winoground: {str(path)!r} cannot be read ({error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            captions = str(row["caption_0"]), str(row["caption_1"])
            names = str(row["image_0"]), str(row["image_1"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"winoground: {str(path)!r}, line {number}: {repr(error)[:200]}, expected a JSON object with "
                "image_0, image_1, caption_0 and caption_1"
            ) from error
        tag = row.get("collapsed_tag") or row.get("tag") or ""
        images = _find(path.parent, names[0]), _find(path.parent, names[1])
        name = str(row.get("id", number - 1))
        if name in groups:
            raise UserError(f"winoground: {str(path)!r}, line {number}: id {name!r} of another group, expected its own")
        groups[name] = Group(name, images, captions, str(tag))
    if not groups:
        raise UserError(f"winoground: {str(path)!r} has no groups")
    return list(groups.values())


def _find(folder: Path, name: str) -> Path:
    for place in (folder / name, folder / f"{name}.png", folder / "images" / name, folder / "images" / f"{name}.png"):
        if os.path.isfile(place):  # False as well for names that no file can have
            return place
    raise MissingFile(f"winoground: no image {name[:200]!r} in {str(folder)!r}")


def download(repository: str = HUB) -> Path:
    """The gated set from the Hub, unpacked in its cache; needs an account that has accepted its terms.

    Raises:
        ValueError: if it cannot be had; says what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repository, repo_type="dataset"))
    except Exception as error:  # the Hub's own, of many kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"winoground: the Hub did not give {repository!r} ({first}). Accept its terms on its page and log in "
            "(`hf auth login`), or give a folder with examples.jsonl and images/"
        ) from error
    for archive in folder.rglob("images.zip"):
        if not (archive.parent / "images").is_dir():
            with zipfile.ZipFile(archive) as file:
                file.extractall(archive.parent)
    return folder


def digit_groups(count: int = 100) -> list[Group]:
    """Scenes of test digits: half of the groups swap the two digits (Relation), half change one of them (Object)."""
    data = DigitsDataModule()
    data.setup()
    scans, labels = data.test.parts["image"], data.test.parts["label"].tolist()
    generator = torch.Generator().manual_seed(0)
    groups: list[Group] = []
    while len(groups) < count:
        a, b, c = torch.randint(len(labels), (3,), generator=generator).tolist()
        if len({labels[a], labels[b], labels[c]}) < 3:
            continue
        tag = "Relation" if len(groups) % 2 == 0 else "Object"
        second = (b, a) if tag == "Relation" else (a, c)
        pairs = (a, b), second
        images = [two_digits(scans[left : left + 1], scans[right : right + 1])[0] for left, right in pairs]
        captions = caption_of_two(labels[a], labels[b]), caption_of_two(labels[second[0]], labels[second[1]])
        groups.append(Group(f"{len(groups)}", (images[0], images[1]), captions, tag))
    return groups


class _Images(Dataset[dict[str, Any]]):
    """The images of groups: image i of group g at position 2 g + i."""

    def __init__(self, groups: Sequence[Group], prepare: Callable[[Any], Tensor], root: str) -> None:
        self.groups, self.prepare, self.root = groups, prepare, root

    def __len__(self) -> int:
        return 2 * len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, which = divmod(index, 2)
        group = self.groups[number]
        image = group.images[which]
        pixels = image if isinstance(image, Tensor) else self.prepare(open_image(image))
        return {
            "image": pixels,
            "label": index,  # the caption that fits
            "id": f"{group.id}/{which}",
            "noise_key": group.id,  # all four pairs of a group see the same draws
            "group": group.id,
            "candidates": [2 * number, 2 * number + 1, 2 * len(self.groups)],
        }


class WinogroundDataModule(ByArguments, L.LightningDataModule):
    """Groups of two images and two captions; each image is asked about both captions, and about the empty prompt.

    Each caption is a candidate with a class of its own, and so is the empty prompt, whose error says how likely the
    image is at all. Scores are compared across images and captions, so that all of them need all draws: there may be no
    elimination and no budget (``needs_every_draw``).

    Args:
        source: ``digits`` (scenes of test digits, see :func:`digit_groups`), ``hub`` (the gated set), or a folder or
            JSONL file of the same form.
        size: Height and width of images from files; if null, as the Trainer's module wants them
            (:class:`~lightning_diffclf.data.protocols.HasPreparation`), or 512 where it does not say.
        eval_batch_size: Images in a batch of one process.
        num_workers: Processes that read images.

    Raises:
        ValueError: if a number is out of range.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "eval_batch_size": "results do not depend on how images are batched",
        "num_workers": "nor on how fast they are read",
    }

    def __init__(
        self,
        source: str = "digits",
        size: int | tuple[int, int] | None = 512,
        eval_batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if eval_batch_size < 1 or num_workers < 0:
            raise UserError(f"eval_batch_size {eval_batch_size}, num_workers {num_workers}: expected at least 1, 0")
        self.save_hyperparameters()
        self.source, self.size = source, (size, size) if isinstance(size, int) else size
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self._groups: list[Group] = []

    @property
    def groups(self) -> list[Group]:
        """All groups, read at first use."""
        if not self._groups:
            if self.source == "digits":
                self._groups = digit_groups()
            else:
                self._groups = read_groups(download() if self.source == "hub" else self.source)
        return self._groups

    @property
    def prompt_set(self) -> PromptSet:
        """Both captions of each group, and at the end the empty prompt."""
        prompts = [*(caption for group in self.groups for caption in group.captions), ""]
        names = [f"{group.id}: {caption}" for group in self.groups for caption in group.captions]
        return PromptSet(Candidates([*names, "(no caption)"]), prompts)

    @property
    def _own_preparation(self) -> Callable[[Any], Tensor] | None:
        return own_preparation(self.size, self.trainer)

    def contents(self) -> dict[str, Any]:
        places = [[one.name if isinstance(one, Path) else one for one in group.images] for group in self.groups]
        prepared = {} if self._own_preparation is None else {"preparation": self._own_preparation}
        return prepared | {
            "groups": [(g.id, g.captions, g.tag, images) for g, images in zip(self.groups, places, strict=True)]
        }

    def setup(self, stage: str | None = None) -> None:
        prepare = self._own_preparation or transform(*(self.size or DEFAULT_SIZE))
        self.test = _Images(self.groups, prepare, self.source)

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return evaluation_loader(self.test, self.eval_batch_size, self.trainer, self.num_workers, stacked)

    needs_every_draw = True

    def score(self, rows: Sequence[Decided]) -> dict[str, float]:
        """Text, image and group score, overall and by tag, of the groups with both images; see winoground_scores.

        Raises:
            ValueError: if errors of a group are means over different draws.
        """
        of_image = {row.id: row for row in rows}
        pairs = [(group, [of_image.get(f"{group.id}/{i}") for i in (0, 1)]) for group in self.groups]
        complete = [(group, [row for row in both if row is not None]) for group, both in pairs if None not in both]
        if not complete:
            return {}
        for group, both in complete:
            # A candidate whose error is infinite was left by the network, not by a rule: it is wrong in any comparison.
            seen = {int(n) for row in both for n in row.draws_K[np.isfinite(row.scores_K)]}
            if len(seen) > 1:
                raise UserError(
                    f"winoground: group {group.id!r} has errors over {sorted(seen)} draws, which cannot be compared "
                    "across images and captions; expected no elimination rule and no budget"
                )
        errors_G23 = torch.tensor(np.array([[row.scores_K for row in both] for _, both in complete]))
        return winoground_scores(errors_G23, [group.tag for group, _ in complete])


def winoground_scores(errors_G23: Tensor, tags: Sequence[str]) -> dict[str, float]:
    """Shares of groups that are right, with Wilson's 95 % intervals.

    * text: each image fits its own caption better than the other (chance 25 %).
    * image: each caption fits its own image better than the other (25 %). ``image_normalised`` first takes off the
      error that the image has without a caption, because some images are likelier whatever is said.
    * group: both (16.7 %).

    Args:
        errors_G23: Error of image i (second axis) under caption 0, caption 1 and no caption (third axis).
        tags: Of each group; each tag is scored for itself as well.

    Returns:
        Numbers by name, such as ``text``, ``text_low``, ``text_high``, ``text_Relation``.
    """
    own, other = errors_G23[:, [0, 1], [0, 1]], errors_G23[:, [0, 1], [1, 0]]  # by image
    gain_G22 = errors_G23[:, :, 2:] - errors_G23[:, :, :2]
    right = {
        "text": (own < other).all(1),
        "image": (own < errors_G23[:, [1, 0], [0, 1]]).all(1),
        "image_normalised": (gain_G22[:, [0, 1], [0, 1]] > gain_G22[:, [1, 0], [0, 1]]).all(1),
    }
    right["group"] = right["text"] & right["image"]
    right["group_normalised"] = right["text"] & right["image_normalised"]
    found: dict[str, float] = {"groups": len(tags)}
    for name, right_G in right.items():
        for tag in ["", *sorted(set(tags) - {""})]:
            mine = torch.tensor([tag in ("", own_tag) for own_tag in tags])
            share = binomtest(int(right_G[mine].sum()), int(mine.sum()))
            suffix = f"_{tag}" if tag else ""
            found[f"{name}{suffix}"] = float(share.statistic)
            if not tag:
                low, high = share.proportion_ci(method="wilson")
                found |= {f"{name}_low": float(low), f"{name}_high": float(high)}
    return found
