"""ClassConditionalDiT: trains a DiT on labelled images or latents, samples from it, and is a ConditionalDenoiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Literal, cast

import lightning as L
import torch
from torch import Tensor

from lightning_diffclf.data.batch import check_pixels, content_ids, unpack
from lightning_diffclf.data.protocols import HasLatents
from lightning_diffclf.denoiser import ConditionVectors, evaluating
from lightning_diffclf.errors import UserError
from lightning_diffclf.identity import ByArguments
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.modules.conditions import AsksAboutClasses, check_labels, check_trains_all
from lightning_diffclf.modules.hub import OnHub
from lightning_diffclf.modules.objectives import Objectives
from lightning_diffclf.modules.training import (
    StepRandom,
    check_settings,
    class_sets,
    fixed_timesteps,
    network_of,
    optimization,
    schedule_named,
    shard,
)
from lightning_diffclf.sampling import denoise, initial_noise
from lightning_diffclf.schedule import DiscreteSchedule
from lightning_diffclf.variational import hybrid_loss


class ClassConditionalDiT(AsksAboutClasses, ByArguments, OnHub, L.LightningModule):
    """A class-conditional DiT (Peebles & Xie 2023): training, sampling, and the four members of a ConditionalDenoiser.

    Batches are mappings with ``image`` (B, C, H, W) and ``label`` (B,), or (image, label) pairs; images are pixels in
    [-1, 1], or latents. Noise, timesteps and dropped labels of an optimizer step depend on (seed, step) only, and each
    process and accumulated batch takes its own part of them: so losses do not depend on how many there are, and a
    resumed run draws what it would have drawn. Validation logs the loss at fixed noise for each image.

    Args:
        model: A published size such as ``DiT-XL/2``, which then sets width, depth, heads and patch size.
        input_size: Height and width of images or latents, one number if square; null, here and below: as the data are.
        in_channels: Channels of images or latents.
        num_classes: Number of classes.
        class_names: Name of each class; if omitted, as the data call them, or "0", "1", …
        hidden_size: Width of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads; must divide ``hidden_size``.
        patch_size: Side of a patch; must divide ``input_size``.
        mlp_ratio: Width of the blocks' MLP relative to ``hidden_size``.
        class_dropout_prob: Share of labels replaced by the null label in training, for classifier-free guidance.
        class_sets: Share of images trained on the mean embedding of a random set of classes with their own in it, of
            1 … ``num_classes`` (log-uniform), so that the network knows mixtures: for ``GradientSearch``.
        classification: Weight of the classification loss on errors of several classes at one draw. This and the next
            six: :class:`~.objectives.Objectives`, docs/training.md.
        temperature: Temperature of its logits ``-D · error / temperature``.
        compared_classes: Classes of an image that it and the separation loss compare, the own one and random others.
        compared_share: Share of each batch that they look at.
        contrastive: Weight λ of contrastive flow matching; for velocities and the like, not with epsilon prediction.
        separation: Weight of the separation loss: wrong classes shall be worse than none. Needs label dropout.
        margin: By which share of the error.
        none_of_these: Whether "none of these", the null label of label dropout, is a candidate beside the classes.
        learn_sigma: Also predict the variance, trained by the variational bound. Only with epsilon prediction on a
            discrete schedule.
        schedule: Noise schedule. ``sit`` is the rectified flow as SiT has it: time runs from noise to data, and the
            network sees it unscaled (Ma et al. 2024).
        prediction: What the network predicts; ``velocity`` for the rectified flow and ``epsilon`` otherwise if omitted.
        latents: Whether the network works on latents, of any range. Pixels are checked to lie in [-1, 1].
        vae: With ``latents``: folder or Hub repository of the autoencoder, which makes latents of pixels (B, 3, H, W)
            and pixels of generated latents. Loaded when it is needed; latents made beforehand do not need it.
        compile: Compile the network for training (torch.compile).
        checkpointing: Compute activations again in the backward pass rather than keep them: less memory, a third more
            time.
        lr: Learning rate of AdamW.
        betas: Its moment decay rates.
        weight_decay: Its weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        decay: What it does then: stay (``none``) or fall to zero at ``max_steps`` along a ``cosine`` or a line.
        seed: Key of the training noise.

    Raises:
        ValueError: if the settings contradict each other.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("class_dropout_prob", "class_sets", "compile", "checkpointing", "seed"), "of training"),
        **dict.fromkeys((one.name for one in fields(Objectives)), "of training"),
        **dict.fromkeys(("lr", "betas", "weight_decay", "warmup_steps", "decay"), "of the optimizer"),
        "vae": "its weights are in `autoencoder`, where images are pixels",
        **dict.fromkeys(("num_classes", "class_names"), "whoever says them, they are in `asked`"),
    }

    def __init__(
        self,
        model: str | None = None,
        input_size: int | list[int] | None = 32,
        in_channels: int | None = 4,
        num_classes: int | None = 1000,
        class_names: list[str] | None = None,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        class_sets: float = 0.0,
        classification: float = 0.0,
        temperature: float = 2.0,
        compared_classes: int = 10,
        compared_share: float = 0.25,
        contrastive: float = 0.0,
        separation: float = 0.0,
        margin: float = 0.1,
        none_of_these: bool = False,
        learn_sigma: bool = True,
        schedule: Literal["linear", "scaled_linear", "cosine", "rectified_flow", "sit"] = "linear",
        prediction: Literal["epsilon", "sample", "v_prediction", "velocity"] | None = None,
        latents: bool = True,
        vae: str | None = None,
        compile: bool = False,
        checkpointing: bool = False,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine", "linear"] = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if input_size is None or in_channels is None or num_classes is None:
            raise UserError("input_size, in_channels, num_classes: None, and the data do not say; expected numbers")
        self.schedule = schedule_named(schedule, prediction)
        check_settings(self.hparams, self.schedule)
        self.objectives = Objectives.of(self.hparams)
        self.net = network_of(self.hparams)
        self.net.checkpointing = checkpointing
        self.image_shape = (in_channels, *self.net.input_size)
        # In a list, so that Lightning does not take it for a part: EMA would copy it, checkpoints would save it.
        self._autoencoder: list[Autoencoder] = []

    def setup(self, stage: str) -> None:
        """Check the data module against the network, before long work."""
        data: object = getattr(self._trainer, "datamodule", None)
        if stage == "fit":
            check_trains_all(data, self.hparams["num_classes"])
            if self.hparams["compile"]:
                self.net.compile()
        elif stage != "predict":  # which may be of images that are of no class
            check_labels(data, self.hparams["num_classes"], self.hparams["class_names"])
        for one in data.latents(stage) if isinstance(data, HasLatents) else []:
            one.check(self.image_shape, self.hparams["vae"])

    def configure_model(self) -> None:
        """Shard the weights over processes, block by block, where the Trainer's strategy asks for it (FSDP).

        Raises:
            ValueError: if the strategy would not share the data among all processes.
        """
        shard(self.net, self.net.blocks, None if self._trainer is None else self.trainer.strategy)

    def own_classes(self) -> tuple[int, Sequence[str] | None, bool]:
        return self.hparams["num_classes"], self.hparams["class_names"], self.hparams["none_of_these"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The names of the classes go with the weights, also where it was the data that said them."""
        checkpoint["hyper_parameters"]["class_names"] = list(self.candidates.names)[: self.hparams["num_classes"]]

    @property
    def autoencoder(self) -> Autoencoder:
        """What makes latents of pixels and back; loaded when it is asked for first.

        Raises:
            ValueError: if ``vae`` was not given.
        """
        if not self._autoencoder:
            if self.hparams["vae"] is None:
                raise UserError("vae: none given, expected an autoencoder between pixels and latents (model.vae)")
            self._autoencoder.append(Autoencoder.load(self.hparams["vae"]))
        return self._autoencoder[0].to(self.device)

    def contents(self) -> dict[str, Any]:
        """The weights in place, what they are asked about, and the autoencoder where the data bring pixels."""
        data: Any = getattr(self._trainer, "datamodule", None)
        encodes = self.hparams["vae"] is not None and not (hasattr(data, "latents") and data.latents("test"))
        return {
            "net": self.net,
            "noise_levels": self.schedule,
            "asked": self.asked()._asdict(),
            "autoencoder": self.autoencoder if encodes else "images are what the network sees",
        }

    # --- ConditionalDenoiser ---------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves (B, C, H, W); of pixels for a network on latents, the mean of their posterior.

        Raises:
            ValueError: if the shape is not that of the network, pixels are outside [-1, 1], or there is no autoencoder.
        """
        self._check_pixels(images)
        return self._to_x0(images)

    def _check_pixels(self, images: Tensor) -> None:
        if not self.hparams["latents"] or self._are_pixels(images):
            check_pixels(images)

    def _are_pixels(self, images: Tensor) -> bool:
        return bool(self.hparams["latents"]) and images.shape[1] == 3 != self.image_shape[0]

    def _to_x0(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images or latents to what the network sees; of pixels, the posterior's mean or, with noise, a sample."""
        if self._are_pixels(images):
            mean, std = self.autoencoder.moments(images)
            images = self.autoencoder.to_latents(mean if noise is None else mean + std * noise)
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise UserError(f"images: shape {tuple(images.shape)}, expected (B, {expected})")
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Output of the network (N, C or 2C, H, W) for noisy inputs (N, C, H, W), times (N,) and classes (N,)."""
        return self.net(x_t.to(self.dtype), t, self.labels_of(candidate))

    def conditions(self, candidate: Tensor) -> Tensor:
        """Class embeddings (N, D) of candidates (N,)."""
        return cast(Tensor, self.net.y_embedder(self.labels_of(candidate)))

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: ConditionVectors) -> Tensor:
        """As :meth:`predict`, for class embeddings (N, D)."""
        return self.net(x_t.to(self.dtype), t, cast(Tensor, conditions).to(self.dtype))

    # --- training --------------------------------------------------------------------------------------------------

    def losses(
        self,
        x0: Tensor,
        labels: Tensor,
        t: Tensor,
        noise: Tensor,
        drop: Tensor | None,
        other: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Training loss of each image (B,), float32; for a learned variance also its parts ``mse`` and ``vb``.

        Args:
            x0: Clean inputs (B, C, H, W).
            labels: Classes (B,), int64; or sets of them (B, num_classes), bool.
            t: Timesteps (B,).
            noise: Noise (B, C, H, W).
            drop: Which labels to replace by the null label, bool (B,); None for none.
            other: Targets of other images (B, C, H, W), squared distances to which are returned as ``contrast``.
        """
        x_t = self.schedule.add_noise(x0, noise, t)
        time = self.schedule.network_time(t)
        output = self.net(self.schedule.network_input(x_t, t).to(self.dtype), time, labels, drop=drop).float()
        if not self.hparams["learn_sigma"]:
            loss = (output - self.schedule.target(x0, noise, t)).square().flatten(1).mean(1)
            return {"loss": loss} | (
                {} if other is None else {"contrast": (output - other).square().flatten(1).mean(1)}
            )
        loss, mse, vb = hybrid_loss(cast(DiscreteSchedule, self.schedule), output, x0, x_t, t, noise)
        return {"loss": loss, "mse": mse, "vb": vb}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self._training_batch(batch, check=batch_idx == 0)
        random = StepRandom.of(self, images, batch_idx, self.hparams["seed"])
        t, noise = random.timesteps(self.schedule), random.normal(*self.image_shape)
        drop = random.uniform() < rate if (rate := self.hparams["class_dropout_prob"]) > 0 else None
        x0 = self._to_x0(images, random.normal(*self.image_shape) if self._are_pixels(images) else None)
        conditions = labels
        if (share := self.hparams["class_sets"]) > 0:
            conditions = class_sets(labels, self.hparams["num_classes"], share, random)
        denoising = partial(self.losses, x0, conditions, t, noise, drop)
        losses = self.objectives.denoising(denoising, self.schedule, x0, labels, t, noise, drop, random)
        if self.objectives.compares:
            classes = self.hparams["num_classes"], self.net.null_label
            losses |= self.objectives.compare(self._given, self.schedule, x0, labels, t, noise, classes, random)
            losses["loss"] = losses["loss"] + losses.pop("add")
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def _given(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Network output for rows whose labels are never dropped."""
        drop = None if self.net.null_label is None else torch.zeros_like(labels, dtype=torch.bool)
        return self.net(x_t.to(self.dtype), t, labels, drop=drop)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = unpack(batch).ids
        images, labels = self._training_batch(batch, check=True)
        x0 = self._to_x0(images)
        ids, seed = content_ids(images) if ids is None else ids, self.hparams["seed"]
        t = fixed_timesteps(self.schedule, ids, seed).to(x0.device)
        losses = self.losses(x0, labels, t, initial_noise(self.image_shape, ids, seed).to(x0.device), drop=None)
        means = {f"val/{name}": value.mean() for name, value in losses.items()}
        self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x0))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: testing is the work of DiffusionClassifierCallback."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: predicting is the work of DiffusionClassifierCallback."""

    def _training_batch(self, batch: Any, check: bool) -> tuple[Tensor, Tensor]:
        images, labels = unpack(batch)[:2]
        if labels is None:
            raise UserError("batch: no labels, expected a label for each image to train on")
        if check:  # the values are looked at once: each look waits for the device
            self._check_pixels(images)
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.hparams["num_classes"]:
                raise UserError(f"labels: {low} … {high}, expected 0 … {self.hparams['num_classes'] - 1}")
        return images, labels

    def configure_optimizers(self) -> Any:
        return optimization(self.net.parameters(), self.hparams, lambda: self.trainer.estimated_stepping_batches)

    # --- sampling --------------------------------------------------------------------------------------------------

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
        """Generate images or latents of given classes: by DDIM, or Euler's method for a flow.

        Args:
            labels: Classes (B,), int64, on the module's device.
            guidance_scale: Classifier-free guidance: 1 is none. Needs ``class_dropout_prob > 0`` in training.
            steps: Denoising steps.
            seed: Key of the initial noise.
            guided_channels: Number of channels that guidance acts on; all if None (3 in the published DiT samples).
            ids: What the noise of each image depends on, beside the seed (B,); their positions if omitted.

        Returns:
            (B, C, H, W) float32; pixels are clipped to [-1, 1].

        Raises:
            ValueError: if guidance is asked of a network without null label; or as :func:`~.sampling.denoise`.
        """
        if guidance_scale != 1 and self.hparams["class_dropout_prob"] == 0:
            raise UserError(f"guidance_scale: {guidance_scale}, but the network was trained without label dropout")
        pixels = not self.hparams["latents"]

        def predict(x_t: Tensor, time: Tensor) -> Tensor:
            x_t, times = x_t.to(self.dtype), time.to(self.device).expand(len(labels))
            if guidance_scale == 1:
                output = self.net(x_t, times, labels)
            else:
                output = self.net.forward_with_cfg(x_t, times, labels, guidance_scale, guided_channels)
            return output[:, : self.image_shape[0]].float()

        with evaluating(self):
            noise = initial_noise(self.image_shape, range(len(labels)) if ids is None else ids, seed)
            x0 = denoise(predict, self.schedule, noise.to(self.device), steps, clip=pixels)
        return x0.clamp(-1, 1) if pixels else x0
