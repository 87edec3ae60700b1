"""ZeroShotCLIP: images told by prompts with CLIP, the same ones and on the same data as with a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar, Literal, Protocol

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_diffclf.baselines import open_clip
from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.images import resized_to
from lightning_diffclf.data.prompts import PromptSet
from lightning_diffclf.errors import UserError, first_line
from lightning_diffclf.identity import ByArguments
from lightning_diffclf.models.missing_weights import refuse_missing
from lightning_diffclf.models.pipeline import check_length
from lightning_diffclf.modules.zero_shot_sd import DTYPES, prompts_of
from lightning_diffclf.progress import tell
from lightning_diffclf.shipped import shipped

EMBED_BATCH = 256  # prompts that are embedded at once


class Towers(Protocol):
    """A CLIP that is loaded, by whichever library.

    Attributes:
        model: The network, in evaluation mode.
        side: Height and width that it takes, in pixels.
        mean: What is taken off each channel of images in [0, 1].
        std: What each is divided by then.
        limit: Tokens that it reads of a prompt.
        tokenizer: Gives ``input_ids`` of a prompt, and decodes them.
    """

    model: Any
    side: int
    mean: Sequence[float]
    std: Sequence[float]
    limit: int
    tokenizer: Any

    @property
    def preparation(self) -> Callable[[Image.Image], Tensor]:
        """RGB to (3, H, W) in [-1, 1]; has an identity."""

    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, D) of normalised pixels (B, 3, side, side)."""

    def texts(self, prompts: list[str], device: torch.device) -> Tensor:
        """Embeddings (N, D) of prompts."""


@dataclass(frozen=True)
class Processed:
    """Images as the model's own processor makes them, but in [-1, 1]: the module normalises them itself."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB to (3, H, W), float32 in [-1, 1]."""
        pixels: Tensor = self.processor(image, do_normalize=False, return_tensors="pt")["pixel_values"][0]
        return pixels * 2 - 1

    def identity(self) -> dict[str, Any]:
        """What the processor does with an image."""
        settings = self.processor.to_dict()
        return {
            name: settings[name] for name in sorted(settings) if name.startswith(("do_", "size", "crop", "resample"))
        }


class TransformersTowers:
    """:class:`Towers` of a ``CLIPModel`` of transformers."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        self.model, self.tokenizer, self.preparation = model, tokenizer, Processed(processor)
        self.side: int = model.config.vision_config.image_size
        self.limit: int = model.config.text_config.max_position_embeddings
        self.mean, self.std = processor.image_mean, processor.image_std

    def images(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return found

    def texts(self, prompts: list[str], device: torch.device) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt").to(device)
        names = ("input_ids", "attention_mask")
        found: Tensor = self.model.text_projection(self.model.text_model(**{n: tokens[n] for n in names}).pooler_output)
        return found


class ZeroShotCLIP(ByArguments, L.LightningModule):
    """Classifies with prompts by CLIP (Radford et al. 2021), or OpenCLIP's models in the same form.

    A candidate's logit is the cosine between the image's embedding and its prompt's, times the model's learned scale.
    With several prompts for each class, ``classifier.ensemble`` decides: ``mean`` takes the mean of their logits, which
    is that of their mean embedding, not normalised again. Nothing is trained and nothing is saved.

    Args:
        pretrained: Folder, or repository on the Hub, of a ``CLIPModel`` in transformers' format:
            ``openai/clip-vit-large-patch14``, ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``; or of open_clip, which has
            the ResNets: ``timm/resnet50_clip.openai``; or, with ``architecture``, a file of weights for open_clip.
        prompts: As for :class:`~lightning_diffclf.modules.zero_shot_sd.ZeroShotStableDiffusion`: a CSV file, or one or
            several templates.
        class_names: Name of each class; those of the Trainer's data module if omitted. A data module that has a
            ``prompt_set`` decides about prompts and candidates alone.
        revision: Branch, tag or commit of the repository.
        dtype: Of the weights; ``auto`` is float16 on a GPU, else float32. Logits are computed in float32.
        architecture: What open_clip calls the network whose weights are in the file ``pretrained``, such as ``RN50``;
            OpenAI's are ``RN50-quickgelu`` and the like. Null for folders and repositories, which say it themselves.

    Raises:
        ValueError: when the model is first needed, if it cannot be loaded, weights are missing, a prompt is too long,
            or prompts and names do not fit.
        FileNotFoundError: then, if there is no such CSV file.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {"architecture": "the network is in `network`"}

    def __init__(
        self,
        pretrained: str = "openai/clip-vit-large-patch14",
        prompts: str | list[str] = "a photo of a {}.",
        class_names: list[str] | None = None,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        architecture: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.pretrained, self.revision, self.dtype_name, self.architecture = pretrained, revision, dtype, architecture
        self._given = prompts, class_names
        self._asked: list[PromptSet] = []
        # In lists, so that Lightning does not take them for parts: checkpoints would save them.
        self._loaded: list[Towers] = []
        self._text: list[Tensor] = []  # embeddings of the prompts (K, D)

    @property
    def prompt_set(self) -> PromptSet:
        """What is asked."""
        if not self._asked:
            self._asked.append(prompts_of(*self._given, getattr(self._trainer, "datamodule", None)))
        return self._asked[0]

    @property
    def candidates(self) -> Candidates:
        """One for each prompt."""
        return self.prompt_set.candidates

    @property
    def towers(self) -> Towers:
        """The two networks, loaded when they are asked for first."""
        if not self._loaded:
            chosen = torch.float16 if torch.cuda.is_available() else torch.float32
            dtype = chosen if self.dtype_name == "auto" else DTYPES[self.dtype_name]
            if self.architecture is None:
                self._loaded.append(load(self.pretrained, self.revision, dtype))
            else:
                self._loaded.append(open_clip.from_file(self.architecture, self.pretrained, dtype))
        return self._loaded[0]

    @property
    def model(self) -> Any:
        """The network that both are in."""
        return self.towers.model

    @property
    def preparation(self) -> Callable[[Image.Image], Tensor]:
        """How the model wants images."""
        return self.towers.preparation

    def contents(self) -> dict[str, Any]:
        """What is asked, and of which networks; loads them."""
        asked, towers = self.prompt_set, self.towers
        names = {"prompts_K": asked.prompts, "candidates": asked.candidates}
        return names | {"normalised": {"mean": towers.mean, "std": towers.std}, "network": towers.model}

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to logits (B, K), float32; of another size than the model's, resized to it.

        Grey images (B, 1, H, W) are taken for three equal channels.

        Raises:
            ValueError: if they have another number of channels.
        """
        if images.shape[1] not in (1, 3):
            raise UserError(f"images: shape {tuple(images.shape)}, expected (B, 3, H, W) or (B, 1, H, W)")
        towers = self.towers
        model = towers.model.to(images.device)
        pixels = resized_to(images.float().expand(-1, 3, -1, -1), (towers.side, towers.side))
        pixels = functional.normalize((pixels + 1) / 2, list(towers.mean), list(towers.std))
        features = towers.images(pixels.to(model.logit_scale.dtype))
        with torch.autocast(images.device.type, enabled=False):
            scale = model.logit_scale.float().exp()
            return scale * normalised(features) @ self._text_embeddings(images.device).T

    @torch.no_grad()
    def _text_embeddings(self, device: torch.device) -> Tensor:
        """Of all prompts (K, D), float32, of norm 1; made at first use."""
        if not self._text:
            towers, prompts = self.towers, self.prompt_set.prompts
            check_length(towers.limit, "the tokenizer", towers.tokenizer, prompts)
            parts = []
            for start in range(0, len(prompts), EMBED_BATCH):
                tell("embedding prompts", start, len(prompts))
                parts.append(normalised(towers.texts(prompts[start : start + EMBED_BATCH], device)))
            self._text.append(torch.cat(parts))
        return self._text[0].to(device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def configure_optimizers(self) -> None:
        """Nothing is trained."""


def normalised(features: Tensor) -> Tensor:
    """Features (N, D) of norm 1, float32."""
    return torch.nn.functional.normalize(features.float(), dim=1)


def load(pretrained: str, revision: str | None, dtype: torch.dtype) -> Towers:
    """A CLIP of a folder or repository, in transformers' form or open_clip's; runs no code that comes with it.

    Raises:
        ValueError: if it is neither, a file is missing or damaged, or weights are missing.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    tell(f"loading {pretrained}")
    folder = Path(pretrained)
    if not folder.exists() and pretrained.startswith("assets/"):  # comes with the package
        folder = shipped(pretrained)
    place: dict[str, Any] = {"pretrained_model_name_or_path": str(folder) if folder.exists() else pretrained}
    place["revision"] = revision or "main"
    try:
        if (folder / open_clip.CONFIG).is_file() and not (folder / "config.json").is_file():
            return open_clip.from_place(str(folder), revision, dtype)
        kind = CLIPConfig.get_config_dict(**place)[0].get("model_type")
        if kind == "timm_wrapper":  # how transformers calls timm's config.json, which is beside open_clip's
            return open_clip.from_place(place["pretrained_model_name_or_path"], revision, dtype)
        if kind != "clip":
            raise UserError(f"pretrained: {pretrained!r} is a {kind!r} model, expected 'clip'")
        loaded: Any = CLIPModel.from_pretrained(**place, dtype=dtype, output_loading_info=True)
        tokenizer, processor = CLIPTokenizer.from_pretrained(**place), CLIPImageProcessor.from_pretrained(**place)
    except UserError:
        raise
    except UnpicklingError as error:
        raise UserError(
            f"pretrained: {pretrained!r} cannot be read ({first_line(error)}): it has a pickle that is not a file of "
            "tensors alone, expected model.safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        known = "it is no folder, and the Hub did not give it" if not folder.exists() else "it cannot be loaded"
        raise UserError(
            f"pretrained: {pretrained!r}: {known} ({first_line(error)}); expected a CLIPModel in transformers' format, "
            f"such as openai/clip-vit-large-patch14, or one of open_clip with {open_clip.CONFIG}; without a network, "
            "the folder of a downloaded one"
        ) from error
    model, found = loaded
    refuse_missing(sorted(found["missing_keys"]), "CLIPModel", pretrained)
    return TransformersTowers(model.eval().requires_grad_(False), tokenizer, processor)
