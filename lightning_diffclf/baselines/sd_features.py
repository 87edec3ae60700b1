"""The paper's SD Features: a small network trained on what a layer inside a diffusion model makes of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import Context
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

from lightning_diffclf.baselines.feature_cache import FeatureCache
from lightning_diffclf.baselines.trained import TrainedClassifier, check_names
from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.data.protocols import HasLatents
from lightning_diffclf.errors import UserError
from lightning_diffclf.features import layer_named, layer_output, timestep_at
from lightning_diffclf.files import read_json
from lightning_diffclf.hub import TEXT_TO_IMAGE
from lightning_diffclf.models.pipeline import PipelineDenoiser, load
from lightning_diffclf.modules.checkpoints import network_of
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT
from lightning_diffclf.modules.zero_shot_sd import DTYPES

EARLY = 0.1  # of the time axis: t = 100 of Stable Diffusion's 1,000, as in the paper


class DenoiserFeatures(TrainedClassifier):
    """Trains a head on features of a frozen diffusion model: discriminative, on what was learnt by generating.

    The features of an image are the output of one layer for the clean x0, scaled as at a timestep but without noise,
    and without a condition: the empty prompt, or a class-conditional network's null label. The diffusion model sees
    each image once in a training (:class:`~.feature_cache.FeatureCache`), and once, by one call, in an evaluation. It
    is no part of the module: it is neither trained nor saved.

    Li et al. 2023 (section 5.1, appendix F.4) take the mid-block of Stable Diffusion 2.0 at t = 100 and a ResNet-18
    without its second stage, trained by AdamW with a rate of 1e-4 and batches of 16. Whether they add noise, and the
    head's strides, are not said there.

    Args:
        pretrained: A text-to-image pipeline of diffusers (folder, or repository on the Hub), or a class-conditional
            network: a checkpoint of ours, or published weights of a DiT, as a file or as a folder of diffusers.
        layer: Name of the layer, as ``named_modules()`` of the network has it, such as ``mid_block`` or
            ``net.blocks.5``; the mid-block, or the middle one of the longest list of blocks, if omitted.
        timestep: Timestep of the network's schedule; a tenth of the time axis, which is 100 of 1,000, if omitted.
        head: ``resnet``: convolutions as wide as the paper's with regard to the features; ``linear``: a linear map of
            their mean over positions, normalised.
        num_classes: Number of classes. Null: as the data are.
        class_names: Name of each class; if omitted, as the data call them, or "0", "1", …
        revision: Branch, tag or commit of the repository.
        dtype: Of a pipeline's weights; ``auto`` is float16 on a GPU, else float32.
        cache: Folder for the features of training images, which several trainings may share; ``features`` in the run's
            folder if omitted. Latents, which are drawn anew in each step, are not kept.
        lr: Learning rate of AdamW.
        betas: Its moment decay rates.
        weight_decay: Its weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        decay: What it does then: stay (``none``) or fall to zero at ``max_steps`` along a ``cosine`` or a line.

    Raises:
        ValueError: if the settings contradict each other, the network cannot be loaded, or has no such layer.
        FileNotFoundError: if there is no such checkpoint.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        **TrainedClassifier.CANNOT_CHANGE_RESULTS,
        "cache": "only where features are kept",
    }

    def __init__(
        self,
        pretrained: str = TEXT_TO_IMAGE,
        layer: str | None = None,
        timestep: float | None = None,
        head: Literal["resnet", "linear"] = "resnet",
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        revision: str | None = None,
        dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto",
        cache: str | None = None,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine", "linear"] = "none",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes is None:
            raise UserError("num_classes: None, and the data do not say; expected a number")
        check_names(class_names, num_classes)
        if head not in HEADS:
            raise UserError(f"head: {head!r}, expected one of {sorted(HEADS)}")
        # In lists, so that Lightning does not take them for parts: checkpoints would save them.
        self._extractor = [Extractor(unconditional(pretrained, revision, dtype), layer, timestep)]
        self._cache: list[FeatureCache] = []
        self.net = HEADS[head](self.extractor.channels, num_classes)

    @property
    def extractor(self) -> Extractor:
        """What makes features of images."""
        return self._extractor[0]

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width in pixels of what a pipeline was trained on."""
        size: tuple[int, int] = self.extractor.denoiser.native_size
        return size

    def contents(self) -> dict[str, Any]:
        """Diffusion model, layer and timestep, the weights of the head, and what it is asked about."""
        return {"extractor": self.extractor, "net": self.net, "asked": self._conditions()._asdict()}

    def setup(self, stage: str) -> None:
        """Check the data module, and open the cache before a training."""
        super().setup(stage)
        data: object = getattr(self._trainer, "datamodule", None)
        latents = isinstance(data, HasLatents) and len(data.latents("fit")) > 0
        if stage == "fit" and not latents:
            folder = self.hparams["cache"] or Path(self.trainer.default_root_dir) / "features"
            self._cache = [FeatureCache(Path(folder), self.extractor)]

    def teardown(self, stage: str) -> None:
        """Write the features that are in no file yet; evaluations keep none."""
        self._flush()
        self._cache = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Features are kept with the step that is resumed from."""
        super().on_save_checkpoint(checkpoint)
        self._flush()

    def _flush(self) -> None:
        for cache in self._cache:
            cache.flush()

    def trained_logits(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to the logits of all classes that were trained (B, num_classes).

        Raises:
            ValueError: if the diffusion model cannot take them.
        """
        logits: Tensor = self.net(self._features(images))
        return logits

    def _features(self, images: Tensor) -> Tensor:
        if not self._cache:
            return self.extractor(images)
        [cache], keys = self._cache, content_ids(images)
        new = list({key: row for row, key in enumerate(keys) if cache.get(key) is None}.values())
        if new:
            cache.add([keys[row] for row in new], self.extractor(images[new]))
        found = [one for one in map(cache.get, keys) if one is not None]
        return torch.stack(found).to(images.device).float()


class Extractor:
    """Features of images: what a layer of a diffusion model makes of them.

    Args:
        denoiser: Without a condition; see :func:`unconditional`.
        layer: See :class:`DenoiserFeatures`, also for ``timestep``.
        timestep: Timestep of its schedule.

    Attributes:
        channels: Channels of a feature map.

    Raises:
        ValueError: if there is no such layer, its output is no map, or the timestep is none of the schedule's.
    """

    def __init__(self, denoiser: Any, layer: str | None = None, timestep: float | None = None) -> None:
        schedule = denoiser.schedule
        if timestep is not None:
            last = (schedule.num_timesteps or 2) - 1
            if not 0 <= timestep <= last:
                raise UserError(f"timestep: {timestep}, expected 0 … {last} of the network's schedule")
        self.denoiser = denoiser
        self.timestep = timestep_at(schedule, EARLY) if timestep is None else float(timestep)
        self.layer, part = layer_named(denoiser.network, layer)
        self._layer = self.layer, part
        self.channels: int = self(denoiser.blank()).shape[1]

    def identity(self) -> dict[str, Any]:
        """What features depend on."""
        return {"denoiser": self.denoiser.identity(), "layer": self.layer, "timestep": self.timestep}

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to features (B, F, h, w), float32 of float16's precision, which is kept.

        Raises:
            ValueError: if the network cannot take them.
        """
        with torch.autocast(images.device.type, enabled=False):
            x0 = self.denoiser.encode(images).float()
            output = layer_output(self.denoiser, self._layer, x0, self.timestep)
        return as_map(output.float(), x0).half().float()


def as_map(output: Tensor, x0: Tensor) -> Tensor:
    """A layer's output as a map (B, F, h, w): of tokens (B, T, F) in rows, of one vector (B, F), or as it is.

    Raises:
        ValueError: if tokens are none of patches of ``x0`` (B, C, H, W).
    """
    if output.ndim == 4:
        return output
    if output.ndim == 2:
        return output[:, :, None, None]
    height, width = x0.shape[2:]
    patch = round(math.sqrt(height * width / output.shape[1]))
    if output.ndim != 3 or patch < 1 or (height // patch) * (width // patch) != output.shape[1]:
        raise UserError(
            f"layer: it gives {tuple(output.shape)}, expected maps, or a token for each patch of {height} x {width}; "
            "name another layer"
        )
    return output.transpose(1, 2).unflatten(2, (height // patch, width // patch))


# --- diffusion models without a condition ----------------------------------------------------------------------------


class UnconditionalPipeline(PipelineDenoiser):
    """A text-to-image pipeline that is given the empty prompt."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline, Candidates(["nothing"]), [""])

    def blank(self) -> Tensor:
        """An image of the size that it was trained on (1, 3, H, W)."""
        return torch.zeros(1, 3, *self.native_size)


class UnconditionalDiT:
    """A class-conditional network of ours that is given its null label.

    Raises:
        ValueError: if it has none.
    """

    def __init__(self, module: ClassConditionalDiT) -> None:
        self.network, self.schedule = module.eval().requires_grad_(False), module.schedule
        null = module.net.null_label
        if null is None:
            raise UserError("pretrained: the network was trained without label dropout, expected one with a null label")
        self._null: int = null

    def identity(self) -> dict[str, Any]:
        """The weights, what they mean, and the autoencoder."""
        module = self.network
        vae = module.autoencoder if module.hparams["vae"] is not None else None
        return {"net": module.net, "noise_levels": self.schedule, "autoencoder": vae}

    def blank(self) -> Tensor:
        """What the network sees (1, C, H, W)."""
        return torch.zeros(1, *self.network.image_shape)

    def encode(self, images: Tensor) -> Tensor:
        """See :meth:`ClassConditionalDiT.encode`."""
        return self.network.to(images.device).encode(images)

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Output of the network for its null label, whatever the candidate."""
        return self.network.net(x_t.to(self.network.dtype), t, torch.full_like(candidate, self._null))


def unconditional(pretrained: str, revision: str | None, dtype: str) -> UnconditionalPipeline | UnconditionalDiT:
    """A diffusion model that is told nothing.

    Args:
        pretrained: See :class:`DenoiserFeatures`.
        revision: Likewise.
        dtype: Likewise.

    Raises:
        ValueError: if it cannot be loaded.
        FileNotFoundError: if it is the name of a checkpoint that is not there.
    """
    path = Path(pretrained)
    index = path / "model_index.json"
    is_dit = index.is_file() and read_json(index, "pretrained").get("_class_name") == "DiTPipeline"
    if is_dit or path.is_file() or path.suffix in (".ckpt", ".pt", ".safetensors"):
        # In a context of its own: Lightning's command line says there what the module in the making was given, and a
        # module that is made within it would take that for its own arguments.
        return UnconditionalDiT(Context().run(network_of, pretrained, None, "linear"))
    chosen = torch.float16 if torch.cuda.is_available() else torch.float32
    return UnconditionalPipeline(load(pretrained, revision, chosen if dtype == "auto" else DTYPES[dtype]))


# --- heads -----------------------------------------------------------------------------------------------------------


def resnet_head(channels: int, num_classes: int) -> nn.Module:
    """A ResNet-18 (He et al. 2016) for small maps: no second stage, widths of 5/4 and 5/2 of the features' channels.

    As the paper's table 11, which has 1280 and 2560 for 1024. The last two stages halve the map.
    """
    wide, wider = 5 * channels // 4, 5 * channels // 2
    first = nn.Sequential(conv3x3(channels, wide), nn.BatchNorm2d(wide), nn.ReLU(inplace=True))
    stages = [_stage(wide, wide, 1), _stage(wide, wider, 2), _stage(wider, wider, 2)]
    return nn.Sequential(first, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wider, num_classes))


def _stage(before: int, after: int, stride: int) -> nn.Module:
    shortcut = nn.Sequential(conv1x1(before, after, stride), nn.BatchNorm2d(after))
    same = before == after and stride == 1
    first = BasicBlock(before, after, stride, None if same else shortcut)
    return nn.Sequential(first, BasicBlock(after, after))


def linear_head(channels: int, num_classes: int) -> nn.Module:
    """A linear map of the mean over positions, after normalisation of each channel."""
    normalised = nn.BatchNorm2d(channels, affine=False)
    return nn.Sequential(normalised, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


HEADS = {"resnet": resnet_head, "linear": linear_head}
