"""What a run was made with: settings.json in its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.files import json_checksum, read_json

SETTINGS = "settings.json"

EVALUATION = "evaluation"  # the kind of a run that does not say one


@dataclass(frozen=True)
class Settings:
    """What a run was made with, as plain values.

    Attributes:
        identity: What the results depend on. Only runs that agree in all of it can be joined or resumed.
        info: What else is worth knowing: names, timesteps, versions, hardware, command.
    """

    identity: dict[str, Any]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What was done with each image, and so what its rows are: ``evaluation``, ``attack``, ``certification``."""
        return str(self.identity.get("kind", EVALUATION))

    def check_evaluation(self, what: str) -> None:
        """Raise ValueError unless the run is an evaluation; ``what`` names it."""
        if self.kind != EVALUATION:
            raise UserError(
                f"run: {what} holds results of the kind {self.kind!r}, expected an evaluation; what it came to is "
                "in its metrics.json and shown by `diffclf report`"
            )

    @property
    def digest(self) -> str:
        """Short name of the identity."""
        return hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=8).hexdigest()

    def to_json(self) -> str:
        """As stored."""
        return json.dumps(asdict(self) | {"digest": self.digest, "checksum": self._checksum}, indent=2)

    @property
    def _checksum(self) -> str:
        return json_checksum([self.identity, self.info])

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Those of the run in ``folder``.

        Raises:
            FileNotFoundError: if there is no run.
            ValueError: if its settings cannot be read.
        """
        path = folder / SETTINGS
        if not path.is_file():
            raise MissingFile(f"run: no {SETTINGS} in {str(folder)!r}, expected the folder of an evaluation")
        values = read_json(path, "run")
        names = ("identity", "info")
        if not isinstance(values, dict) or not all(isinstance(values.get(name), dict) for name in names):
            raise UserError(f"run: {str(path)!r} cannot be read, expected {' and '.join(names)}")
        found = cls(values["identity"], values["info"])
        # Without a checksum, of an earlier version.
        if values.get("digest") != found.digest or values.get("checksum", found._checksum) != found._checksum:
            raise UserError(f"run: {str(path)!r} was changed or damaged: it does not have its checksum")
        return found

    def check_same(self, other: Settings, what: str) -> None:
        """Raise ValueError, naming all differences, unless ``other`` has the same identity."""
        if other.kind != self.kind:
            raise UserError(f"settings: {what} holds results of the kind {other.kind!r}, expected {self.kind!r}")
        different = list(differences(other.identity, self.identity))
        if different:
            raise UserError(f"settings: {what} was made with other ones ({'; '.join(different)})")


LONGEST = 80
"""Characters of a value that messages repeat."""


def differences(there: Any, here: Any, path: str = "") -> Iterator[str]:
    """Where two identities differ; of long lists the first place, such as ``prompts[3]: 'a cat' there, 'a dog' here``.

    Example:
        >>> list(differences({"data": {"size": 8}, "draws": 4}, {"data": {"size": 16}, "draws": 4}))
        ['data.size: 8 there, 16 here']
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for name in dict.fromkeys([*here, *there]):
            yield from differences(there.get(name), here.get(name), f"{path}.{name}" if path else name)
    elif (said := json.dumps(there, sort_keys=True)) != (meant := json.dumps(here, sort_keys=True)):
        lists = all(isinstance(one, list | tuple) for one in (there, here)) and max(len(said), len(meant)) > LONGEST
        if lists and len(there) == len(here):
            places = [(i, *pair) for i, pair in enumerate(zip(there, here, strict=True)) if any(differences(*pair))]
            yield from differences(*places[0][1:], f"{path}[{places[0][0]}]")
            if places[1:]:
                yield f"{path}: {len(places) - 1:,} more of {len(here):,}"
        elif lists:
            yield f"{path}: {len(there):,} values there, {len(here):,} here"
        else:
            yield f"{path}: {_short(there)} there, {_short(here)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
