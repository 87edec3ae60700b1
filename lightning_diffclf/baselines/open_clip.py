"""CLIPs of open_clip (Ilharco et al. 2021): OpenAI's ResNets too, which transformers does not have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_diffclf.errors import MissingFile, UserError, first_line
from lightning_diffclf.files import read_json
from lightning_diffclf.hub import HF, local_file
from lightning_diffclf.models.weight_files import read_file

CONFIG = "open_clip_config.json"  # beside the weights: the network and the preparation of images
SAFE, PICKLED = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
OTHERS = ("custom_text", "hf_model_name", "hf_tokenizer_name", "timm_model_name")  # towers of other libraries, by name


def library() -> ModuleType:
    """The package ``open_clip``.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise UserError(
            "pretrained: a CLIP of open_clip needs it (pip install 'lightning-diffclf[baselines]', or open_clip_torch)"
        ) from error
    found: ModuleType = open_clip
    return found


@dataclass(frozen=True)
class Prepared:
    """Images as open_clip makes them for evaluation, but in [-1, 1]: the module normalises them itself."""

    settings: Any  # a PreprocessCfg

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB to (3, H, W), float32 in [-1, 1]."""
        half = (0.5, 0.5, 0.5)
        make = library().transform.image_transform_v2
        pixels: Tensor = make(dataclasses.replace(self.settings, mean=half, std=half), is_train=False)(image)
        return pixels


class Tokens:
    """A tokenizer of open_clip in the form of transformers'."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, prompt: str) -> SimpleNamespace:
        begin, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return SimpleNamespace(input_ids=[begin, *self.tokenizer.encode(prompt), end])

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode([one for one in ids if one not in self.tokenizer.all_special_ids])
        return text.strip()


class OpenCLIPTowers:
    """:class:`~.clip.Towers` of a ``CLIP`` of open_clip."""

    def __init__(self, model: Any, settings: Any) -> None:
        self.model, self.preparation = model, Prepared(settings)
        self.side: int = settings.size[0] if isinstance(settings.size, (tuple, list)) else settings.size
        self.mean, self.std = settings.mean, settings.std
        self.limit: int = model.context_length
        self._tokenizer = library().SimpleTokenizer(context_length=self.limit)
        self.tokenizer = Tokens(self._tokenizer)

    def images(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model.encode_image(pixels)
        return found

    def texts(self, prompts: list[str], device: torch.device) -> Tensor:
        found: Tensor = self.model.encode_text(self._tokenizer(prompts).to(device))
        return found


def from_place(place: str, revision: str | None, dtype: torch.dtype) -> OpenCLIPTowers:
    """Of a folder or repository with ``open_clip_config.json``.

    Raises:
        UserError: if a file is missing or damaged, or the network has towers of another library.
    """

    def file(name: str) -> Path:
        at = f"@{revision}" if revision else ""
        return Path(place, name) if Path(place).is_dir() else local_file(f"{HF}{place}{at}/{name}")

    said = read_json(file(CONFIG), "pretrained")
    if not isinstance(said, dict) or not isinstance(said.get("model_cfg"), dict):
        raise UserError(f"pretrained: {CONFIG} of {place!r} has no model_cfg, expected the sizes of the network")
    prepared = said.get("preprocess_cfg") or {}
    with suppress(MissingFile):  # of the Hub, which then is asked for the other one
        weights = file(SAFE)
        if weights.is_file():
            return towers(said["model_cfg"], prepared, weights, place, dtype)
    weights = file(PICKLED)
    if not weights.is_file():
        raise MissingFile(f"pretrained: no weights in {place!r}, expected {SAFE} or {PICKLED}")
    return towers(said["model_cfg"], prepared, weights, place, dtype)


def from_file(architecture: str, path: str, dtype: torch.dtype) -> OpenCLIPTowers:
    """Of a file of weights, for a network that open_clip knows by name; images are prepared as OpenAI's.

    Raises:
        UserError: if there is no such file or name, or they do not belong together.
    """
    known = library().list_models()
    if architecture not in known:
        raise UserError(f"architecture: {architecture!r}, expected one that open_clip has, such as RN50-quickgelu")
    if not local_file(path).is_file():
        raise MissingFile(f"pretrained: no file {path!r}, expected weights of {architecture}")
    return towers(library().get_model_config(architecture), {}, local_file(path), path, dtype)


def towers(
    sizes: Mapping[str, Any], prepared: Mapping[str, Any], weights: Path, where: str, dtype: torch.dtype
) -> OpenCLIPTowers:
    """A network of these sizes with these weights; nothing that ``sizes`` names is imported or downloaded.

    Raises:
        UserError: if they do not belong together, or the towers are another library's.
    """
    parts = [sizes, *(sizes.get(one) for one in ("vision_cfg", "text_cfg"))]
    strange = [name for part in parts if isinstance(part, Mapping) for name in OTHERS if part.get(name)]
    if strange:
        raise UserError(f"pretrained: {where!r} has {strange[0]}, expected a CLIP with towers of open_clip itself")
    clip = library()
    try:
        settings = clip.transform.merge_preprocess_dict(dataclasses.asdict(clip.transform.PreprocessCfg()), prepared)
        model = clip.CLIP(**{name: one for name, one in sizes.items() if name not in OTHERS})
        settings = clip.transform.PreprocessCfg(**settings | {"size": model.visual.image_size})
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(f"pretrained: {CONFIG} of {where!r} describes no CLIP ({first_line(error)})") from error
    found = read_file(weights)
    found = found["state_dict"] if isinstance(found.get("state_dict"), dict) else found  # of open_clip's own training,
    found = {name.removeprefix("module."): value for name, value in found.items()}  # where names begin with module.
    here = model.state_dict().keys()
    strange = [*(f"{name} is missing there" for name in sorted(here - found.keys()))]
    strange += [f"{name} is unknown here" for name in sorted(found.keys() - here)]
    try:
        if not strange:
            model.load_state_dict(found)
    except (RuntimeError, TypeError, AttributeError) as error:
        strange = [" ".join(str(error).split())[:300]]
    if strange:
        raise UserError(
            f"pretrained: {str(weights)!r} does not fit the network as {where!r} has it: {strange[0]}"
            + (f", and {len(strange) - 1} more" if strange[1:] else "")
        )
    return OpenCLIPTowers(model.to(dtype).eval().requires_grad_(False), settings)
