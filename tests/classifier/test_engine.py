"""The engine against golden numbers, closed forms and a plain loop."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lightning_diffclf import Candidates, DiffusionClassifier, Draws, Elimination, Exhaustive, NoiseSchedule, Stages
from lightning_diffclf.classifier.draws import KeyedNoise
from tests.conftest import GOLDEN

SHAPE = (2, 4, 4)


class Toy(nn.Module):
    """A small random nonlinear network over K candidates; records the shapes and inputs of its calls."""

    def __init__(self, num_candidates: int = 5, schedule: NoiseSchedule | None = None) -> None:
        super().__init__()
        self.schedule = schedule or NoiseSchedule.linear()
        self.candidates = Candidates([f"c{k}" for k in range(num_candidates)])
        generator = torch.Generator().manual_seed(0)
        dims = int(np.prod(SHAPE))
        self.weight = nn.Parameter(torch.randn(dims, dims, generator=generator) / dims**0.5)
        self.table = nn.Parameter(torch.randn(num_candidates, dims, generator=generator))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def encode(self, images: Tensor) -> Tensor:
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        self.calls.append((x_t, t, candidate))
        hidden = x_t.flatten(1) @ self.weight + self.table[candidate] * (t / 1000)[:, None]
        return torch.tanh(hidden).view_as(x_t)


class Zeros(Toy):
    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        return torch.zeros_like(x_t)


class DropOneEachDraw(Elimination):
    """Ragged on purpose: after each draw the worst candidate goes, but on every third draw none; keeps what it saw."""

    def __init__(self, needs: str = "scores") -> None:
        self.needs = needs
        self.rounds: list = []

    def next_stop(self, done: int, total: int) -> int:
        return min(total, done + 1 + done % 2)

    def survivors(self, state, current):
        self.rounds.append(current)
        stays = np.ones(len(current.active_A), dtype=bool)
        if len(stays) > 1 and current.done % 3:
            stays[np.argmax(current.scores_A)] = False
        return stays


def some_images(count: int) -> Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def plain_errors(denoiser: Toy, image: Tensor, image_id: int, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Errors (K, S), predictions (S, K, D) and noise (S, D) by one network call at a time."""
    keyed = KeyedNoise(0)
    noise_SD = np.empty((len(timesteps), image.numel()), dtype=np.float32)
    for s, out in enumerate(noise_SD):
        keyed.fill(out, keyed.key(image_id), s)
    noise_SD = torch.from_numpy(noise_SD)
    predictions = torch.empty(len(timesteps), len(denoiser.candidates), image.numel())
    for s, t in enumerate(timesteps):
        noise = noise_SD[s].view(1, *SHAPE)
        x_t = denoiser.schedule.alpha(t[None]) * image + denoiser.schedule.sigma(t[None]) * noise
        for k in range(len(denoiser.candidates)):
            with torch.no_grad():
                predictions[s, k] = denoiser.predict(x_t, t[None], torch.tensor([k])).flatten()
    return (predictions - noise_SD[:, None]).square().mean(2).T, predictions, noise_SD


# --- golden numbers ------------------------------------------------------------------------------------------------


class GoldenUNet:
    def __init__(self, text_embeds: Tensor) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(GOLDEN / "sd" / "unet", low_cpu_mem_usage=False).eval()
        self.schedule = NoiseSchedule.from_diffusers(
            EulerDiscreteScheduler.from_pretrained(GOLDEN / "sd" / "scheduler")
        )
        self.candidates = Candidates([f"prompt {i}" for i in range(len(text_embeds))])
        self.text_embeds = text_embeds

    def encode(self, images: Tensor) -> Tensor:
        return images

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        return self.unet(x_t, t, encoder_hidden_states=self.text_embeds[candidate]).sample


@pytest.fixture(scope="module")
def golden_sd():
    with np.load(GOLDEN / "sd" / "sd_golden.npz") as file:
        arrays = {name: torch.from_numpy(values) for name, values in file.items()}
    return GoldenUNet(arrays["text_embeds"]), arrays


@pytest.mark.parametrize("loss", ["l1", "l2", "huber"])
@pytest.mark.parametrize(
    ("name", "rule"), [("two", Stages((10, 100), (5, 1))), ("four", Stages((5, 10, 20, 100), (9, 6, 3, 1)))]
)
def test_stages_reproduce_the_reference(golden_sd, loss, name, rule):
    denoiser, arrays = golden_sd
    classifier = DiffusionClassifier(
        denoiser, Draws(100, noise=arrays["noise"]), loss, rule, microbatch=60, keep_errors=True
    )
    timesteps, errors, predictions = (arrays[f"{loss}_{name}_{part}"] for part in ("timesteps", "errors", "pred"))
    for i, result in enumerate(classifier(arrays["latents"])):
        for k, draws in enumerate(result.draws_K.tolist()):
            assert result.timesteps_S[:draws].tolist() == timesteps[i, k, :draws].tolist()
            assert bool((timesteps[i, k, draws:] == -1).all())
        torch.testing.assert_close(result.errors_KS, errors[i], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert result.label == predictions[i]


@pytest.mark.parametrize("loss", ["l2", "l1", "kl", "nll", "l2+kl"])
def test_dit_terms_are_the_references(golden_dit, loss):
    class Denoiser:
        schedule, candidates = NoiseSchedule.linear(), Candidates([str(k) for k in range(10)])

        def encode(self, images: Tensor) -> Tensor:
            return images

        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            return golden_dit.model(x_t, t, candidate)

    a = golden_dit.arrays
    terms = dict(zip(("l2", "l1", "kl", "nll"), a["errors"].unbind(-1), strict=True))
    expected_BKS = sum(terms[term] for term in loss.split("+"))
    draws = Draws(50, timesteps=a["timesteps"], noise=a["noise"])
    classifier = DiffusionClassifier(Denoiser(), draws, loss, microbatch=200, keep_errors=True)
    errors_BKS = torch.stack([result.errors_KS for result in classifier(a["latents"])])
    torch.testing.assert_close(errors_BKS, expected_BKS, rtol=1e-4, atol=0)
    assert json.loads((GOLDEN / "dit" / "dit_golden.json").read_text())["terms"][0].startswith("mse")


# --- closed form ---------------------------------------------------------------------------------------------------

SCHEDULES = {
    f"{name} {p}": (maker, p)
    for name, maker, predictions in (
        ("linear", NoiseSchedule.linear, ("epsilon", "sample", "v_prediction")),
        ("scaled linear", NoiseSchedule.scaled_linear, ("epsilon", "v_prediction")),
        ("cosine", NoiseSchedule.cosine, ("epsilon", "v_prediction")),
        ("flow", NoiseSchedule.rectified_flow, ("velocity", "epsilon")),
        ("flow of SiT", lambda prediction: NoiseSchedule.rectified_flow(0, prediction=prediction), ("velocity",)),
        ("flow of SD3", lambda prediction: NoiseSchedule.rectified_flow(1, 1000.0, prediction), ("velocity",)),
        ("edm", NoiseSchedule.edm, ("edm", "sample")),
    )
    for p in predictions
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_agrees_with_the_bayes_classifier_of_gaussians(case):
    """Classes are N(mean, spread²): the exact denoiser is known, and Bayes' rule is the nearest mean."""
    make, prediction = SCHEDULES[case]
    means = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(7)) * 0.5
    spread = 0.5

    class Exact(Toy):
        def predict(self, x_in: Tensor, time: Tensor, candidate: Tensor) -> Tensor:
            t = {"edm edm": lambda: (4 * time).exp(), "flow of SD3 velocity": lambda: time / 1000}.get(
                case, lambda: time
            )()
            alpha, sigma = (v.view(-1, 1, 1, 1) for v in (self.schedule.alpha(t), self.schedule.sigma(t)))
            x_t = x_in * (sigma**2 + 0.25).sqrt() if case == "edm edm" else x_in
            mean = means[candidate]
            x0 = mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x_t - alpha * mean)
            return self.schedule.target(x0, (x_t - alpha * x0) / sigma, t)

    generator = torch.Generator().manual_seed(8)
    labels = torch.randint(4, (60,), generator=generator)
    images = means[labels] + spread * torch.randn(60, *SHAPE, generator=generator)
    distances = (images[:, None] - means).square().flatten(2).sum(2)
    two = distances.sort(1).values
    clear = (two[:, 1] - two[:, 0]) > 1.5  # a posterior of more than 0.95, with room for Monte Carlo error
    results = list(DiffusionClassifier(Exact(4, make(prediction=prediction)), Draws(300))(images))
    agree = torch.tensor([r.label for r in results]) == distances.argmin(1)
    assert clear.sum() > 30
    assert bool(agree[clear].all())


# --- against a plain loop, and against itself ----------------------------------------------------------------------


@pytest.mark.parametrize("microbatch", [1, 7, 64])
def test_rounds_hold_what_a_plain_loop_computes(microbatch):
    denoiser, images = Toy(), some_images(3)
    rule = DropOneEachDraw(needs="predictions")
    classifier = DiffusionClassifier(denoiser, Draws(8), elimination=rule, microbatch=microbatch, in_flight=1)
    results, rounds = list(classifier(images, ids=[10, 11, 12])), iter(rule.rounds)
    for i, result in enumerate(results):
        errors_KS, predictions_SKD, noise_SD = plain_errors(denoiser, images[i], 10 + i, classifier.timesteps_S)
        active, done = np.arange(5), 0
        while done < 8 and not (len(active) == 1 and done):
            current, stop = next(rounds), min(8, done + 1 + done % 2)
            assert current.done == stop
            assert current.active_A.tolist() == active.tolist()
            expected = errors_KS[active, :stop].double().mean(1)
            torch.testing.assert_close(torch.from_numpy(current.scores_A), expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(torch.from_numpy(current.errors_RA), errors_KS[active, done:stop].T)
            torch.testing.assert_close(current.predictions_RAD, predictions_SKD[done:stop][:, active])
            assert torch.equal(current.noise_RD, noise_SD[done:stop])
            if len(active) > 1 and stop % 3:
                active = np.delete(active, int(expected.argmax()))
            done = stop
        assert result.label in active
    assert next(rounds, None) is None


@pytest.mark.parametrize("rule", [Exhaustive(), Stages((4, 16), (3, 1)), DropOneEachDraw()])
def test_results_do_not_depend_on_how_they_were_run(rule):
    denoiser, images = Toy(), some_images(9)
    ids = [f"image {i}" for i in range(9)]

    def run(order=range(9), **settings):
        classifier = DiffusionClassifier(denoiser, Draws(16), elimination=rule, **settings)
        return {r.image_id: r for r in classifier(images[list(order)], ids=[ids[i] for i in order])}

    reference = run(microbatch=256)
    for other in (
        *(run(microbatch=m) for m in (1, 7, 64)),
        run(microbatch=20, in_flight=2),
        run(order=[4, 8, 0, 3, 1, 7, 6, 2, 5], microbatch=30),
        run(order=[5, 2], microbatch=13),
    ):
        for image_id, result in other.items():
            expected = reference[image_id]
            assert (result.label, result.nfe) == (expected.label, expected.nfe)
            assert torch.equal(result.draws_K, expected.draws_K)
            torch.testing.assert_close(result.scores_K, expected.scores_K, rtol=1e-5, atol=1e-7)


def test_order_and_choice_of_candidates_do_not_change_scores():
    denoiser, images = Toy(), some_images(2)
    classifier = DiffusionClassifier(denoiser, Draws(6), microbatch=11)
    full = [r.scores_K for r in classifier(images)]
    permuted = [r.scores_K for r in classifier(images, candidates=[3, 0, 4, 1, 2])]
    own = list(classifier(images, candidates=[[4, 1], [2]]))
    for i in range(2):
        torch.testing.assert_close(permuted[i], full[i][[3, 0, 4, 1, 2]], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(own[i].scores_K, full[i][own[i].candidates_K], rtol=1e-6, atol=1e-8)
    assert own[0].label in (1, 4)
    assert own[1].label == 2
    assert [r.nfe for r in own] == [12, 6]


def test_candidates_are_paired_and_micro_batches_full():
    denoiser, images = Toy(4), some_images(5)
    results = list(DiffusionClassifier(denoiser, Draws(9), microbatch=50)(images))
    sizes = [len(x_t) for x_t, _, _ in denoiser.calls]
    assert sizes == [50, 50, 50, 30]  # 5 images x 4 candidates x 9 draws
    assert [r.nfe for r in results] == [36] * 5  # as many as the network really saw
    x_t, t, candidate = (torch.cat(parts) for parts in zip(*denoiser.calls, strict=True))
    assert candidate.tolist() == [0, 1, 2, 3] * 45
    assert bool((x_t.view(45, 4, *SHAPE) == x_t.view(45, 4, *SHAPE)[:, :1]).all())
    assert bool((t.view(45, 4) == t.view(45, 4)[:, :1]).all())
    assert [r.image_id for r in results] == list(range(5))


def test_memory_does_not_grow_with_draws():
    def peak(draws: int) -> int:
        classifier = DiffusionClassifier(Zeros(200), Draws(draws), microbatch=100)
        tracemalloc.start()
        list(classifier(some_images(2)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    peak(10)
    assert peak(400) < 1.2 * peak(40) + 20_000


def test_training_mode_is_left_and_restored():
    class Strict(Toy):
        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            assert not self.training
            return super().predict(x_t, t, candidate)

    denoiser = Strict().train()
    for _ in DiffusionClassifier(denoiser, Draws(2), microbatch=10)(some_images(3)):
        break
    assert denoiser.training
    assert all(not x_t.requires_grad for x_t, _, _ in denoiser.calls)


def test_errors_are_float32_under_autocast():
    denoiser, images = Toy(), some_images(3)
    plain = list(DiffusionClassifier(denoiser, Draws(20))(images))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = list(DiffusionClassifier(denoiser, Draws(20), keep_errors=True)(images))
    assert mixed[0].errors_KS.dtype == torch.float32
    assert mixed[0].errors_KS.unique().numel() == 100  # no ties by rounding
    for a, b in zip(plain, mixed, strict=True):
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=2e-2, atol=0)
        assert not torch.equal(a.scores_K, b.scores_K)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", [Exhaustive(), DropOneEachDraw("predictions")])
def test_a_gpu_gives_the_same_decisions(rule):
    images = some_images(9)
    settings = {"draws": Draws(16), "elimination": rule, "microbatch": 37}
    on_cpu = list(DiffusionClassifier(Toy(), **settings)(images))
    on_gpu = list(DiffusionClassifier(Toy().cuda(), **settings)(images.cuda()))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert (a.label, a.nfe) == (b.label, b.nfe)
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("classes", "keep", "samples", "nfe"),
    [
        (101, (20, 10, 5, 1), (20, 50, 100, 500), 5570),
        (10, (5, 1), (50, 500), 2750),
        (37, (5, 1), (25, 250), 2050),
        (113, (25, 10, 5, 1), (50, 100, 500, 1000), 14400),
        (1000, (500, 50, 10, 1), (50, 100, 500, 1000), 124500),
    ],
)
def test_cost_of_the_papers_schedules(classes, keep, samples, nfe):
    rule = Stages(samples, keep)
    (result,) = DiffusionClassifier(Zeros(classes), elimination=rule, microbatch=5000)(some_images(1))
    assert result.nfe == nfe


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(2, *SHAPE, dtype=torch.uint8)}, TypeError, "dtype torch.uint8, expected a floating"),
        ({"images": [1, 2]}, TypeError, "images: list"),
        ({"images": torch.zeros(2, 4, 4)}, ValueError, r"shape \(2, 4, 4\), expected \(B, C, H, W\)"),
        ({"images": torch.full((2, *SHAPE), torch.nan), "ids": ["a", "b"]}, ValueError, "NaN or infinity in image 'a'"),
        ({"images": some_images(2), "ids": [1]}, ValueError, "ids: 1 for 2 images"),
        ({"images": some_images(2), "candidates": []}, ValueError, "candidates: none given"),
        ({"images": some_images(2), "candidates": [[0], []]}, ValueError, "candidates: none given"),
        ({"images": some_images(2), "candidates": [0, 5]}, ValueError, r"candidates: \[0, 5\], expected .* 0 … 4"),
        ({"images": some_images(2), "candidates": [1, 1]}, ValueError, r"candidates: \[1, 1\]"),
        ({"images": some_images(2), "candidates": [[0]]}, ValueError, "1 lists for 2 images"),
    ],
)
def test_bad_images_are_refused_before_any_network_call(arguments, error, message):
    denoiser = Toy()
    with pytest.raises(error, match=message):
        DiffusionClassifier(denoiser, Draws(2))(**arguments)
    assert denoiser.calls == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"microbatch": 0}, "microbatch: 0"),
        ({"in_flight": 0}, "in_flight: 0"),
        ({"draws": Draws(1001)}, "1001 draws: the schedule allows"),
        ({"loss": "l2+l4"}, "loss: 'l2\\+l4'"),
        ({"draws": Draws(99), "elimination": Stages((10, 100), (2, 1))}, "draws: 99, but the elimination rule .* 100"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionClassifier(Toy(), **settings)


def test_bad_denoisers_are_refused():
    with pytest.raises(TypeError, match=r"object lacks \['schedule', 'candidates', 'encode', 'predict'\]"):
        DiffusionClassifier(object())
    with pytest.raises(ValueError, match="'kl' needs a discrete schedule"):
        DiffusionClassifier(Toy(schedule=NoiseSchedule.rectified_flow()), loss="kl")
    for loss, message in (("l2", "output of shape"), ("kl", "variance|2C|channels")):
        broken = Toy()
        if loss == "l2":
            broken.predict = lambda x_t, t, candidate: x_t[:, :1]
        with pytest.raises(ValueError, match=message):
            list(DiffusionClassifier(broken, Draws(2), loss)(some_images(1)))
    with pytest.raises(ValueError, match=r"noise of shape \(1, 4, 4\) for x0 of shape \(2, 4, 4\)"):
        list(DiffusionClassifier(Toy(), Draws(2, noise=torch.zeros(2, 1, 4, 4)))(some_images(1)))


def test_a_broken_candidate_cannot_win():
    class Broken(Toy):
        bad = (2,)

        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            output = super().predict(x_t, t, candidate)
            return torch.where(torch.isin(candidate, torch.tensor(self.bad)).view(-1, 1, 1, 1), torch.nan, output)

    denoiser = Broken(3)
    with pytest.warns(RuntimeWarning, match=r"image 'x'.*NaN or infinity for 1 candidates \(c2"):
        (result,) = DiffusionClassifier(denoiser, Draws(4))(some_images(1), ids=["x"])
    assert result.label != 2
    assert result.scores_K[2] == torch.inf
    assert result.ranking[-1] == 2
    denoiser.bad = (0, 1, 2)
    with pytest.raises(FloatingPointError, match="image 'x': the network returned NaN or infinity for all"):
        list(DiffusionClassifier(denoiser, Draws(4))(some_images(1), ids=["x"]))
