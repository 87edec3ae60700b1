"""Data sets of clip-benchmark: tar shards with names of classes and prompts beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_diffclf.data.prompts import PromptSet, from_names
from lightning_diffclf.data.zero_shot import ZeroShotDataModule
from lightning_diffclf.errors import MissingFile, UserError

NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


def lines_of(path: Path) -> list[str]:
    """Lines of a text file that are not empty.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has none, or is not in UTF-8.
    """
    if not path.is_file():
        raise MissingFile(f"data: no {str(path)!r}, expected the layout of clip-benchmark: {NAMES}, {TEMPLATES}, test/")
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"data: {str(path)!r} is not in UTF-8, byte {error.start}") from error
    if not found:
        raise UserError(f"data: {str(path)!r} is empty")
    return found


class ClipBenchmarkDataModule(ZeroShotDataModule):
    """A data set as ``clip-benchmark/wds_*`` on the Hub have it: shards in ``test/``, names and prompts beside it.

    ``hf download --repo-type dataset clip-benchmark/wds_vtab-pets --local-dir data/wds_pets`` brings one. Names of
    classes and prompts come with it, in place of the network's: a prompt for each template and class.

    Args:
        root: Folder with ``classnames.txt``, ``zeroshot_classification_templates.txt`` and folders of shards.
        split: Folder with the shards.
        templates: How many of the templates are used, from the first on; all if null.
        size: As for :class:`~.zero_shot.ZeroShotDataModule`, here and below.
        eval_batch_size: Images in a batch of one process.
        num_workers: Processes that read images.
        crop: ``covering`` or ``published``.

    Raises:
        ValueError: if a number is out of range; later, if a file cannot be read, or a template has no place for a name.
        FileNotFoundError: later, if a file is not there.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = ZeroShotDataModule.CANNOT_CHANGE_RESULTS

    def __init__(
        self,
        root: str,
        split: str = "test",
        templates: int | None = 1,
        size: int | tuple[int, int] | None = None,
        eval_batch_size: int = 16,
        num_workers: int = 2,
        crop: Literal["covering", "published"] = "covering",
    ) -> None:
        super().__init__(
            "webdataset",
            str(Path(root) / split),
            size=size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            crop=crop,
        )
        self.save_hyperparameters()
        if templates is not None and templates < 1:
            raise UserError(f"templates: {templates}, expected at least 1, or null for all")
        self.folder, self.templates = Path(root), templates

    @property
    def class_names(self) -> list[str]:
        """As ``classnames.txt`` has them."""
        return lines_of(self.folder / NAMES)

    @property
    def prompt_set(self) -> PromptSet:
        """Every template that is used, with every name."""
        templates = [line.replace("{c}", "{}") for line in lines_of(self.folder / TEMPLATES)]
        return from_names(self.class_names, templates[: self.templates])

    def contents(self) -> dict[str, Any]:
        asked = self.prompt_set
        return super().contents() | {"prompts_K": asked.prompts, "candidates": asked.candidates}
