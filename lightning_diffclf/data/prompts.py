"""What a text-to-image model is told about each class: names × templates, or a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_diffclf.candidates import NONE_OF_THESE, Candidates
from lightning_diffclf.errors import MissingFile, UserError, WrongType

TEMPLATES: Mapping[str, str] = {
    "food101": "a photo of {}, a type of food.",
    "cifar10": "a blurry photo of a {}.",
    "cifar100": "a blurry photo of a {}.",
    "aircraft": "a photo of a {}, a type of aircraft.",
    "pets": "a photo of a {}, a type of pet.",
    "flowers102": "a photo of a {}, a type of flower.",
    "stl10": "a photo of a {}.",
    "mnist": "a photo of the number: '{}'.",
    "caltech101": "a photo of a {}.",
    "eurosat": "a satellite photo of {}.",
    "imagenet": "a photo of a {}.",
    "objectnet": "a photo of a {}.",
    "custom": "a photo of a {}.",
    "digits": "a photo of a {}",
}  # those of the paper, where it has one (section 6.1: CLIP's prompts)

COLUMNS = ("prompt", "classname", "classidx")


class PromptSet(NamedTuple):
    """One candidate for each prompt."""

    candidates: Candidates
    prompts: list[str]


def from_names(class_names: Sequence[str], templates: str | Sequence[str] = "a photo of a {}.") -> PromptSet:
    """Every template with every class name; ``{}`` stands for the name, underscores become spaces.

    Raises:
        TypeError: if ``class_names`` is a single text.
        ValueError: if names are empty or occur twice, or a template has no ``{}``.

    Example:
        >>> from_names(["cat", "dog"], "a photo of a {}.").prompts
        ['a photo of a cat.', 'a photo of a dog.']
    """
    if isinstance(class_names, str):  # whose letters would be labels
        raise WrongType(f"labels: {class_names!r}, expected a list of labels")
    templates = [templates] if isinstance(templates, str) else list(templates)
    names = [str(name).replace("_", " ").strip() for name in class_names]
    if not names:
        raise UserError("labels: none given, expected at least one")
    for position, name in enumerate(names):
        if not name:
            raise UserError(f"labels: label {position} is empty")
        if name in names[:position]:
            raise UserError(f"labels: {name!r} occurs twice, as {names.index(name)} and {position}")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"template: {template!r}, expected '{{}}' where the label goes")
    if not templates:
        raise UserError("template: none given, expected at least one")
    prompts = [template.replace("{}", name) for name in names for template in templates]
    classes = [c for c in range(len(names)) for _ in templates]
    return PromptSet(Candidates(names if len(templates) == 1 else prompts, classes, names), prompts)


def with_none(asked: PromptSet) -> PromptSet:
    """The same, and the empty prompt as a candidate and class of its own beside them: "none of these"."""
    own, prompts = asked
    classes = [*own.classes, len(own.class_names)]
    names = [*own.class_names, NONE_OF_THESE]
    return PromptSet(Candidates([*own.names, NONE_OF_THESE], classes, names), [*prompts, ""])


def from_csv(path: str | Path) -> PromptSet:
    """A file with the columns ``prompt``, ``classname`` and ``classidx``, as the paper's code reads it.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if columns are missing, a class index is no number, or class indices have gaps.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"prompts: no file {str(path)!r}")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            rows = list(reader)
    except UnicodeDecodeError as error:
        raise UserError(f"prompts: {str(path)!r} is not in UTF-8, byte {error.start} ({error.reason})") from error
    except (csv.Error, OSError) as error:  # a field of more than 131,072 characters, for one
        raise UserError(f"prompts: {str(path)!r} cannot be read as CSV ({error})") from error
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        raise UserError(f"prompts: {str(path)!r} lacks {missing}, found {str(columns)[:200]}, expected {COLUMNS}")
    if not rows:
        raise UserError(f"prompts: {str(path)!r} has no rows")
    classes = []
    for line, row in enumerate(rows, start=2):
        index = (row["classidx"] or "").strip()
        surplus = None in row  # of a comma without quotes around it
        if surplus or not (index.isascii() and index.isdecimal() and len(index) < 10) or not row["prompt"]:
            raise UserError(
                f"prompts: {str(path)!r}, line {line}: {str(row)[:200]}, expected a prompt and a class index, "
                "and no more fields than columns"
            )
        classes.append(int(index))
    known = set(classes)
    if len(known) <= max(classes):
        first, gaps = next(c for c in range(len(known) + 1) if c not in known), max(classes) + 1 - len(known)
        raise UserError(f"prompts: {str(path)!r} has no prompt for class {first} ({gaps} classes without one)")
    prompts = [row["prompt"] for row in rows]
    names = [row["classname"] or row["prompt"] for row in rows]
    of_class = dict(reversed(list(zip(classes, names, strict=True))))  # as its first row has it
    class_names = [of_class[c] for c in range(len(of_class))]
    several = len(of_class) < len(classes)
    return PromptSet(Candidates(prompts if several else names, classes, class_names), prompts)
