"""ZeroShotStableDiffusion: a pretrained text-to-image model and prompts, as a ConditionalDenoiser for a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_diffclf.data.prompts import TEMPLATES, PromptSet, from_csv, from_names, with_none
from lightning_diffclf.data.protocols import HasClassNames, HasPrompts
from lightning_diffclf.denoiser import ConditionVectors, predict_rows
from lightning_diffclf.errors import UserError
from lightning_diffclf.hub import TEXT_TO_IMAGE
from lightning_diffclf.identity import ByArguments
from lightning_diffclf.models.pipeline import PipelineDenoiser, load

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class ZeroShotStableDiffusion(ByArguments, L.LightningModule):
    """Classifies with prompts: Stable Diffusion 1.x, 2.x, XL, 3.x, FLUX, PixArt, or a class-conditional DiT.

    Nothing is trained and nothing is saved: the networks are not parts of the module. They move to the device of the
    first images.

    Args:
        pretrained: Folder in diffusers' format, or repository on the Hub.
        prompts: A CSV file (``prompt,classname,classidx``), or a template of :data:`~lightning_diffclf.data.prompts
            .TEMPLATES` by its name, or a template with ``{}`` where the class name goes, or several of these; the
            latter three need ``class_names``.
        class_names: Name of each class; those of the Trainer's data module (``class_names``) if omitted. A data module
            that has a ``prompt_set`` decides about prompts and candidates alone.
        revision: Branch, tag or commit of the repository.
        dtype: Of the weights; ``auto`` is float16 on a GPU, else float32.
        offload: Keep on the device only what is at work; see :class:`~lightning_diffclf.models.pipeline
            .PipelineDenoiser`.
        lora: Folder, file or repository with LoRA weights, which are merged into the network's.
        attention: Attention of diffusers by its name; its default if omitted. ``classifier.compile`` compiles.
        drop_t5: Leave the T5 text encoder of Stable Diffusion 3 out: 10 GB less.
        none_of_these: Whether "none of these", the empty prompt, is a candidate beside the classes.

    Raises:
        ValueError: when the model is first needed, if it cannot be loaded, or prompts and names do not fit.
        FileNotFoundError: then, if there is no such CSV file.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {"offload": "only where networks are in memory"}

    def __init__(
        self,
        pretrained: str = TEXT_TO_IMAGE,
        prompts: str | list[str] = "a photo of a {}.",
        class_names: Sequence[str] | None = None,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        offload: bool = False,
        lora: str | None = None,
        attention: str | None = None,
        drop_t5: bool = False,
        none_of_these: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.dtype_name, self.offload, self.drop_t5 = dtype, offload, drop_t5
        self.pretrained, self.revision, self.lora, self.attention = pretrained, revision, lora, attention
        # In a list, so that Lightning does not take it for a part: EMA would copy it, checkpoints would save it.
        self._denoiser: list[PipelineDenoiser] = []
        self._given, self._null = (prompts, class_names), none_of_these

    @property
    def denoiser(self) -> PipelineDenoiser:
        """What does the work; loaded when it is asked for first."""
        if not self._denoiser:
            prompt_set = prompts_of(*self._given, getattr(self._trainer, "datamodule", None))
            prompt_set = with_none(prompt_set) if self._null else prompt_set
            self._denoiser.append(PipelineDenoiser(self.load_pipeline(), *prompt_set, offload=self.offload))
        return self._denoiser[0]

    def load_pipeline(self) -> Any:
        """The pretrained pipeline, loaded anew."""
        chosen = torch.float16 if torch.cuda.is_available() else torch.float32
        others: dict[str, Any] = {"text_encoder_3": None, "tokenizer_3": None} if self.drop_t5 else {}
        dtype = chosen if self.dtype_name == "auto" else DTYPES[self.dtype_name]
        return load(self.pretrained, self.revision, dtype, self.lora, self.attention, **others)

    def contents(self) -> dict[str, Any]:
        """What is asked, and of which networks; loads them."""
        return {"denoiser": self.denoiser}

    @property
    def schedule(self) -> Any:
        """Noise schedule of the network."""
        return self.denoiser.schedule

    @property
    def candidates(self) -> Any:
        """One for each prompt."""
        return self.denoiser.candidates

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the network was trained on."""
        return self.denoiser.native_size

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents."""
        return self.denoiser.encode(images)

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Network output for rows of noisy latents, times and candidates."""
        return self.denoiser.predict(x_t, t, candidate)

    def predict_shared(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        """As :meth:`predict` for ``x_t[pair]`` and ``t[pair]``; what rows have in common is computed once."""
        return predict_rows(self.denoiser, x_t, t, pair, candidate)

    def conditions(self, candidate: Tensor) -> tuple[Tensor, ...]:
        """What the text encoders make of candidates (N,), as :meth:`predict_from` takes it."""
        return self.denoiser.conditions(candidate)

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: ConditionVectors) -> Tensor:
        """As :meth:`predict`, for conditions in place of candidates."""
        return self.denoiser.predict_from(x_t, t, conditions)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def configure_optimizers(self) -> None:
        """Nothing is trained."""


def prompts_of(prompts: str | Sequence[str], class_names: Sequence[str] | None, data: object) -> PromptSet:
    """What a zero-shot network is asked: as ``data`` say (:class:`~.HasPrompts`), or by templates and class names.

    Args:
        prompts: See :class:`ZeroShotStableDiffusion`.
        class_names: Likewise.
        data: The data module, if there is one.
    """
    if isinstance(data, HasPrompts):  # the data say it all
        return data.prompt_set
    if class_names is None and not is_csv(prompts) and isinstance(data, HasClassNames):
        class_names = data.class_names
    return make_prompts(prompts, class_names)


def is_csv(prompts: str | Sequence[str]) -> bool:
    """Whether ``prompts`` is the name of a CSV file."""
    return isinstance(prompts, str) and prompts.endswith(".csv")


def make_prompts(prompts: str | Sequence[str], class_names: Sequence[str] | None) -> PromptSet:
    """Candidates and their prompts; see :class:`ZeroShotStableDiffusion`."""
    if isinstance(prompts, str) and is_csv(prompts):
        return from_csv(prompts)
    templates = [TEMPLATES.get(one, one) for one in ([prompts] if isinstance(prompts, str) else prompts)]
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"prompts: {template!r}, expected a CSV file, a template with '{{}}', or one of {sorted(TEMPLATES)}"
            )
    if class_names is None:
        raise UserError("class_names: none given, expected a name for each class, or a CSV file as prompts")
    return from_names(class_names, templates)
