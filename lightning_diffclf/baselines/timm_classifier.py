"""Classifiers of timm: with their published weights, or trained from scratch on the data that a DiT is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from PIL import Image
from torch import Tensor, nn

from lightning_diffclf.baselines.trained import TrainedClassifier, check_names, rows_of
from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.images import resized_to, to_rgb
from lightning_diffclf.data.protocols import HasClassNames, HasNetworkClasses
from lightning_diffclf.errors import UserError, first_line
from lightning_diffclf.identity import ByArguments
from lightning_diffclf.modules.conditions import Conditions, conditions
from lightning_diffclf.progress import tell

IMAGENET = 1000  # classes that data sets made like ImageNet number theirs by


@dataclass(frozen=True)
class TimmPreparation:
    """Images as timm's own evaluation makes them for a network, but in [-1, 1]: the module normalises them itself.

    Attributes:
        config: timm's data configuration of the network.
    """

    config: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB to (3, H, W), float32 in [-1, 1]."""
        from timm.data import create_transform

        used = {name: self.config[name] for name in ("input_size", "interpolation", "crop_pct", "crop_mode")}
        pixels: Tensor = create_transform(**used, is_training=False, normalize=False)(to_rgb(image))
        return pixels.float() / 127.5 - 1

    def identity(self) -> dict[str, Any]:
        """What is done with an image."""
        return {name: self.config[name] for name in sorted(self.config)}


class TimmClassifier(ByArguments, L.LightningModule):
    """A classifier of timm with its published weights, on ImageNet and data sets made like it.

    Where the data have fewer classes (ImageNet-A, ObjectNet), the logits of theirs are compared; where several of
    ImageNet's make up one of theirs, the best counts. Nothing is trained and nothing is saved.

    Args:
        model: A model of timm, such as ``resnet50.tv_in1k`` or ``vit_base_patch16_224.augreg_in21k_ft_in1k``; or
            ``local-dir:FOLDER`` or ``hf-hub:USER/NAME`` for one that was saved for the Hub.
        class_names: Name of each class; those of the data if omitted.

    Raises:
        ValueError: when the model is first needed, if there is none of this name, its weights cannot be had, or it has
            other classes than the data.
    """

    def __init__(self, model: str = "resnet50.tv_in1k", class_names: list[str] | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.name = model
        self._class_names = class_names
        self._loaded: list[nn.Module] = []  # in a list, so that Lightning does not take it for a part
        self._asked: list[Conditions] = []

    @property
    def net(self) -> Any:
        """The network, loaded when it is asked for first."""
        if not self._loaded:
            tell(f"loading {self.name}")
            self._loaded.append(make(self.name, pretrained=True).eval().requires_grad_(False))
        return self._loaded[0]

    @property
    def config(self) -> dict[str, Any]:
        """Timm's data configuration of the network: size, crop, interpolation, mean and deviation."""
        from timm.data import resolve_model_data_config

        found: dict[str, Any] = resolve_model_data_config(self.net)
        return found

    @property
    def preparation(self) -> TimmPreparation:
        """How the network wants images."""
        return TimmPreparation(self.config)

    def _conditions(self) -> Conditions:
        if not self._asked:
            data: object = getattr(self._trainer, "datamodule", None)
            self._asked.append(asked_of(self.net.num_classes, self._class_names, data))
        return self._asked[0]

    @property
    def candidates(self) -> Candidates:
        """One for each class; where the data have fewer than the network, those that make them up."""
        return self._conditions().candidates

    def contents(self) -> dict[str, Any]:
        """The network, how images are normalised, and what is asked; loads it."""
        config = self.config
        return {"net": self.net, "mean": config["mean"], "std": config["std"], "asked": self._conditions()._asdict()}

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to logits (B, K); of another size than the network's, resized to it.

        Grey images (B, 1, H, W) are taken for three equal channels.

        Raises:
            ValueError: if they have another number of channels.
        """
        config, net = self.config, self.net.to(images.device)
        channels, *size = config["input_size"]
        if images.shape[1] not in (1, channels):
            raise UserError(f"images: shape {tuple(images.shape)}, expected (B, {channels}, H, W) or (B, 1, H, W)")
        pixels = resized_to(images.float().expand(-1, channels, -1, -1), (size[0], size[1]))
        mean, std = (torch.tensor(config[name], device=images.device).view(-1, 1, 1) for name in ("mean", "std"))
        return rows_of(net(((pixels + 1) / 2 - mean) / std), self._conditions())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def configure_optimizers(self) -> None:
        """Nothing is trained."""


class TimmFromScratch(TrainedClassifier):
    """Trains a network of timm on labelled images by cross-entropy: a discriminative twin of a DiT on the same data.

    Batches are those of :class:`~lightning_diffclf.modules.class_conditional_dit.ClassConditionalDiT`: images in
    [-1, 1], or latents. With the DiT's width, depth, heads and patches, a ViT sees the same tokens as the DiT does.

    Args:
        model: Architecture of timm, such as ``vit_tiny_patch16_224`` or ``resnet18``.
        input_size: Height and width that the network works on, one number if square: images are resized to it. Null,
            here and below: as the data are.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        class_names: Name of each class; if omitted, as the data call them, or "0", "1", …
        hidden_size: Width of a transformer; the architecture's own if omitted, here and in the next three.
        depth: Number of its blocks.
        num_heads: Its attention heads.
        patch_size: Side of its patches.
        drop_rate: Dropout before the last layer.
        lr: Learning rate of AdamW.
        betas: Its moment decay rates.
        weight_decay: Its weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        decay: What it does then: stay (``none``) or fall to zero at ``max_steps`` along a ``cosine`` or a line.

    Raises:
        ValueError: if the settings contradict each other, or timm has no such architecture.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        **TrainedClassifier.CANNOT_CHANGE_RESULTS,
        "drop_rate": "of training",
    }

    def __init__(
        self,
        model: str = "vit_tiny_patch16_224",
        input_size: int | list[int] | None = 224,
        in_channels: int | None = 3,
        num_classes: int | None = 1000,
        class_names: list[str] | None = None,
        hidden_size: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        patch_size: int | None = None,
        drop_rate: float = 0.0,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine", "linear"] = "none",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if input_size is None or in_channels is None or num_classes is None:
            raise UserError("input_size, in_channels, num_classes: None, and the data do not say; expected numbers")
        check_names(class_names, num_classes)
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        self.image_shape = (in_channels, height, width)
        own = {"embed_dim": hidden_size, "depth": depth, "num_heads": num_heads, "patch_size": patch_size}
        given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if given or "vit" in model:
            given["img_size"] = (height, width)
        self.net = make(model, num_classes=num_classes, in_chans=in_channels, drop_rate=drop_rate, **given)

    def contents(self) -> dict[str, Any]:
        """The weights in place, and what they are asked about."""
        return {"net": self.net, "asked": self._conditions()._asdict()}

    def trained_logits(self, images: Tensor) -> Tensor:
        """Of all of the network's classes (B, C), for images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: if they have another number of channels than the network.
        """
        channels, *size = self.image_shape
        if images.shape[1] != channels:
            raise UserError(f"images: shape {tuple(images.shape)}, expected (B, {channels}, H, W)")
        logits: Tensor = self.net(resized_to(images, (size[0], size[1])))
        return logits


def make(model: str, **settings: Any) -> Any:
    """A network of timm.

    Raises:
        ValueError: if timm has none of this name, cannot make it with these settings, or its weights cannot be had.
    """
    import timm

    try:
        return timm.create_model(model, **settings)
    except Exception as error:  # timm raises what comes: RuntimeError, TypeError, AssertionError, the Hub's own
        reason = first_line(error)
        local = model.partition(":")[0] in ("hf-hub", "local-dir")
        if not local and not timm.is_model(model.partition(".")[0]):
            near = timm.list_models(f"*{model.partition('_')[0].partition('.')[0]}*")[:5]
            reason = f"timm has no such architecture; it has {', '.join(near) or 'others: timm.list_models()'}"
        raise UserError(f"model: {model!r} cannot be made ({reason})") from error


def asked_of(num_classes: int, class_names: Sequence[str] | None, data: object) -> Conditions:
    """What a published network is asked about some data.

    Raises:
        ValueError: if it has other classes than the data.
    """
    groups = data.network_classes if isinstance(data, HasNetworkClasses) else None
    if groups is not None and num_classes != IMAGENET:
        raise UserError(f"model: {num_classes:,} classes, but the data number theirs by ImageNet's {IMAGENET:,}")
    named = list(data.class_names or []) if isinstance(data, HasClassNames) else []
    if groups is None and named and len(named) != num_classes:
        raise UserError(
            f"model: {num_classes:,} classes, but the data have {len(named)}, and do not say which of the network's "
            "theirs are; expected a network trained on them (TimmFromScratch)"
        )
    return conditions(num_classes, class_names, data)
