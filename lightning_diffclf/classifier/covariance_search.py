"""Below one call per candidate, without gradients: what a few candidates predict tells what all others would.

Suffixes of shapes: B images, K candidates, A anchors, D values of x0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_diffclf.classifier.checks import check_output
from lightning_diffclf.classifier.draws import Draws
from lightning_diffclf.classifier.search import FIRST_DRAW, FittedSearch, Found, check_kept, groups_of, heaviest
from lightning_diffclf.classifier.sequential import inflation_of
from lightning_diffclf.denoiser import ConditionalDenoiser, evaluating, predict_rows
from lightning_diffclf.errors import UserError
from lightning_diffclf.features import timestep_at
from lightning_diffclf.identity import digest_of_tensor
from lightning_diffclf.noise import KeyedNoise

if TYPE_CHECKING:
    from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier

DRAWS = 2  # antithetic ones, of noise and its negative, that anchors are evaluated at
RIVALS, RIVALS_DRAWS = 3, 8  # candidates of an image, and draws, that measure the inflation
EXPECTED_AT_ONCE = 2**18  # expected predictions, as numbers


class CovarianceSearch(FittedSearch):
    """Proposes candidates by how their predictions vary together over images: neither labels nor gradients.

    :meth:`fit` evaluates all candidates of some images, whose labels it does not read, at one draw each. For every
    value of x0, what the candidates predict of the noise is taken to be normal, with the mean and the covariance found
    there. To propose for another image, a few candidates, the anchors, are evaluated at two antithetic draws, of noise
    ε and -ε; the expected predictions of all others given theirs (as in kriging) give all errors e of each draw. The
    log likelihoods -D/2 · Σ log e (D: values of x0), tempered, make the weights, and the candidates with most of the
    weight are proposed. See docs/elimination.md. :meth:`fit` also measures the ``inflation`` that
    :class:`~.sequential.LikelihoodRatio` has afterwards, unless it was given one: of each image, the three best
    candidates are evaluated at eight more draws. An evaluation under a Trainer fits it to training images of the data
    module, where that was not done.

    Results depend on (seed, image id, image, candidates) and on what it was fitted to. The draws are its own, so that
    those which decide among the proposed are independent of the two that proposed them.

    Args:
        anchors: Candidates to evaluate, each twice: those that tell most about all others, whether they are in play or
            not. Images whose candidates are no more than these calls are not searched.
        timestep: Where on the time axis, 0 being the cleanest and 1 the noisiest.
        miss: Candidates are kept until the weight of all others is below this, in (0, 1).
        least: Candidates to keep at least.
        most: Candidates to keep at most.
        temper: Share of the nats that makes weights, above 0: two draws are not all of them.
        nugget: Variance that is no candidate's in common with others, in units of the mean variance, above 0.
        images: Training images that an evaluation fits it to, at most.

    Raises:
        ValueError: if a setting is out of range.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (
        "anchors",
        "timestep",
        "miss",
        "least",
        "most",
        "temper",
        "nugget",
        "images",
    )

    def __init__(
        self,
        anchors: int = 6,
        timestep: float = 0.5,
        miss: float = 0.02,
        least: int = 3,
        most: int = 64,
        temper: float = 0.12,
        nugget: float = 0.02,
        images: int = 100,
    ) -> None:
        for name, count, fewest in (("anchors", anchors, 1), ("images", images, 2)):
            if count < fewest:
                raise UserError(f"covariance search: {name} {count}, expected at least {fewest}")
        if not 0 <= timestep < 1:
            raise UserError(f"covariance search: timestep {timestep}, expected a place on the time axis, 0 … 1")
        check_kept("covariance search", miss, least, most)
        for name, value in (("temper", temper), ("nugget", nugget)):
            if not 0 < value < math.inf:
                raise UserError(f"covariance search: {name} {value}, expected a number above 0")
        self.anchors, self.timestep, self.images = anchors, timestep, images
        self.miss, self.least, self.most, self.temper, self.nugget = miss, least, most, temper, nugget
        self._anchors_A = torch.empty(0, dtype=torch.int64)
        self._weight: Tensor | None = None  # (values, anchors + 1, candidates), float32, the constant last
        self.inflation = None  # not measured yet

    def __repr__(self) -> str:
        return f"CovarianceSearch({', '.join(f'{name}={getattr(self, name)!r}' for name in self.SETTINGS)})"

    def calls(self, num_candidates: int) -> int:
        return num_candidates + min(num_candidates, RIVALS) * RIVALS_DRAWS

    @torch.no_grad()
    def fit(
        self, denoiser: ConditionalDenoiser, batches: Iterable[tuple[Tensor, Any]], seed: int = 0, microbatch: int = 256
    ) -> CovarianceSearch:
        """Learn from images, one call for each candidate of each and 24 more; returns itself.

        All that is predicted is held at once: images × candidates × values of x0.

        Args:
            denoiser: The network.
            batches: Images (B, C, H, W), as ``denoiser.encode`` takes them, and anything, such as labels, which are not
                read. At least two images: about 100.
            seed: Key of the noise.
            microbatch: Rows in one network call.

        Raises:
            ValueError: if there is one image or none, or a prediction is NaN or infinite.
        """
        every, found, inflation, count = torch.arange(len(denoiser.candidates)), list[Tensor](), list[float](), 0
        with evaluating(denoiser):
            for images, _ in batches:
                x0 = denoiser.encode(images).float()
                ids = [f"fit: {b}" for b in range(count, count + len(images))]
                noise = _noise(x0, ids, seed)
                found.append(self._predictions(denoiser, x0, noise, every.to(x0.device), microbatch))
                if not bool(found[-1].isfinite().all()):
                    raise UserError(
                        "covariance search: predictions for the images to fit to are NaN or infinite, expected finite "
                        "ones"
                    )
                if len(every) > 1:
                    error_BK = (found[-1] - noise.flatten(1)[:, None]).square().mean(2)
                    inflation += inflations(denoiser, images, ids, error_BK, seed, microbatch)
                count += len(images)
        if count < 2:
            raise UserError(f"covariance search: {count} images to fit to, expected at least 2")
        found_BKD = torch.cat(found)
        with torch.autocast(found_BKD.device.type, enabled=False):
            self._learn(found_BKD)
        self.inflation = round(float(np.mean(inflation)), 2) if inflation else 1.0
        return self

    def _learn(self, found_BKD: Tensor) -> None:
        """Least squares of every value's predictions by those of the anchors, with a constant."""
        mean_KD = found_BKD.mean(0)
        varies_DBK = (found_BKD - mean_KD).permute(2, 0, 1).contiguous()
        self._anchors_A = anchors_A = pivots(varies_DBK, self.anchors)
        known_DBA = varies_DBK[:, :, anchors_A]
        own_D = self.nugget * varies_DBK.square().sum(1).mean(1) + 1e-30
        covariance_DAA = known_DBA.mT @ known_DBA
        covariance_DAA.diagonal(dim1=1, dim2=2).add_(own_D[:, None])
        weight_DAK = torch.linalg.solve(covariance_DAA, known_DBA.mT @ varies_DBK)
        weight_DAK[:, :, anchors_A] = torch.eye(len(anchors_A)).to(weight_DAK)  # what they predict is known
        constant_DK = mean_KD.T - (mean_KD.T[:, None, anchors_A] @ weight_DAK)[:, 0]
        self._weight = torch.cat([weight_DAK, constant_DK[:, None]], 1)

    def _predictions(
        self, denoiser: ConditionalDenoiser, x0: Tensor, noise: Tensor, candidates_A: Tensor, microbatch: int
    ) -> Tensor:
        """Noise that some candidates predict at the timestep of the search (B, A, D), float32."""
        schedule, count = denoiser.schedule, len(candidates_A)
        t_B = torch.as_tensor(timestep_at(schedule, self.timestep)).to(schedule.timesteps(1).dtype)
        t_B = t_B.to(x0.device).expand(len(x0))
        x_t_B = schedule.add_noise(x0, noise, t_B)
        x_in_B, time_B = schedule.network_rows(x_t_B, t_B)
        found = []
        for row_N in torch.arange(len(x0) * count, device=x0.device).split(microbatch):
            pair_N, some = row_N // count, slice(int(row_N[0]) // count, int(row_N[-1]) // count + 1)
            output = predict_rows(
                denoiser, x_in_B[some], time_B[some], pair_N - some.start, candidates_A[row_N % count]
            )
            check_output(output, x_t_B[pair_N])
            with torch.autocast(x0.device.type, enabled=False):
                found.append(schedule.to_epsilon(output.float(), x_t_B[pair_N], t_B[pair_N]).flatten(1))
        return torch.cat(found).unflatten(0, (len(x0), count))

    def errors(self, evaluated_BAD: Tensor, noise_BD: Tensor) -> Tensor:
        """Mean squared errors of what all candidates are expected to predict (B, K), float32.

        Args:
            evaluated_BAD: What the anchors predict.
            noise_BD: What there is to predict.

        Raises:
            ValueError: before :meth:`fit`.
        """
        weight_DAK = self._fitted().to(evaluated_BAD.device)
        squares_BK = evaluated_BAD.new_zeros(len(evaluated_BAD), weight_DAK.shape[2])
        some = max(1, EXPECTED_AT_ONCE // squares_BK.numel())  # of the values, so that what is expected stays in caches
        parts = (evaluated_BAD.permute(2, 0, 1), noise_BD.T[:, :, None], weight_DAK)
        for known_DBA, noise_DB1, weight in zip(*(part.split(some) for part in parts), strict=True):
            squares_BK += torch.baddbmm(weight[:, -1:] - noise_DB1, known_DBA, weight[:, :-1]).square_().sum(0)
        return squares_BK / len(weight_DAK)

    def _fitted(self) -> Tensor:
        if self._weight is None:
            raise UserError("covariance search: not fitted; call fit or load_state_dict first")
        return self._weight

    @torch.no_grad()
    def propose(
        self,
        classifier: DiffusionClassifier,
        images: Tensor,
        ids: Sequence[int | str],
        candidates: Sequence[np.ndarray],
    ) -> Found:
        """As :meth:`Search.propose`. Draws with a NaN or infinite prediction do not count; without any, all stay.

        Raises:
            ValueError: before :meth:`fit`, or if it was fitted to another number of candidates or of values.
        """
        denoiser, fitted = classifier.denoiser, self._fitted()
        if fitted.shape[2] != len(denoiser.candidates):
            raise UserError(
                f"covariance search: fitted to {fitted.shape[2]} candidates, found {len(denoiser.candidates)}"
            )
        found, nfe, dropped = list(candidates), [0] * len(ids), [0] * len(ids)
        anchors_A = self._anchors_A.to(images.device)
        cost = DRAWS * len(anchors_A)
        searched = [b for b, one in enumerate(candidates) if len(one) > max(2, self.least, cost)]
        group_of = groups_of(classifier)
        for first in range(0, len(searched), classifier.microbatch):  # some images at a time, whose predictions wait
            some = searched[first : first + classifier.microbatch]
            x0 = denoiser.encode(images[some]).float()
            if x0[0].numel() != len(fitted):
                raise UserError(f"covariance search: fitted to {len(fitted)} values of x0, found {x0[0].numel()}")
            self._weight = fitted = fitted.to(x0.device)
            noise = _noise(x0, [ids[b] for b in some], classifier.draws.seed)
            x0, noise = torch.cat([x0, x0]), torch.cat([noise, -noise])
            predicted_BAD = self._predictions(denoiser, x0, noise, anchors_A, classifier.microbatch)
            with torch.autocast(x0.device.type, enabled=False):
                errors_BK = self.errors(predicted_BAD, noise.flatten(1)).cpu().double()
            for b, errors_SK in zip(some, errors_BK.unflatten(0, (DRAWS, -1)).unbind(1), strict=True):
                finite_S = errors_SK.isfinite().all(1)
                nfe[b], dropped[b] = cost, DRAWS - int(finite_S.sum())
                if dropped[b] < DRAWS:
                    log_K = errors_SK[finite_S][:, candidates[b]].clamp_min(1e-30).log().sum(0)
                    nats_K = -len(fitted) / 2 * log_K
                    weights_K = (self.temper * nats_K).softmax(0).numpy()
                    found[b] = heaviest(weights_K, candidates[b], group_of, self.miss, self.least, self.most)
        return Found(found, nfe, dropped)

    def identity(self) -> dict[str, Any]:
        """What proposals depend on beside the denoiser."""
        learnt = {name: digest_of_tensor(value) for name, value in self.state_dict().items()}
        return {name: getattr(self, name) for name in self.SETTINGS} | {"draws": DRAWS} | learnt

    def state_dict(self) -> dict[str, Tensor]:
        if self._weight is None:
            return {}
        inflation = torch.tensor(self.inflation, dtype=torch.float64)
        return {"weight": self._weight, "anchors": self._anchors_A, "inflation": inflation}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self._weight, self._anchors_A = state_dict["weight"], state_dict["anchors"]
        self.inflation = float(state_dict.get("inflation", 1.0))  # earlier versions did not measure it


def pivots(varies_DBK: Tensor, count: int) -> Tensor:
    """The candidates (count,), or as many as there are, that tell most about all others, int64.

    Each is the one whose values vary most given those of the ones before it: the pivots of Cholesky decompositions of
    the covariances of all values, side by side.

    Args:
        varies_DBK: Deviations of each value's predictions from their mean over images.
        count: How many.
    """
    left_DBK, chosen = varies_DBK.clone(), list[int]()
    for _ in range(min(count, varies_DBK.shape[2])):
        variance_K = left_DBK.square().sum((0, 1))
        variance_K[chosen] = -1.0
        chosen.append(int(variance_K.argmax()))
        direction_DB1 = left_DBK[:, :, chosen[-1:]]
        direction_DB1 = direction_DB1 / direction_DB1.norm(dim=1, keepdim=True).clamp_min(1e-20)
        left_DBK -= direction_DB1 * (direction_DB1.mT @ left_DBK)
    return torch.tensor(chosen, device=varies_DBK.device)


def inflations(
    denoiser: ConditionalDenoiser,
    images: Tensor,
    ids: Sequence[int | str],
    error_BK: Tensor,
    seed: int,
    microbatch: int,
) -> list[float]:
    """The ``inflation`` of each image (B,): of its best candidates by ``error_BK``, at draws of their own."""
    from lightning_diffclf.classifier.diffusion_classifier import DiffusionClassifier  # which imports searches

    best_BA = error_BK.topk(min(RIVALS, error_BK.shape[1]), largest=False).indices.sort().values
    draws = Draws(RIVALS_DRAWS, seed=seed)
    classifier = DiffusionClassifier(denoiser, draws, microbatch=microbatch, keep_errors=True, keep_distances=True)
    found = []
    for result in classifier(images, ids, best_BA.tolist()):
        assert result.errors_KS is not None
        assert result.distances_SKK is not None
        found.append(inflation_of("l2", result.dims, result.errors_KS.T.numpy(), result.distances_SKK.numpy()))
    return found


def _noise(x0: Tensor, ids: Sequence[int | str], seed: int) -> Tensor:
    """Noise of the search's first draw of images with these ids, of the shape of x0."""
    keyed, noise = KeyedNoise(seed), np.empty(x0.shape, dtype=np.float32)
    for out, image_id in zip(noise, ids, strict=True):
        keyed.fill(out, keyed.key(image_id), FIRST_DRAW)
    return torch.from_numpy(noise).to(x0.device)
