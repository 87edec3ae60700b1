"""Small denoisers, a ragged elimination rule, and a plain classifier to compare with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lightning_diffclf import Candidates, Elimination, NoiseSchedule
from lightning_diffclf.classifier import Round
from lightning_diffclf.classifier.draws import KeyedNoise

SHAPE = (2, 4, 4)


class Toy(nn.Module):
    """A small random nonlinear network over K candidates; records what it was given."""

    def __init__(self, num_candidates: int = 5, schedule: NoiseSchedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or NoiseSchedule.linear()
        self.candidates = Candidates([f"c{k}" for k in range(num_candidates)])
        generator = torch.Generator().manual_seed(0)
        dims = int(np.prod(SHAPE))
        self.weight = nn.Parameter(torch.randn(dims, dims, generator=generator) / dims**0.5)
        self.table = nn.Parameter(torch.randn(num_candidates, dims, generator=generator))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.encoded_before_call: list[int] = []  # images encoded so far, at each call
        self.encoded = 0

    def encode(self, images: Tensor) -> Tensor:
        self.encoded += len(images)
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        self.calls.append((x_t, t, candidate))
        self.encoded_before_call.append(self.encoded)
        hidden = x_t.flatten(1) @ self.weight + self.table[candidate] * (t / 1000)[:, None]
        return torch.tanh(hidden).view_as(x_t)


class Zeros(Toy):
    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


class DropOneEachDraw(Elimination):
    """Ragged on purpose: stops after every one or two draws, and mostly drops the worst; keeps what it was shown."""

    def __init__(self, needs: str = "scores") -> None:
        self.needs = needs
        self.rounds_of_images: list[list[Round]] = []

    def __repr__(self) -> str:
        return "DropOneEachDraw()"

    def start(self, num_candidates: int) -> list[Round]:
        self.rounds_of_images.append([])
        return self.rounds_of_images[-1]

    def next_stop(self, done: int, total: int) -> int:
        return min(total, done + 1 + done % 2)

    def survivors(self, state: list[Round], current: Round) -> np.ndarray:
        state.append(current)
        stays = np.ones(len(current.active_A), dtype=bool)
        if len(stays) > 1 and current.done % 3:
            stays[np.argmax(current.scores_A)] = False
        return stays


def some_images(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1


class PlainResult(NamedTuple):
    prediction: int
    scores_K: np.ndarray
    draws_K: np.ndarray
    nfe: int
    rounds: list[dict[str, Any]]


@torch.no_grad()
def classify_plainly(
    denoiser: Any, image: Tensor, image_id: int | str, rule: Elimination, timesteps_S: Tensor, seed: int = 0
) -> PlainResult:
    """One image, one candidate and one draw at a time, all errors kept (l2)."""
    keyed, schedule = KeyedNoise(seed), denoiser.schedule
    errors_of: dict[int, list[float]] = {k: [] for k in range(len(denoiser.candidates))}
    active, rounds, done, state = list(errors_of), [], 0, rule.start(len(errors_of))
    while True:
        stop = rule.next_stop(done, len(timesteps_S))
        noises, predictions = [], []
        for draw in range(done, stop):
            noise = np.empty(tuple(image.shape), dtype=np.float32)
            keyed.fill(noise, keyed.key(image_id), draw)
            noises.append(torch.from_numpy(noise))
            t = timesteps_S[draw : draw + 1]
            x_t = schedule.alpha(t) * image + schedule.sigma(t) * noises[-1]
            for k in active:
                output = denoiser.predict(x_t[None], t, torch.tensor([k]))[0]
                predictions.append(output.flatten())
                errors_of[k].append(float((output - noises[-1]).square().mean()))
        p_RAD = torch.stack(predictions).view(stop - done, len(active), -1)
        shown = {
            "loss": "l2",
            "done": stop,
            "total": len(timesteps_S),
            "dims": image.numel(),
            "log_snr_R": schedule.log_snr(timesteps_S[done:stop]).double().numpy(),
            "weights_R": np.ones(stop - done),
            "active_A": np.array(active),
            "scores_A": np.array([np.mean(errors_of[k]) for k in active]),
            "errors_RA": np.array([errors_of[k][done:stop] for k in active], dtype=np.float32).T,
            "distances_RAA": (p_RAD[:, :, None] - p_RAD[:, None]).square().mean(-1).numpy(),
        }
        rounds.append(shown)
        done = stop
        active = [k for k, stays in zip(active, rule.survivors(state, Round(**shown)), strict=True) if stays]
        if done == len(timesteps_S) or len(active) == 1:
            break
    scores = np.array([np.mean(errors) for errors in errors_of.values()])
    draws = np.array([len(errors) for errors in errors_of.values()])
    return PlainResult(min(active, key=lambda k: scores[k]), scores, draws, int(draws.sum()), rounds)
