"""ClassConditionalDiT: trains a DiT on labelled images or latents, samples from it, and is a ConditionalDenoiser."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.data.batch import content_ids, unpack
from lightning_diffclf.denoiser import Candidates
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.schedule import DiscreteSchedule, NoiseSchedule
from lightning_diffclf.variational import hybrid_loss

VALIDATION_TIMESTEPS = 100  # the validation loss is taken at this many noise levels, a fixed one for each image


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on ``device`` whose state depends on nothing but ``key``."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class ClassConditionalDiT(L.LightningModule):
    """A class-conditional DiT (Peebles & Xie 2023): training, sampling, and the four members of a ConditionalDenoiser.

    Batches are mappings with ``image`` (B, C, H, W) and ``label`` (B,), or (image, label) pairs; images are pixels in
    [-1, 1], or latents. Noise and timesteps of a training step depend on (seed, rank, step) only: ranks draw different
    noise, and a resumed run draws what it would have drawn. Validation logs the loss at fixed noise for each image.

    Args:
        model: A published size such as ``DiT-XL/2``, which then sets width, depth, heads and patch size.
        input_size: Height and width of images or latents; one number if square.
        in_channels: Channels of images or latents.
        num_classes: Number of classes.
        class_names: Name of each class; "0", "1", … if omitted.
        hidden_size: Width of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads; must divide ``hidden_size``.
        patch_size: Side of a patch; must divide ``input_size``.
        mlp_ratio: Width of the blocks' MLP relative to ``hidden_size``.
        class_dropout_prob: Share of labels replaced by the null label in training, for classifier-free guidance.
        learn_sigma: Also predict the variance, trained by the variational bound. Only with epsilon prediction on a
            discrete schedule.
        schedule: Noise schedule.
        prediction: What the network predicts; ``velocity`` for the rectified flow and ``epsilon`` otherwise if omitted.
        latents: Whether images are latents, of any range. Pixels are checked to lie in [-1, 1].
        lr: Learning rate of AdamW.
        betas: Its moment decay rates.
        weight_decay: Its weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        decay: What it does then: stay (``none``) or fall to zero at ``max_steps`` along a ``cosine`` or a line.
        seed: Key of the training noise.

    Raises:
        ValueError: if the settings contradict each other.
    """

    def __init__(
        self,
        model: str | None = None,
        input_size: int | list[int] = 32,
        in_channels: int = 4,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        hidden_size: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        patch_size: int = 2,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        schedule: Literal["linear", "scaled_linear", "cosine", "rectified_flow"] = "linear",
        prediction: Literal["epsilon", "sample", "v_prediction", "velocity"] | None = None,
        latents: bool = True,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine", "linear"] = "none",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.schedule = _schedule(schedule, prediction)
        if learn_sigma and not (isinstance(self.schedule, DiscreteSchedule) and self.schedule.prediction == "epsilon"):
            raise ValueError(
                f"learn_sigma: a variance is only defined for epsilon prediction on a discrete schedule, found "
                f"{self.schedule.prediction!r} on {schedule!r}; set learn_sigma to false"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names: {len(class_names)} names for num_classes = {num_classes}")
        for name, value in (("lr", lr), ("num_classes", num_classes)):
            if value <= 0:
                raise ValueError(f"{name}: {value}, expected a positive number")
        self.candidates = Candidates(class_names or [str(i) for i in range(num_classes)])
        size = input_size if isinstance(input_size, int) else (input_size[0], input_size[1])
        shared: dict[str, Any] = {
            "input_size": size,
            "in_channels": in_channels,
            "mlp_ratio": mlp_ratio,
            "class_dropout_prob": class_dropout_prob,
            "num_classes": num_classes,
            "learn_sigma": learn_sigma,
        }
        self.net = (
            DiT.from_name(model, **shared)
            if model
            else DiT(patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, **shared)
        )
        height, width = (size, size) if isinstance(size, int) else size
        self.image_shape = (in_channels, height, width)
        self._validation_noise = KeyedNoise(seed)

    # --- ConditionalDenoiser ---------------------------------------------------------------------------------------

    def encode(self, images: Tensor) -> Tensor:
        """The images themselves, (B, C, H, W), after a check of shape and range.

        Raises:
            ValueError: if the shape is not that of the network, or pixels are outside [-1, 1].
        """
        self._check_shape(images)
        if not self.hparams["latents"]:
            low, high = (float(v) for v in images.aminmax())
            if not (low >= -1.001 and high <= 1.001):  # also refuses NaN
                raise ValueError(f"images: values in [{low:.4g}, {high:.4g}], expected pixels in [-1, 1]")
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Output of the network (N, C or 2C, H, W) for noisy inputs (N, C, H, W), times (N,) and classes (N,)."""
        return self.net(x_t.to(self.dtype), t, candidate)

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images: shape {tuple(images.shape)}, expected (B, {', '.join(map(str, self.image_shape))})"
            )

    # --- training --------------------------------------------------------------------------------------------------

    def losses(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, drop: Tensor | None) -> dict[str, Tensor]:
        """Training loss of each image (B,), float32; for a learned variance also its parts ``mse`` and ``vb``.

        Args:
            x0: Clean inputs (B, C, H, W).
            labels: Classes (B,), int64.
            t: Timesteps (B,).
            noise: Noise (B, C, H, W).
            drop: Which labels to replace by the null label, bool (B,); None for none.
        """
        x_t = self.schedule.add_noise(x0, noise, t)
        time = self.schedule.network_time(t)
        output = self.net(self.schedule.network_input(x_t, t).to(self.dtype), time, labels, drop=drop).float()
        if not self.hparams["learn_sigma"]:
            return {"loss": (output - self.schedule.target(x0, noise, t)).square().flatten(1).mean(1)}
        loss, mse, vb = hybrid_loss(cast(DiscreteSchedule, self.schedule), output, x0, x_t, t, noise)
        return {"loss": loss, "mse": mse, "vb": vb}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, labels = self._training_batch(batch, check=batch_idx == 0)
        generator = keyed_generator(x0.device, self.hparams["seed"], self.global_rank, self.global_step, batch_idx)
        t = self.schedule.random_timesteps(len(x0), generator)
        noise = torch.randn(x0.shape, generator=generator, device=x0.device)
        drop = None
        if self.hparams["class_dropout_prob"] > 0:
            chance = torch.rand(len(x0), generator=generator, device=x0.device)
            drop = chance < self.hparams["class_dropout_prob"]
        losses = {name: value.mean() for name, value in self.losses(x0, labels, t, noise, drop).items()}
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = unpack(batch).ids
        x0, labels = self._training_batch(batch, check=True)
        keys = [self._validation_noise.key(i) for i in (content_ids(x0) if ids is None else ids)]
        noise = np.empty(x0.shape, dtype=np.float32)
        for out, key in zip(noise, keys, strict=True):
            self._validation_noise.fill(out, key, 0)
        levels = torch.tensor([int(key[0] % VALIDATION_TIMESTEPS) for key in keys])
        t = self._validation_timesteps()[levels].to(x0.device)
        losses = self.losses(x0, labels, t, torch.from_numpy(noise).to(x0.device), drop=None)
        means = {f"val/{name}": value.mean() for name, value in losses.items()}
        self.log_dict(means, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x0))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: testing is the work of DiffusionClassifierCallback."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: predicting is the work of DiffusionClassifierCallback."""

    def _validation_timesteps(self) -> Tensor:
        return self.schedule.timesteps(min(VALIDATION_TIMESTEPS, self.schedule.num_timesteps or VALIDATION_TIMESTEPS))

    def _training_batch(self, batch: Any, check: bool) -> tuple[Tensor, Tensor]:
        images, labels = unpack(batch)[:2]
        if labels is None:
            raise ValueError("batch: no labels, expected a label for each image to train on")
        if check:  # the values are looked at once an epoch: each look waits for the device
            images = self.encode(images)
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.hparams["num_classes"]:
                raise ValueError(f"labels: {low} … {high}, expected 0 … {self.hparams['num_classes'] - 1}")
        else:
            self._check_shape(images)
        return images, labels

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=h["lr"], betas=tuple(h["betas"]), weight_decay=h["weight_decay"]
        )
        total = self.trainer.estimated_stepping_batches if h["decay"] != "none" else math.inf
        if h["decay"] != "none" and not math.isfinite(total):
            raise ValueError(f"decay: {h['decay']!r} needs an end, set trainer.max_steps")
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(step, h["warmup_steps"], total, h["decay"])
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- sampling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        guidance_scale: float = 1.0,
        steps: int = 50,
        seed: int = 0,
        guided_channels: int | None = None,
    ) -> Tensor:
        """Generate images or latents of given classes through a diffusers scheduler (DDIM, or Euler for the flow).

        Args:
            labels: Classes (B,), int64, on the module's device.
            guidance_scale: Classifier-free guidance: 1 is none. Needs ``class_dropout_prob > 0`` in training.
            steps: Denoising steps.
            seed: Key of the initial noise; image i depends on (seed, i) only.
            guided_channels: Number of channels that guidance acts on; all if None (3 in the published DiT samples).

        Returns:
            (B, C, H, W) float32; pixels are clipped to [-1, 1].

        Raises:
            ValueError: if guidance is asked of a network without null label, or ``steps`` is out of range.
        """
        if guidance_scale != 1 and self.hparams["class_dropout_prob"] == 0:
            raise ValueError(f"guidance_scale: {guidance_scale}, but the network was trained without label dropout")
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps: {steps}, expected 1 … 1000")
        noise, keyed = np.empty((len(labels), *self.image_shape), dtype=np.float32), KeyedNoise(seed)
        for i, out in enumerate(noise):
            keyed.fill(out, keyed.key(i), 0)
        x_t = torch.from_numpy(noise).to(self.device)
        scheduler = self._diffusers_scheduler(steps)
        training, _ = self.training, self.eval()
        for time in scheduler.timesteps:
            times = time.to(self.device).expand(len(labels))
            if guidance_scale == 1:
                output = self.predict(x_t, times, labels)
            else:
                output = self.net.forward_with_cfg(x_t.to(self.dtype), times, labels, guidance_scale, guided_channels)
            x_t = scheduler.step(output[:, : self.image_shape[0]].float(), time, x_t).prev_sample
        self.train(training)
        return x_t if self.hparams["latents"] else x_t.clamp(-1, 1)

    def _diffusers_scheduler(self, steps: int) -> Any:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler  # slow to import

        if isinstance(self.schedule, DiscreteSchedule):
            alphas = self.schedule.alphas_cumprod
            scheduler = DDIMScheduler(
                num_train_timesteps=len(alphas),
                trained_betas=(1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).float().numpy(),
                clip_sample=not self.hparams["latents"],
                prediction_type=self.schedule.prediction,
                timestep_spacing="trailing",
            )
        else:
            scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps)
        return scheduler


def learning_rate_factor(step: int, warmup_steps: int, total: float, decay: str) -> float:
    """Factor on the learning rate: rising over ``warmup_steps``, then constant or falling to zero at ``total``.

    Example:
        >>> [learning_rate_factor(step, 2, 6, "linear") for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if decay == "none":
        return 1.0
    share = min(1.0, (step - warmup_steps) / max(1, total - warmup_steps))
    return 1 - share if decay == "linear" else (1 + math.cos(math.pi * share)) / 2


def _schedule(name: str, prediction: Any) -> NoiseSchedule:
    if name == "rectified_flow":  # the network embeds times of 0 … 1000, as in SD3
        return NoiseSchedule.rectified_flow(time_scale=1000.0, prediction=prediction or "velocity")
    makers: dict[str, Callable[..., NoiseSchedule]] = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
    }
    if name not in makers:
        raise ValueError(f"schedule: {name!r}, expected one of {[*makers, 'rectified_flow']}")
    return makers[name](prediction=prediction or "epsilon")
