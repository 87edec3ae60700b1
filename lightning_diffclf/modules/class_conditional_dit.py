"""ClassConditionalDiT: trains a DiT on labelled images or latents, samples from it, and is a ConditionalDenoiser."""

from __future__ import annotations

import hashlib
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from lightning_diffclf.classifier.draws import KeyedNoise
from lightning_diffclf.data.batch import content_ids, unpack
from lightning_diffclf.data.stream import Share
from lightning_diffclf.denoiser import Candidates, ConditionVectors
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.modules.conditions import Conditions, conditions
from lightning_diffclf.schedule import DiscreteSchedule, FlowSchedule, NoiseSchedule
from lightning_diffclf.variational import hybrid_loss

VALIDATION_TIMESTEPS = 100  # the validation loss is taken at this many noise levels, a fixed one for each image


def keyed_generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator on ``device`` whose state depends on nothing but ``key``."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class ClassConditionalDiT(L.LightningModule):
    """A class-conditional DiT (Peebles & Xie 2023): training, sampling, and the four members of a ConditionalDenoiser.

    Batches are mappings with ``image`` (B, C, H, W) and ``label`` (B,), or (image, label) pairs; images are pixels in
    [-1, 1], or latents. Noise, timesteps and dropped labels of an optimizer step depend on (seed, step) only, and each
    process and accumulated batch takes its own part of them: so losses do not depend on how many there are, and a
    resumed run draws what it would have drawn. Validation logs the loss at fixed noise for each image.

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
        self.schedule = _schedule(schedule, prediction)
        if learn_sigma and not (isinstance(self.schedule, DiscreteSchedule) and self.schedule.prediction == "epsilon"):
            raise UserError(
                f"learn_sigma: a variance is only defined for epsilon prediction on a discrete schedule, found "
                f"{self.schedule.prediction!r} on {schedule!r}; set learn_sigma to false"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise UserError(f"class_names: {len(class_names)} names for num_classes = {num_classes}")
        for name, value in (("lr", lr), ("num_classes", num_classes)):
            if value <= 0:
                raise UserError(f"{name}: {value}, expected a positive number")
        if vae is not None and not latents:
            raise UserError(f"vae: {vae!r} given, but latents is false: the network works on pixels")
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
        self.net.checkpointing = checkpointing
        height, width = (size, size) if isinstance(size, int) else size
        self.image_shape = (in_channels, height, width)
        self._validation_noise = KeyedNoise(seed)
        # In a list, so that Lightning does not take it for a part: EMA would copy it, checkpoints would save it.
        self._autoencoder: list[Autoencoder] = []
        self._conditions: tuple[Callable[[], Any], Conditions] | None = None  # of one data module

    def setup(self, stage: str) -> None:
        """Check the data module against the network, before long work."""
        data: Any = getattr(self._trainer, "datamodule", None)
        num_classes = self.hparams["num_classes"]
        if stage == "fit":
            if getattr(data, "num_classes", None) not in (None, num_classes):
                raise UserError(f"num_classes: {num_classes}, but the training data have {data.num_classes} classes")
            groups = getattr(data, "network_classes", None)
            if groups is not None and len(groups) != num_classes:
                raise UserError(f"data: {len(groups)} classes to validate on, expected {num_classes} as in training")
            if self.hparams["compile"]:
                self.net.compile()
        for one in data.latents(stage) if hasattr(data, "latents") else []:
            if one.index.shape != self.image_shape:
                raise UserError(f"latents: {one.root!r} has {one.index.shape}, the network takes {self.image_shape}")
            if self.hparams["vae"] not in (None, one.index.vae):
                vae = self.hparams["vae"]
                raise UserError(f"latents: {one.root!r} was made with {one.index.vae!r}, expected {vae!r} (model.vae)")

    def configure_model(self) -> None:
        """Shard the weights over processes, block by block, where the Trainer's strategy asks for it (FSDP).

        Raises:
            ValueError: if the strategy would not share the data among all processes.
        """
        strategy = None if self._trainer is None else self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            mesh = strategy.device_mesh["data_parallel"]
            if mesh.size() != strategy.world_size:
                found, expected = mesh.size(), strategy.world_size
                raise UserError(f"strategy: data_parallel_size {found}, expected {expected}, the number of processes")
            for part in (*self.net.blocks, self.net):
                fully_shard(part, mesh=mesh)

    def _asked(self, device: torch.device | None = None) -> Conditions:
        """What the network is asked about: by the data module, if there is one."""
        data: Any = getattr(self._trainer, "datamodule", None)
        if self._conditions is None or self._conditions[0]() is not data:
            # Weakly: EMA copies all attributes of the module, and a data module knows the Trainer.
            found = conditions(self.hparams["num_classes"], self.hparams["class_names"], data)
            self._conditions = (lambda: None) if data is None else weakref.ref(data), found
        whose, found = self._conditions
        if found.rows is not None and device is not None and found.rows.device != device:
            found = found._replace(rows=found.rows.to(device))  # once: not in every call
            self._conditions = whose, found
        return found

    @property
    def candidates(self) -> Candidates:
        """One for each class; where the data have fewer classes than the network, those that make them up."""
        return self._asked().candidates

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

    @property
    def frozen(self) -> list[torch.nn.Module]:
        """Networks that decisions depend on although they are not saved."""
        return [one.vae for one in self._autoencoder]

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
            low, high = (float(v) for v in images.aminmax())
            if not (low >= -1.001 and high <= 1.001):  # also refuses NaN
                raise UserError(f"images: values in [{low:.4g}, {high:.4g}], expected pixels in [-1, 1]")

    def _are_pixels(self, images: Tensor) -> bool:
        return bool(self.hparams["latents"]) and images.shape[1] == 3 != self.image_shape[0]

    def _to_x0(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images or latents to what the network sees; of pixels, the posterior's mean or, with noise, a sample."""
        if self._are_pixels(images):
            mean, std = self.autoencoder.moments(images)
            images = self.autoencoder.to_latents(mean if noise is None else mean + std * noise)
        self._check_shape(images)
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Output of the network (N, C or 2C, H, W) for noisy inputs (N, C, H, W), times (N,) and classes (N,)."""
        return self.net(x_t.to(self.dtype), t, self._labels(candidate))

    def conditions(self, candidate: Tensor) -> Tensor:
        """Class embeddings (N, D) of candidates (N,)."""
        embedding: Tensor = self.net.y_embedder(self._labels(candidate))
        return embedding

    def predict_from(self, x_t: Tensor, t: Tensor, conditions: ConditionVectors) -> Tensor:
        """As :meth:`predict`, for class embeddings (N, D)."""
        assert isinstance(conditions, Tensor)
        return self.net(x_t.to(self.dtype), t, conditions.to(self.dtype))

    def _labels(self, candidate: Tensor) -> Tensor:
        """The network's class of each candidate (N,)."""
        rows = self._asked(candidate.device).rows
        return candidate if rows is None else rows[candidate]

    def _check_shape(self, images: Tensor) -> None:
        if tuple(images.shape[1:]) != self.image_shape:
            raise UserError(
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
        images, labels = self._training_batch(batch, check=batch_idx == 0)
        t, noise, drop, of_posterior = self._training_draws(images, batch_idx)
        x0 = self._to_x0(images, of_posterior)
        losses = {name: value.mean() for name, value in self.losses(x0, labels, t, noise, drop).items()}
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def _training_draws(self, images: Tensor, batch_idx: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """This batch's part of the step's timesteps (B,), noise (B, C, H, W), labels to drop (B,), posterior noise.

        The latter two are None where there is nothing to drop or to encode.
        """
        share, device, count = Share.of(self._trainer), images.device, len(images)
        total, rows = count * share.world_size * share.accumulate, share.rows(count, batch_idx)
        generator = keyed_generator(device, self.hparams["seed"], self.global_step)
        t = self.schedule.random_timesteps(total, generator)[rows]
        noise = torch.randn((total, *self.image_shape), generator=generator, device=device)[rows]
        drop = of_posterior = None
        if self.hparams["class_dropout_prob"] > 0:
            drop = torch.rand(total, generator=generator, device=device)[rows] < self.hparams["class_dropout_prob"]
        if self._are_pixels(images):
            of_posterior = torch.randn((total, *self.image_shape), generator=generator, device=device)[rows]
        return t, noise, drop, of_posterior

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        ids = unpack(batch).ids
        images, labels = self._training_batch(batch, check=True)
        x0 = self._to_x0(images)
        keys = [self._validation_noise.key(i) for i in (content_ids(images) if ids is None else ids)]
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
            raise UserError("batch: no labels, expected a label for each image to train on")
        if check:  # the values are looked at once: each look waits for the device
            self._check_pixels(images)
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= self.hparams["num_classes"]:
                raise UserError(f"labels: {low} … {high}, expected 0 … {self.hparams['num_classes'] - 1}")
        return images, labels

    def configure_optimizers(self) -> Any:
        h = self.hparams
        optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=h["lr"], betas=tuple(h["betas"]), weight_decay=h["weight_decay"]
        )
        total = self.trainer.estimated_stepping_batches if h["decay"] != "none" else math.inf
        if h["decay"] != "none" and not math.isfinite(total):
            raise UserError(f"decay: {h['decay']!r} needs an end, set trainer.max_steps")
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
            ValueError: if guidance is asked of a network without null label, ``steps`` is out of range, or a flow
                predicts something else than velocities.
        """
        if guidance_scale != 1 and self.hparams["class_dropout_prob"] == 0:
            raise UserError(f"guidance_scale: {guidance_scale}, but the network was trained without label dropout")
        if not 1 <= steps <= 1000:
            raise UserError(f"steps: {steps}, expected 1 … 1000")
        if isinstance(self.schedule, FlowSchedule) and self.schedule.prediction != "velocity":
            raise UserError(f"sampling from a flow that predicts {self.schedule.prediction!r}, expected 'velocity'")
        noise, keyed = np.empty((len(labels), *self.image_shape), dtype=np.float32), KeyedNoise(seed)
        for out, image_id in zip(noise, range(len(labels)) if ids is None else ids, strict=True):
            keyed.fill(out, keyed.key(image_id), 0)

        def predict(x_t: Tensor, time: Tensor) -> Tensor:
            times = time.to(self.device).expand(len(labels))
            if guidance_scale == 1:
                output = self.net(x_t.to(self.dtype), times, labels)
            else:
                output = self.net.forward_with_cfg(x_t.to(self.dtype), times, labels, guidance_scale, guided_channels)
            return output[:, : self.image_shape[0]].float()

        training, _ = self.training, self.eval()
        x_t = self._denoise(torch.from_numpy(noise).to(self.device), steps, predict)
        self.train(training)
        return x_t if self.hparams["latents"] else x_t.clamp(-1, 1)

    def _denoise(self, x_t: Tensor, steps: int, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """From noise to data: DDIM by diffusers, or Euler's method along the straight line of a flow."""
        if isinstance(self.schedule, FlowSchedule):
            up = 1 if self.schedule.noise_at else -1  # whether sigma rises with time
            for sigma, lower in itertools.pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64)):
                time = self.schedule.network_time(sigma if up == 1 else 1 - sigma).float()
                x_t = x_t + up * float(lower - sigma) * predict(x_t, time)
            return x_t
        from diffusers import DDIMScheduler  # slow to import

        alphas = cast(DiscreteSchedule, self.schedule).alphas_cumprod
        scheduler = DDIMScheduler(
            num_train_timesteps=len(alphas),
            trained_betas=(1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])).float().numpy(),
            clip_sample=not self.hparams["latents"],
            prediction_type=self.schedule.prediction,
            timestep_spacing="trailing",
        )
        scheduler.set_timesteps(steps)
        for time in scheduler.timesteps:
            x_t = scheduler.step(predict(x_t, time), time, x_t).prev_sample
        return x_t


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
    if name == "sit":
        return NoiseSchedule.rectified_flow(noise_at=0, time_scale=1.0, prediction=prediction or "velocity")
    makers: dict[str, Callable[..., NoiseSchedule]] = {
        "linear": NoiseSchedule.linear,
        "scaled_linear": NoiseSchedule.scaled_linear,
        "cosine": NoiseSchedule.cosine,
    }
    if name not in makers:
        raise UserError(f"schedule: {name!r}, expected one of {[*makers, 'rectified_flow', 'sit']}")
    return makers[name](prediction=prediction or "epsilon")
