"""The paper's Synthetic SD Data: images drawn by a text-to-image model for each class, to train a classifier on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_diffclf.candidates import Candidates
from lightning_diffclf.data.prompts import PromptSet
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.autoencoder import Autoencoder
from lightning_diffclf.models.pipeline import PipelineDenoiser
from lightning_diffclf.sampling import denoise, initial_noise


class TextToImage:
    """Draws images of classes from a text-to-image pipeline, each from noise of its own key.

    By DDIM, or Euler's method for a flow (:mod:`~lightning_diffclf.sampling`), not by the pipeline's own scheduler and
    loop: so an image depends on its class, its number and the seed, and not on the batch that it is drawn in.

    Args:
        pipeline: A loaded pipeline of diffusers.
        asked: A prompt for each candidate; classes may have several, which their images take in turn.

    Attributes:
        names: Name of each class.

    Raises:
        ValueError: if a prompt is longer than the tokenizer allows, or the network is none that we know.
    """

    def __init__(self, pipeline: Any, asked: PromptSet) -> None:
        candidates, prompts = asked
        self.names = candidates.class_names
        self._of_class = [[k for k, c in enumerate(candidates.classes) if c == own] for own in range(len(self.names))]
        unprompted = [name for name, some in zip(self.names, self._of_class, strict=True) if not some]
        if unprompted:
            raise UserError(f"prompts: none for {unprompted}, expected one for each class")
        self._nothing = len(prompts)  # the empty prompt, which guidance is away from
        self._denoiser = PipelineDenoiser(pipeline, Candidates([*candidates.names, "nothing"]), [*prompts, ""])
        self._x0 = torch.empty(0)

    def identity(self) -> dict[str, Any]:
        """What images depend on beside how they are drawn."""
        return self._denoiser.identity()

    def to(self, device: torch.device) -> TextToImage:
        """Move the networks and embed the prompts; returns itself."""
        self._x0 = self._denoiser.encode(torch.zeros(1, 3, *self._denoiser.native_size, device=device))
        return self

    @torch.no_grad()
    def sample(
        self, images: Sequence[tuple[int, int]], guidance_scale: float = 7.5, steps: int = 50, seed: int = 0
    ) -> Tensor:
        """Images (B, 3, H, W), float32 in [-1, 1]; after :meth:`to`.

        Args:
            images: Class and number of each image (B,).
            guidance_scale: Classifier-free guidance away from the empty prompt (Ho & Salimans 2022): 1 is none.
            steps: Denoising steps, of one network call each, or two with guidance.
            seed: Key of the noise.

        Raises:
            ValueError: as :func:`~lightning_diffclf.sampling.denoise`.
        """
        denoiser, device = self._denoiser, self._x0.device
        prompts = [self._of_class[c][number % len(self._of_class[c])] for c, number in images]
        asked = torch.tensor(prompts, device=device)
        noise = initial_noise(self._x0.shape[1:], [f"{c}/{number}" for c, number in images], seed).to(device)

        def predict(x_t: Tensor, time: Tensor) -> Tensor:
            times = time.to(device).expand(len(x_t))
            output = denoiser.predict(x_t, times, asked).float()
            if guidance_scale != 1:
                nothing = denoiser.predict(x_t, times, torch.full_like(asked, self._nothing)).float()
                output = nothing.lerp(output, guidance_scale)
            return output[:, : noise.shape[1]]

        return Autoencoder(denoiser.pipeline.vae).decode(denoise(predict, denoiser.schedule, noise, steps))
