"""Text-to-image models of which a small part is trained on labelled images: LoRA weights, or tokens of the prompts.

The pretrained networks stay as they are. They are not parts of the module, so that checkpoints hold what was trained
and the name of the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_diffclf.data.batch import content_ids, unpack
from lightning_diffclf.errors import UserError, check_at_least
from lightning_diffclf.hub import TEXT_TO_IMAGE
from lightning_diffclf.models.pipeline import family_of
from lightning_diffclf.models.sharing import Sharing
from lightning_diffclf.modules.objectives import Objectives
from lightning_diffclf.modules.training import StepRandom, fixed_timesteps, optimization
from lightning_diffclf.modules.zero_shot_sd import ZeroShotStableDiffusion
from lightning_diffclf.sampling import initial_noise

WIDTHS = ("cross_attention_dim", "joint_attention_dim", "caption_channels")  # of a token of a prompt, in configurations

OF_TRAINING: dict[str, str] = {
    **dict.fromkeys(("classification", "temperature", "compared_classes", "compared_share", "seed"), "of training"),
    **dict.fromkeys(("lr", "betas", "weight_decay", "warmup_steps", "decay"), "of the optimizer"),
}


class _Adapted(ZeroShotStableDiffusion):
    """What both have in common: the training of the module's own parameters, which are few."""

    def __init__(self, **pretrained: Any) -> None:
        super().__init__(**pretrained)
        self.objectives = Objectives.of(self.hparams)
        if self.hparams["lr"] <= 0:
            raise UserError(f"lr: {self.hparams['lr']}, expected a positive number")
        self._pipeline = [super().load_pipeline()]  # in a list, so that Lightning does not take it for a part

    def load_pipeline(self) -> Any:
        """The pipeline: loaded once, when the module is made, because the shapes of what is trained follow from it."""
        return self._pipeline[0]

    @property
    def _network(self) -> Any:
        pipeline = self._pipeline[0]
        return getattr(pipeline, family_of(pipeline).NETWORK)

    def setup(self, stage: str) -> None:
        """Check the data against the prompts; in training, and only there, the module's own parameters may change."""
        classes = self.candidates.classes
        if stage == "fit" and len(set(classes)) < len(classes):
            raise UserError("prompts: several for a class, expected one for each to train with")
        self.requires_grad_(stage == "fit")  # making the denoiser froze what belongs to its network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self._labelled(batch)
        random = StepRandom.of(self, images, batch_idx, self.hparams["seed"])
        x0 = self.encode(images)
        t, noise = random.timesteps(self.schedule), random.normal(*x0.shape[1:])
        losses = {"loss": self._losses(x0, labels, t, noise).mean()}
        if self.objectives.compares:
            classes = len(self.candidates), None
            losses |= self.objectives.compare(self.predict, self.schedule, x0, labels, t, noise, classes, random)
            losses["loss"] = losses["loss"] + losses.pop("add")
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The denoising loss, at noise that is fixed for each image."""
        images, labels = self._labelled(batch)
        ids = unpack(batch).ids or content_ids(images)
        x0, seed = self.encode(images), self.hparams["seed"]
        t, noise = fixed_timesteps(self.schedule, ids, seed), initial_noise(tuple(x0.shape[1:]), ids, seed)
        loss = self._losses(x0, labels, t.to(x0.device), noise.to(x0.device)).mean()
        self.log("val/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x0))

    def _losses(self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Denoising loss of each image (B,), float32."""
        x_t = self.schedule.add_noise(x0, noise, t)
        rows, time = self.schedule.network_rows(x_t, t)
        output = self.predict(rows, time, labels)[:, : x0.shape[1]].float()
        loss: Tensor = (output - self.schedule.target(x0, noise, t)).square().flatten(1).mean(1)
        return loss

    def _labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and the candidate of each."""
        images, labels = unpack(batch)[:2]
        if labels is None:
            raise UserError("batch: no labels, expected a label for each image to train on")
        classes = torch.tensor(self.candidates.classes, device=labels.device)
        found = labels[:, None] == classes
        if not bool(found.any(1).all()):
            raise UserError(f"labels: {int(labels.min())} … {int(labels.max())}, expected 0 … {int(classes.max())}")
        return images, found.long().argmax(1)

    def configure_optimizers(self) -> Any:
        return optimization(self.parameters(), self.hparams, lambda: self.trainer.estimated_stepping_batches)


class LoraStableDiffusion(_Adapted):
    """A text-to-image model trained on labelled images by low-rank changes of its weights (LoRA, Hu et al. 2022).

    Each weight W (m, n) of the attention layers named becomes W + B A, with A (rank, n) random and B (m, rank) zero at
    first: so training begins with the pretrained model. Trained are A and B, in float32, by the denoising loss under
    the prompt of an image's class and, where it has a weight, the classification loss. Images become the means of the
    autoencoder's posterior, as they do when they are classified. Evaluation is that of
    :class:`~.zero_shot_sd.ZeroShotStableDiffusion`. The pipeline is loaded when the module is made.

    Args:
        pretrained: Here and below, up to ``drop_t5``: see :class:`~.zero_shot_sd.ZeroShotStableDiffusion`.
        prompts: One for each class.
        class_names: Name of each class; those of the data if omitted.
        revision: Branch, tag or commit of the repository.
        dtype: Of the pretrained weights.
        offload: Keep on the device only what is at work.
        lora: LoRA weights of before, which are merged into the pretrained ones.
        attention: Attention of diffusers by its name.
        drop_t5: Leave the T5 text encoder of Stable Diffusion 3 out.
        rank: Rank of the changes.
        targets: Ends of the names of the layers that are changed, separated by dots.
        checkpointing: Compute activations again in the backward pass rather than keep them.
        classification: Weight of the classification loss; see :class:`~.objectives.Objectives`, also for the next
            three.
        temperature: Its temperature.
        compared_classes: Classes of an image that it compares.
        compared_share: Share of each batch that it looks at.
        lr: Learning rate of AdamW.
        betas: Its moment decay rates.
        weight_decay: Its weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        decay: What it does then: stay (``none``) or fall to zero at ``max_steps`` along a ``cosine`` or a line.
        seed: Key of the training noise.

    Raises:
        ValueError: if the model cannot be loaded, or has no such layers; or settings are out of range.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {
        **ZeroShotStableDiffusion.CANNOT_CHANGE_RESULTS,
        **OF_TRAINING,
        "checkpointing": "of training",
    }

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
        rank: int = 8,
        targets: Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0"),
        checkpointing: bool = False,
        classification: float = 0.0,
        temperature: float = 2.0,
        compared_classes: int = 4,
        compared_share: float = 1.0,
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine", "linear"] = "none",
        seed: int = 0,
    ) -> None:
        super().__init__(
            pretrained=pretrained,
            prompts=prompts,
            class_names=class_names,
            revision=revision,
            dtype=dtype,
            offload=offload,
            lora=lora,
            attention=attention,
            drop_t5=drop_t5,
        )
        check_at_least(1, rank=rank)
        self.adapter = nn.ParameterDict(_add_lora(self._network, rank, targets))
        if checkpointing:
            self._network.enable_gradient_checkpointing()

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Network output for rows of noisy latents, times and candidates."""
        return super().predict(x_t, t, candidate)

    def predict_shared(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        """As :meth:`predict` for ``x_t[pair]`` and ``t[pair]``; what rows have in common is computed once.

        Not in training: what candidates have in common is found by what depends on what, and then all depends on
        parameters.
        """
        if any(one.requires_grad for one in self.adapter.parameters()):
            return self.predict(x_t[pair], t[pair], candidate)
        return super().predict_shared(x_t, t, pair, candidate)

    def save_lora(self, folder: str | Path) -> None:
        """Write the LoRA weights as diffusers has them: for ``ZeroShotStableDiffusion(lora=folder)`` and others."""
        from peft.utils import get_peft_model_state_dict

        pipeline = self._pipeline[0]
        name = f"{family_of(pipeline).NETWORK}_lora_layers"
        type(pipeline).save_lora_weights(folder, **{name: get_peft_model_state_dict(self._network)})


def _add_lora(network: Any, rank: int, targets: Sequence[str]) -> dict[str, nn.Parameter]:
    """Add LoRA layers to a network; their weights, by name with slashes for dots."""
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian")
    try:
        network.add_adapter(config)
    except ValueError as error:
        raise UserError(f"targets: {list(targets)}, expected layers of {type(network).__name__} ({error})") from error
    found = {name.replace(".", "/"): value for name, value in network.named_parameters() if ".lora_" in name}
    for value in found.values():
        value.data = value.data.float()  # steps of half precision would be rounded away
    return found


class SoftPrompts(_Adapted):
    """A text-to-image model whose prompts are trained on labelled images, and nothing else.

    The first ``tokens`` tokens of a prompt, as the text encoders have made them, are changed by learned vectors, zero
    at first: shared by all classes, as context (Zhou et al. 2022, CoOp, in the space where SoftREPA has its tokens: Lee
    et al. 2025, arXiv 2503.08250), or for each class. They are learned by the denoising loss under the prompt of an
    image's class and, where it has a weight, the classification loss.

    Args:
        pretrained: Here and below, up to ``drop_t5``: see :class:`~.zero_shot_sd.ZeroShotStableDiffusion`.
        prompts: One for each class.
        class_names: Name of each class; those of the data if omitted.
        revision: Branch, tag or commit of the repository.
        dtype: Of the pretrained weights.
        offload: Keep on the device only what is at work.
        lora: LoRA weights, which are merged into the pretrained ones.
        attention: Attention of diffusers by its name.
        drop_t5: Leave the T5 text encoder of Stable Diffusion 3 out.
        tokens: Tokens that are changed, M. There are M · D parameters for all classes, or for each, with D the width of
            a token: 4 of width 1,024 for 100 classes are 409,600.
        num_classes: Number of classes, if each has vectors of its own; 1: all share them. On the command line, null
            is the number that the data say.
        classification: Weight of the classification loss; see :class:`~.objectives.Objectives`, also for the next
            three.
        temperature: Its temperature.
        compared_classes: Classes of an image that it compares.
        compared_share: Share of each batch that it looks at.
        lr: Learning rate of AdamW.
        betas: Its moment decay rates.
        weight_decay: Its weight decay.
        warmup_steps: Steps over which the learning rate rises linearly from zero.
        decay: What it does then: stay (``none``) or fall to zero at ``max_steps`` along a ``cosine`` or a line.
        seed: Key of the training noise.

    Raises:
        ValueError: if the model cannot be loaded or takes no text; or settings are out of range, or there are not as
            many classes.
    """

    CANNOT_CHANGE_RESULTS: ClassVar[dict[str, str]] = {**ZeroShotStableDiffusion.CANNOT_CHANGE_RESULTS, **OF_TRAINING}

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
        tokens: int = 4,
        num_classes: int | None = 1,
        classification: float = 0.0,
        temperature: float = 2.0,
        compared_classes: int = 4,
        compared_share: float = 1.0,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay: Literal["none", "cosine", "linear"] = "none",
        seed: int = 0,
    ) -> None:
        if num_classes is None:
            raise UserError("num_classes: None, and the data do not say; expected a number")
        check_at_least(1, tokens=tokens, num_classes=num_classes)
        super().__init__(
            pretrained=pretrained,
            prompts=prompts,
            class_names=class_names,
            revision=revision,
            dtype=dtype,
            offload=offload,
            lora=lora,
            attention=attention,
            drop_t5=drop_t5,
        )
        widths = [width for name in WIDTHS if isinstance(width := self._network.config.get(name), int)]
        if not widths:
            raise UserError(f"pretrained: {pretrained!r} takes no text, expected a text-to-image model")
        self.vectors = nn.Parameter(torch.zeros(num_classes, tokens, widths[0]))
        self._sharing: tuple[tuple[int, int], Sharing] | None = None  # of which state of the vectors it is

    def contents(self) -> dict[str, Any]:
        """Networks, prompts, and what was learned."""
        return super().contents() | {"vectors": self.vectors}

    def setup(self, stage: str) -> None:
        """As in training of any part; also: are there as many classes?"""
        super().setup(stage)
        if self.hparams["num_classes"] not in (1, len(self.candidates)):
            raise UserError(f"num_classes: {self.hparams['num_classes']}, but there are {len(self.candidates)} prompts")

    def conditions(self, candidate: Tensor) -> tuple[Tensor, ...]:
        """What the text encoders make of candidates (N,), changed by what was learned."""
        text, *others = super().conditions(candidate)
        learned = self.vectors[candidate if len(self.vectors) > 1 else torch.zeros_like(candidate)]  # (N, M, D)
        count = learned.shape[1]
        if text.ndim != 3 or text.shape[1] < count or text.shape[2] != learned.shape[2]:
            raise UserError(
                f"tokens: {count}, but prompts are {tuple(text.shape[1:])}, expected as many tokens or fewer"
            )
        return torch.cat([text[:, :count] + learned, text[:, count:]], dim=1), *others

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        """Network output for rows of noisy latents, times and candidates."""
        return self.predict_from(x_t, t, self.conditions(candidate))

    def predict_shared(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        """As :meth:`predict` for ``x_t[pair]`` and ``t[pair]``; what rows have in common is computed once.

        Not where gradients are wanted: what is made of prompts is looked up in tables, which have none.
        """
        if torch.is_grad_enabled() or not self.denoiser.family.CROSS_ATTENTION:
            return self.predict(x_t[pair], t[pair], candidate)
        state = self.vectors.data_ptr(), self.vectors._version
        if self._sharing is None or self._sharing[0] != state:
            with torch.inference_mode(False):
                conditions = self.conditions(torch.arange(len(self.candidates), device=x_t.device))
            self._sharing = state, self.denoiser.sharing(tuple(one.detach() for one in conditions))
        return self._sharing[1](x_t.to(self._network.dtype), t, pair, candidate)
