"""Errors of an earlier run for one that needs the same ones and more: which may be taken, and where they are."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_diffclf.classifier.known import KnownErrors
from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.results.errors import ERRORS, ErrorsInfo, StoredErrors, StoredImage
from lightning_diffclf.results.settings import Settings, differences

OF_ERRORS = ("seed", "loss", "antithetic")  # what of a recipe a single error depends on, beside its draws

WITHOUT_ERRORS = ("recipe", "keep_errors", "keep_distances", "fitted_to")  # of an identity

GROUPS_IN_MEMORY = 2  # of rows of the file, some megabytes each


class Reused:
    """Errors of an earlier run, by image; read as needed.

    Args:
        folder: The folder of a run that has ended, whose errors were kept (``--keep-errors``).
        settings: Those of the run that wants them.
        info: Its errors.
        distances: Whether it needs distances between predictions as well.

    Raises:
        MissingFile: if there is no run, or it kept no errors.
        UserError: if an error of one could differ from that of the other (another network, data, preparation, noise,
            loss, precision), the draws of one do not begin as those of the other, or distances are missing.
    """

    def __init__(self, folder: str | Path, settings: Settings, info: ErrorsInfo, distances: bool) -> None:
        self._folder, path = str(folder), Path(folder) / ERRORS
        there = Settings.read(Path(folder))
        if not path.is_file():
            raise MissingFile(
                f"reuse: {self._folder!r} has no {ERRORS}, expected a run that has ended, made with --keep-errors"
            )
        different = list(differences(_of_errors(there.identity), _of_errors(settings.identity)))
        if different:
            raise UserError(f"reuse: {self._folder!r} has errors of something else ({'; '.join(different)})")
        self._errors = StoredErrors(path)
        self._check_draws(self._errors.info, info)
        if distances and not self._errors.has_distances:
            raise UserError(
                f"reuse: {self._folder!r} has no distances between candidates, which this run needs; expected one made "
                "with --keep-errors distances"
            )
        self._distances = distances
        self._place = {
            image_id: (group, row)
            for group, ids in enumerate(self._errors.ids_by_group())
            for row, image_id in enumerate(ids)
        }
        self._groups: OrderedDict[int, list[StoredImage]] = OrderedDict()

    def _check_draws(self, there: ErrorsInfo, here: ErrorsInfo) -> None:
        pairs = zip(there.timesteps_S, here.timesteps_S, strict=False)  # as many as both have
        for draw, (earlier, wanted) in enumerate(pairs, start=1):
            if earlier != wanted:
                raise UserError(
                    f"reuse: the {there.draws} draws of {self._folder!r} and the {here.draws} of this run do not begin "
                    f"alike: draw {draw} is at timestep {earlier:g} there, {wanted:g} here. Draws nest on one grid "
                    "(--classifier.grid 1000 in both runs); an even grid for each number of draws does not, nor do "
                    "those of Stages"
                )
        if (there.names, there.classes) != (here.names, here.classes):
            raise UserError(f"reuse: {self._folder!r} has other candidates")

    def __call__(self, ids: Sequence[int | str]) -> list[KnownErrors | None]:
        """What is known of each image; None of one that the run did not have."""
        return [self._of(str(image_id)) for image_id in ids]

    def _of(self, image_id: str) -> KnownErrors | None:
        if image_id not in self._place:
            return None
        group, row = self._place[image_id]
        if group not in self._groups:
            self._groups[group] = self._errors.group(group, self._distances)
            while len(self._groups) > GROUPS_IN_MEMORY:
                self._groups.popitem(last=False)
        one = self._groups[group][row]
        return KnownErrors(one.candidates_K, one.draws_K, one.errors_SK, one.distances_SP)


def _of_errors(identity: dict[str, Any]) -> dict[str, Any]:
    """What of an identity single errors depend on."""
    recipe = identity.get("recipe", {})
    drawn = {} if isinstance(recipe.get("draws"), int) else {"draws": recipe.get("draws")}  # fixed: compared whole
    kept = {name: value for name, value in identity.items() if name not in WITHOUT_ERRORS}
    return kept | {"recipe": {name: recipe.get(name) for name in OF_ERRORS} | drawn}
