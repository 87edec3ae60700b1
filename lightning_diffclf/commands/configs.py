"""Configuration files: found by name in configs/, layered on others that they extend; ``diffclf configs``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, Namespace

from lightning_diffclf.commands.mistakes import similar
from lightning_diffclf.errors import FailedWrite, MissingFile, UserError
from lightning_diffclf.shipped import shipped

CONFIGS = shipped("configs")
OTHERS = {"Suites (diffclf suite)": "suites/*.yaml", "Jobs of SLURM (sbatch)": "slurm/*.sbatch"}  # to be copied

EXTENDS = "extends"


def is_file_name(value: str) -> bool:
    """Whether the value of ``--config`` names a file, be it one that is missing, rather than being YAML itself."""
    is_word = re.fullmatch(r"[\w./~-]+", value) is not None  # which is no setting
    return "\n" not in value and (is_word or Path(value).is_file() or value.endswith((".yaml", ".yml")))


def find(name: str, beside: Path = Path()) -> Path:
    """A file: beside another one, else that of this name in configs/.

    Raises:
        FileNotFoundError: if there is none.
    """
    for path in (beside / name, CONFIGS / name):
        if path.is_file():
            return path
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    place = "here" if beside == Path() else f"in {str(beside)!r}"
    meant = similar(Path(name).stem, [Path(one).stem for one in known])
    hint = f"; did you mean '{meant[0]}.yaml'?" if meant else f" (which has: {', '.join(known)})"
    raise MissingFile(f"config: no file {name!r}, neither {place} nor in {CONFIGS}{hint}")


def layers(path: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """Files that make up a configuration, the lowest first, ``path`` last; what comes later overrides.

    A file may name others below it: ``extends: dit_imagenet.yaml``, or a list of names, of files beside it or in
    configs/.

    Raises:
        FileNotFoundError: if one is missing.
        ValueError: if a file cannot be read, extends itself, or ``extends`` is neither a name nor a list of them.
    """
    if path.resolve() in above:
        raise UserError(f"config: {str(path)!r} extends itself")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        json.dumps(values, default=str, skipkeys=True)  # refuses what contains itself, which YAML can say
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:  # ValueError: an impossible date, for one
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"config: {str(path)!r} is no YAML file ({reason})") from error
    if not isinstance(values, dict):
        held = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise UserError(f"config: {str(path)!r} {held}, expected settings by name")
    below = values.get(EXTENDS)
    names = [below] if isinstance(below, str) else [] if below is None else below
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"config: {str(path)!r} has {EXTENDS}: {below!r}, expected the name of a file or a list of them"
        )
    found = [layers(find(name, path.parent), (*above, path.resolve())) for name in names]
    return [*(one for files in found for one in files), path]


class NamedConfig(ActionConfigFile):
    """``--config dit_digits.yaml``: that file, else the file of that name in configs/, and those that it extends."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Apply a file on top of those that it extends, as if all were given; text is left to the base class."""
        if not isinstance(values, str) or not is_file_name(values):
            super().__call__(parser, cfg, values, option_string)
            return
        try:
            files = layers(find(values))
        except (MissingFile, UserError) as error:
            parser.error(str(error))
        for file in files:
            super().__call__(parser, cfg, str(file), option_string)
            cfg[EXTENDS] = None  # done: what is written of this configuration is whole


LAYER = "A layer"  # how those begin that are no whole experiment


def summary(path: Path) -> str:
    """What the first line of a file says, a comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[lines[0].startswith("#!")].removeprefix("#").strip()


def _summaries(pattern: str) -> dict[str, str]:
    return {path.relative_to(CONFIGS).as_posix(): summary(path) for path in sorted(CONFIGS.glob(pattern))}


def listing() -> dict[str, dict[str, str]]:
    """All that can be copied: under a title for each kind, the summary of each file by its name."""
    found = {
        title: {name: text for name, text in _summaries("*.yaml").items() if text.startswith(LAYER) == layer}
        for title, layer in (("Experiments", False), ("Layers, to be given after them", True))
    }
    return found | {title: _summaries(pattern) for title, pattern in OTHERS.items()}


def configs_command(given: Namespace) -> None:
    """``diffclf configs``: prints what there is, or copies one."""
    if given.copy is not None:
        print(copied(given.copy, Path(given.out or Path(given.copy).name)))
        return
    groups = listing()
    width = max(len(name) for group in groups.values() for name in group)
    for title, group in groups.items():
        print(f"{title}:")
        for name, text in group.items():
            print(f"  {name:{width}}  {text}")
        print()
    print("diffclf fit|evaluate --config NAME [--config LAYER …]; to edit one: diffclf configs --copy NAME")


def copied(name: str, out: Path) -> str:
    """Write a file of configs/ to a new place; returns what to do with it.

    Raises:
        FileNotFoundError: if there is none of this name.
        ValueError: if the place is taken.
    """
    names = sorted(name for group in listing().values() for name in group)
    if name not in names:
        raise MissingFile(f"copy: no configuration {name!r}, expected one of {', '.join(names)}")
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write((CONFIGS / name).read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError(f"out: {str(out)!r} is there already, expected a new file") from error
    except OSError as error:
        raise FailedWrite(f"out: {str(out)!r} cannot be written ({error.strerror})") from error
    use = {"suites": f"diffclf suite {out}", "slurm": f"sbatch {out} …"}.get(
        Path(name).parts[0], f"give --config {out}"
    )
    return f"{out}: edit it, then {use}"
