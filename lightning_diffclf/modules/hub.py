"""A trained DiT as a folder of plain files, and on the Hub: weights, settings, and a card that says what it can do."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_model
from torch import nn

from lightning_diffclf.errors import MissingFile, UserError
from lightning_diffclf.files import read_json, write_json

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"

SHOWN = {
    "accuracy": "accuracy",
    "top5": "top-5 accuracy",
    "mean_per_class": "mean accuracy per class",
    "images": "images",
    "nfe_per_image": "network calls per image",
    "nll": "negative log likelihood",
    "ece": "expected calibration error",
}  # of metrics.json, in a card

M = TypeVar("M", bound="OnHub")


class OnHub(ModelHubMixin):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` for modules with their arguments in ``hparams``.

    A folder has ``config.json`` (the arguments, plain values), ``model.safetensors`` (the weights in place) and
    ``README.md``, the model card. ``save_pretrained(folder, model_card_kwargs={"evaluation": run})`` writes what a
    run's folder says about it into the card; see :meth:`generate_model_card`.

    Example:
        >>> module.save_pretrained("digits", model_card_kwargs={"evaluation": "runs/dit_digits/evaluation"})
        ... # doctest: +SKIP
        >>> module = ClassConditionalDiT.from_pretrained("digits")  # doctest: +SKIP
    """

    hparams: Any

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # The mixin makes instances by a method that takes anything: what is asked for is said by __init__ alone.
        arguments = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self, nn.Module)
        write_json(dict(self.hparams), save_directory / CONFIG, 2, "model")
        save_model(self, str(save_directory / WEIGHTS), metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls: type[M], pretrained_model_name_or_path: str | Path, *, revision: str | None = None, **download: Any
    ) -> M:
        """The module that ``save_pretrained`` wrote, on the CPU and in evaluation mode. Runs nothing from the folder.

        Args:
            pretrained_model_name_or_path: Folder, or repository on the Hub.
            revision: Branch, tag or commit of the repository.
            **download: For ``huggingface_hub.snapshot_download``, such as ``token`` or ``local_files_only``.

        Raises:
            FileNotFoundError: if there is no such folder or repository, or a file is missing.
            ValueError: if settings are no plain values, or the weights are not those of the module that they make.
        """
        from lightning_diffclf.models.weight_files import read_file
        from lightning_diffclf.modules.checkpoints import made_of

        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            name, files = str(pretrained_model_name_or_path), [CONFIG, WEIGHTS]
            try:
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=files, **download))
            except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise MissingFile(f"model: no folder {name!r}, and the Hub did not give it ({reason})") from error
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise MissingFile(f"model: {str(folder)!r} has no {name}")
        arguments = read_json(folder / CONFIG, "model")
        if not isinstance(arguments, dict):
            raise UserError(f"model: {CONFIG} of {str(folder)!r} is no mapping of names to values")
        maker: Any = cls
        module: Any = made_of(maker, arguments, read_file(folder / WEIGHTS), folder)
        return module.eval()

    def generate_model_card(self, evaluation: str | Path | None = None, license: str | None = None) -> ModelCard:
        """What the module is, how to use it, and what an evaluation found.

        Args:
            evaluation: Folder of an evaluation, with ``metrics.json``.
            license: Its identifier on the Hub, such as ``apache-2.0``.

        Raises:
            FileNotFoundError: if there is no ``metrics.json``.
            ValueError: if it cannot be read.
        """
        data = ModelCardData(
            library_name="lightning_diffclf",
            pipeline_tag="image-classification",
            tags=["diffusion", "dit", "diffusion-classifier"],
            license=license,
        )
        arguments = dict(self.hparams)
        names = [str(name) for name in arguments.get("class_names") or range(arguments["num_classes"])]
        shown = ", ".join(names[:20]) + (f", … ({len(names):,} classes)" if len(names) > 20 else "")
        kind = "latents" if arguments["latents"] else "pixels in [-1, 1]"
        size = arguments["input_size"]
        height, width = size if isinstance(size, Sequence) else (size, size)
        lines = [
            "# Class-conditional DiT that classifies",
            "",
            "A diffusion transformer trained with [lightning_diffclf](https://pypi.org/project/lightning-diffclf/). It "
            "generates images of a class, and classifies them: the class under which it predicts the noise in an image "
            "best wins (Li et al. 2023, arXiv 2303.16203).",
            "",
            f"- Classes: {shown}",
            f"- Input: {kind}, {arguments['in_channels']} × {height} × {width}",
            f"- Noise schedule: {arguments['schedule']}",
            "",
            "```python",
            "from lightning_diffclf import ClassConditionalDiT, DiffusionClassifier, LikelihoodRatio",
            "",
            'module = ClassConditionalDiT.from_pretrained("…")  # this repository, or a folder',
            "classifier = DiffusionClassifier(module, draws=100, elimination=LikelihoodRatio())",
            "classifier(images)[0].top(5)  # images: the input above, in a batch",
            "```",
        ]
        if evaluation is not None:
            lines += ["", *_found(Path(evaluation))]
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n")


def _found(folder: Path) -> list[str]:
    """What an evaluation found, as a table, and how."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise MissingFile(f"evaluation: no file {str(path)!r}")
    found = read_json(path, "evaluation")
    metrics = found.get("metrics") if isinstance(found, dict) else None
    if not isinstance(metrics, dict) or not isinstance(found.get("settings"), dict):
        raise UserError(f"evaluation: {str(path)!r} is none that an evaluation wrote")
    numbers = {text: metrics[name] for name, text in SHOWN.items() if isinstance(metrics.get(name), (int, float))}
    rows = [f"| {text} | {n:,} |" if isinstance(n, int) else f"| {text} | {n:.4g} |" for text, n in numbers.items()]
    recipe = found["settings"].get("recipe") or {}
    how = {
        "data": _class_of(found["settings"].get("data")),
        "draws": recipe.get("draws"),
        "loss": recipe.get("loss"),
        "elimination": _class_of(recipe.get("elimination")),
    }
    said = ", ".join(f"{name} `{value}`" for name, value in how.items() if value)
    return ["## Evaluation", "", f"With {said}." if said else "", "", "| | |", "| --- | ---: |", *rows]


def _class_of(identity: Any) -> str | None:
    """The short name of the class that an identity is of."""
    name = identity.get("class") if isinstance(identity, dict) else identity
    return None if name is None else str(name).rpartition(".")[2]
