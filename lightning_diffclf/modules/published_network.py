"""PublishedNetwork: a class-conditional network as others publish it, as a ConditionalDenoiser for a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import lightning as L
import torch
from torch import Tensor

from lightning_diffclf.data.batch import check_pixels
from lightning_diffclf.data.protocols import HasLatents
from lightning_diffclf.data.public_sets import IMAGENET_NAMES
from lightning_diffclf.denoiser import ConditionVectors
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import ByArguments
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.models.families import Family, Published, read_network
from lightning_diffclf.modules.conditions import AsksAboutClasses, check_labels
from lightning_diffclf.progress import tell
from lightning_diffclf.sampling import denoise, initial_noise


class PublishedNetwork(AsksAboutClasses, ByArguments, L.LightningModule):
    """Classifies with DiT, SiT, REPA, REPA-E, LightningDiT or EDM2, trained by others.

    Sizes are those of the weights. Nothing is trained and nothing is saved: the networks are not parts of the module.
    They move to the device of the first images, which are pixels.

    Args:
        weights: A file (torch's or safetensors), a folder of diffusers with a DiT, or ``hf://OWNER/REPOSITORY/FILE``.
            ``evaluate.py --ckpt`` gives it as well.
        family: ``dit``, ``sit``, ``repa`` (also REPA-E), ``lightningdit`` or ``edm2``; see
            :mod:`~lightning_diffclf.models.families`. Weights tell it, except that DiT's and SiT's look the same.
        vae: Autoencoder in place of the family's own: a folder, a repository on the Hub, or a file.
        latents: File with statistics of the latents, in place of the family's.
        num_heads: Attention heads of a transformer of another width than the published ones.
        class_names: Name of each class; if omitted as the data call them, or ImageNet's where there are 1,000.
        none_of_these: Whether "none of these", the null label, is a candidate beside the classes.

    Raises:
        FileNotFoundError: when the network is first needed, if a file is not there.
        ValueError: then, if it cannot be read, or parts do not belong together.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        "weights": "what is in the file is in `net`",
        "family": "what it says is in `net`, `noise_levels` and `autoencoder`",
        "vae": "its weights are in `autoencoder`",
        "latents": "they are in `autoencoder`",
        "num_heads": "they are in `net`",
    }

    def __init__(
        self,
        weights: str | None = None,
        family: Family | None = None,
        vae: str | None = None,
        latents: str | None = None,
        num_heads: int | None = None,
        class_names: list[str] | None = None,
        none_of_these: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        # In lists, so that Lightning does not take them for parts: EMA would copy them, checkpoints would save them.
        self._published: list[Published] = []
        self._autoencoder: list[Autoencoder] = []

    def load(self, weights: str) -> None:
        """Take these weights in place of the argument's; they are read when they are needed."""
        self.hparams["weights"] = weights
        self._published.clear()
        self._autoencoder.clear()

    @property
    def published(self) -> Published:
        """The network and what belongs to it; read when it is asked for first.

        Raises:
            FileNotFoundError: if a file is not there.
            ValueError: if no weights were given, or they cannot be read.
        """
        if not self._published:
            given = self.hparams
            if given["weights"] is None:
                raise UserError("weights: none given, expected --ckpt FILE (or model.weights)")
            tell(f"reading {given['weights']}")
            names = ("weights", "family", "vae", "latents", "num_heads")
            self._published.append(read_network(*(given[name] for name in names)))
        return self._published[0]

    @property
    def autoencoder(self) -> Autoencoder | None:
        """Makes latents of pixels; None for a network on pixels. Loaded when it is asked for first.

        Raises:
            ValueError: if it cannot be loaded, or its latents are none of the network's.
        """
        found = self.published
        if found.vae is None:
            return None
        if not self._autoencoder:
            own = found.vae if isinstance(found.vae, Autoencoder) else Autoencoder.load(found.vae, scale=found.scale)
            if own.channels != found.net.in_channels:
                raise UserError(f"vae: latents of {own.channels} channels, expected {found.net.in_channels}")
            self._autoencoder.append(own)
        return self._autoencoder[0]

    @property
    def schedule(self) -> Any:
        """Noise schedule of the network."""
        return self.published.schedule

    @property
    def native_size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""
        (height, width), own = self.published.net.input_size, self.autoencoder
        return (height, width) if own is None else (height * own.factor, width * own.factor)

    def own_classes(self) -> tuple[int, list[str] | None, bool]:
        net, names = self.published.net, self.hparams["class_names"]
        if names is not None and len(names) != net.num_classes:
            raise UserError(f"class_names: {len(names)}, but the network has {net.num_classes} classes")
        if self.hparams["none_of_these"] and net.null_label is None:
            raise UserError("none_of_these: the network has no null label: it was trained with a class always")
        data: Any = getattr(self._trainer, "datamodule", None)
        if names is None and net.num_classes == len(IMAGENET_NAMES) and not getattr(data, "class_names", None):
            names = IMAGENET_NAMES
        return net.num_classes, names, self.hparams["none_of_these"]

    def contents(self) -> dict[str, Any]:
        """The networks, and what they are asked about; reads them."""
        found, own = self.published, self.autoencoder
        return {
            "net": found.net,
            "noise_levels": found.schedule,
            "asked": self.asked()._asdict(),
            "autoencoder": "images are what the network sees" if own is None else own,
        }

    def setup(self, stage: str) -> None:
        """Check the data module against the network, before long work."""
        data: object = getattr(self._trainer, "datamodule", None)
        if isinstance(data, HasLatents) and data.latents(stage):
            raise UserError("data: latents made beforehand, expected images: this network sees latents in its own way")
        if stage != "predict":
            num_classes, names, _ = self.own_classes()
            check_labels(data, num_classes, names)

    def encode(self, images: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) to what the network sees (B, C, h, w): for latents, the mean of their posterior.

        Raises:
            ValueError: if the shape is not that of the network, or pixels are outside [-1, 1].
        """
        own, net = self.autoencoder, self.published.net.to(images.device)
        check_pixels(images)
        x0 = images if own is None else own.to(images.device).to_latents(own.moments(images)[0])
        if x0.shape[1:] != (net.in_channels, *net.input_size):
            height, width = self.native_size
            raise UserError(f"images: shape {tuple(images.shape)}, expected (B, 3, {height}, {width})")
        return x0

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Output of the network (N, C or 2C, h, w) for noisy inputs (N, C, h, w), times (N,) and candidates (N,)."""
        return self._net(x_t)(x_t, t, self.labels_of(candidate))

    def conditions(self, candidate: Tensor) -> Tensor:
        """Class embeddings (N, D) of candidates (N,)."""
        net = self.published.net.to(candidate.device)
        return cast(Tensor, net.y_embedder(self.labels_of(candidate)))

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: ConditionVectors) -> Tensor:
        """As :meth:`predict`, for class embeddings (N, D)."""
        return self._net(x_t)(x_t, t, cast(Tensor, conditions))

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        guidance_scale: float = 1.0,
        steps: int = 50,
        seed: int = 0,
        guided_channels: int | None = None,
        ids: Sequence[int | str] | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] of given classes, float32, decoded by the autoencoder where there is one.

        Args:
            labels: Classes (B,), int64, on the device to sample on.
            guidance_scale: Classifier-free guidance away from the null label: 1 is none.
            steps: Denoising steps, by :func:`~lightning_diffclf.sampling.denoise`.
            seed: Key of the initial noise.
            guided_channels: Number of channels that guidance acts on; all if None.
            ids: What the noise of each image depends on, beside the seed (B,); their positions if omitted.

        Raises:
            ValueError: if guidance is asked of a network without null label; or as :func:`~.sampling.denoise`.
        """
        own, net = self.autoencoder, self.published.net.to(labels.device)
        if guidance_scale != 1 and net.null_label is None:
            raise UserError(f"guidance_scale: {guidance_scale}, but the network has no null label; expected 1")

        def predict(x_t: Tensor, time: Tensor) -> Tensor:
            times = time.to(labels.device).expand(len(labels))
            if guidance_scale != 1 and isinstance(net, DiT):
                output = net.forward_with_cfg(x_t, times, labels, guidance_scale, guided_channels)
            else:
                output = net(x_t, times, labels)
            found: Tensor = output[:, : net.in_channels].float()
            return found

        shape = (net.in_channels, *net.input_size)
        noise = initial_noise(shape, range(len(labels)) if ids is None else ids, seed).to(labels.device)
        x0 = denoise(predict, self.schedule, noise, steps, clip=own is None)
        with torch.autocast(labels.device.type, enabled=False):
            return x0.clamp(-1, 1) if own is None else own.to(labels.device).decode(x0)

    def _net(self, x_t: Tensor) -> torch.nn.Module:
        return self.published.net.to(x_t.device)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: the callback classifies."""

    def configure_optimizers(self) -> None:
        """Nothing is trained."""
