"""The engine against golden numbers, closed forms and a plain loop."""

import gc
import json
import tracemalloc
from collections import deque

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_diffclf import (
    Candidates,
    DiffusionClassifier,
    Draws,
    Elimination,
    Exhaustive,
    LikelihoodRatio,
    NoiseSchedule,
    PairedTest,
    Stages,
)
from tests.classifier.toys import SHAPE, DropOneEachDraw, Toy, Zeros, classify_plainly, some_images
from tests.conftest import GOLDEN

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
        denoiser, Draws(100, noise=arrays["noise"]), loss=loss, elimination=rule, microbatch=120, keep_errors=True
    )
    timesteps, errors, predictions = (arrays[f"{loss}_{name}_{part}"] for part in ("timesteps", "errors", "pred"))
    for i, result in enumerate(classifier(arrays["latents"])):
        for k, draws in enumerate(result.draws_K.tolist()):
            assert result.timesteps_S[:draws].tolist() == timesteps[i, k, :draws].tolist()
            assert bool((timesteps[i, k, draws:] == -1).all())
        torch.testing.assert_close(result.errors_KS, errors[i], rtol=1e-5, atol=1e-5, equal_nan=True)
        assert result.prediction == predictions[i]


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
    classifier = DiffusionClassifier(Denoiser(), draws, loss=loss, microbatch=200, keep_errors=True)
    errors_BKS = torch.stack([result.errors_KS for result in classifier(a["latents"])])
    torch.testing.assert_close(errors_BKS, expected_BKS, rtol=1e-4, atol=0)
    assert json.loads((GOLDEN / "dit" / "dit_golden.json").read_text())["terms"][0].startswith("mse")


# --- against a plain loop, and against itself ----------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["scores", "errors", "distances"])
@pytest.mark.parametrize(("microbatch", "in_flight"), [(1, 1), (7, None), (7, 3), (64, 1), (64, None), (256, None)])
def test_rounds_hold_what_a_plain_loop_computes(needs, microbatch, in_flight):
    denoiser, images, rule = Toy(), some_images(4), DropOneEachDraw(needs)
    classifier = DiffusionClassifier(
        denoiser, Draws(8, seed=3), elimination=rule, microbatch=microbatch, in_flight=in_flight
    )
    results = list(classifier(images, ids=[10, 11, 12, 13]))
    assert len(rule.rounds_of_images) == 4
    rounds_seen = set()
    for i, (result, rounds) in enumerate(zip(results, rule.rounds_of_images, strict=True)):
        expected = classify_plainly(denoiser, images[i], 10 + i, DropOneEachDraw(), classifier.timesteps_S, seed=3)
        assert (result.image_id, result.prediction, result.nfe) == (10 + i, expected.prediction, expected.nfe)
        assert result.draws_K.tolist() == expected.draws_K.tolist()
        np.testing.assert_allclose(result.scores_K, expected.scores_K, rtol=2e-6)
        assert len(rounds) == len(expected.rounds)
        for current, shown in zip(rounds, expected.rounds, strict=True):
            assert current.done == shown["done"]
            assert current.active_A.tolist() == shown["active_A"].tolist()
            np.testing.assert_allclose(current.scores_A, shown["scores_A"], rtol=2e-6)
            assert (current.errors_RA is None) == (needs == "scores")
            assert (current.distances_RAA is None) == (needs != "distances")
            assert (current.loss, current.total, current.dims) == ("l2", 8, int(np.prod(SHAPE)))
            assert current.weights_R.tolist() == [1.0] * (len(current.weights_R))
            if needs != "scores":
                assert current.errors_RA.dtype == np.float32
                np.testing.assert_allclose(current.errors_RA, shown["errors_RA"], rtol=1e-5)
            if needs == "distances":
                # Roots in half precision, as they are stored.
                np.testing.assert_allclose(current.distances_RAA, shown["distances_RAA"], rtol=1e-3, atol=1e-7)
            rounds_seen.add((current.done, len(current.active_A)))
    assert len(rounds_seen) > 4  # images did advance differently


RULES = {
    "exhaustive": Exhaustive(),
    "stages": Stages((4, 16), (3, 1)),
    "ragged": DropOneEachDraw(),
    "ragged with distances": DropOneEachDraw("distances"),
    "paired test": PairedTest(0.2),
    "likelihood ratio": LikelihoodRatio(0.2),
}
NAMES = [f"image {i}" for i in range(8)]


@pytest.fixture(scope="module")
def plain_results():
    """Of 8 images under each rule, by one network call at a time."""
    denoiser, images, results = Toy(), some_images(8), {}
    for name, rule in RULES.items():
        timesteps_S = DiffusionClassifier(denoiser, Draws(16), elimination=rule).timesteps_S
        results[name] = [
            classify_plainly(denoiser, x, n, rule, timesteps_S) for x, n in zip(images, NAMES, strict=True)
        ]
    return results


@given(
    st.sampled_from(list(RULES)),
    st.sampled_from([1, 7, 64, 256]) | st.integers(1, 100),
    st.sampled_from([1, 3, None]),
    st.permutations(range(8)),
    st.integers(1, 8),
    st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_results_do_not_depend_on_how_they_were_run(
    plain_results, rule, microbatch, in_flight, order, count, keep_errors
):
    """Neither on micro-batches nor on order, other images, or what else is kept."""
    order = order[:count]
    classifier = DiffusionClassifier(
        Toy(),
        Draws(16),
        elimination=RULES[rule],
        microbatch=microbatch,
        in_flight=in_flight,
        keep_errors=keep_errors,
    )
    results = list(classifier(some_images(8)[order], ids=[NAMES[i] for i in order]))
    assert [r.image_id for r in results] == [NAMES[i] for i in order]
    for i, result in zip(order, results, strict=True):
        expected = plain_results[rule][i]
        assert (result.prediction, result.nfe) == (expected.prediction, expected.nfe)
        assert result.draws_K.tolist() == expected.draws_K.tolist()
        np.testing.assert_allclose(result.scores_K, expected.scores_K, rtol=2e-6)
        if keep_errors:
            spent = torch.arange(16) < result.draws_K[:, None]
            assert torch.equal(result.errors_KS.isfinite(), spent)
            np.testing.assert_allclose(result.errors_KS.nanmean(1), expected.scores_K, rtol=1e-5)


def test_the_label_is_the_class_of_the_winning_candidate():
    denoiser, images = Toy(), some_images(6)
    plain = list(DiffusionClassifier(denoiser, Draws(6))(images))
    assert len({r.candidate for r in plain}) > 1
    denoiser.candidates = Candidates(list("abcde"), [7, 7, 2, 0, 5])
    for a, b in zip(plain, DiffusionClassifier(denoiser, Draws(6))(images), strict=True):
        assert a.candidate == b.candidate == int(a.scores_K.argmin())
        assert b.prediction == (7, 7, 2, 0, 5)[a.candidate]


def test_ids_and_seed_key_the_noise():
    denoiser, images = Toy(), some_images(3)

    def scores(seed=0, **arguments):
        return torch.stack([r.scores_K for r in DiffusionClassifier(denoiser, Draws(6, seed))(images, **arguments)])

    reference = scores()
    for ids in ([0, 1, 2], ["0", "1", "2"], torch.arange(3), np.arange(3), (str(i) for i in range(3))):
        assert torch.equal(scores(ids=ids), reference)
    classifier = DiffusionClassifier(denoiser, Draws(1))
    assert [repr(r.image_id) for r in classifier(images, ids=torch.arange(3))] == ["0", "1", "2"]  # no tensors
    assert not torch.isclose(scores(ids=[1, 2, 3]), reference).any()
    assert not torch.isclose(scores(seed=1), reference).any()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_order_of_candidates_does_not_change_their_scores(rule):
    denoiser, images, order = Toy(), some_images(4), [3, 0, 4, 1, 2]
    classifier = DiffusionClassifier(denoiser, Draws(16), elimination=rule, microbatch=11)
    for a, b in zip(classifier(images), classifier(images, candidates=order), strict=True):
        assert b.candidates_K.tolist() == order
        assert (a.prediction, a.candidate, a.nfe) == (b.prediction, b.candidate, b.nfe)
        assert torch.equal(a.draws_K[order], b.draws_K)
        torch.testing.assert_close(a.scores_K[order], b.scores_K, rtol=1e-6, atol=0)


def test_images_may_bring_their_own_candidates():
    denoiser, images = Toy(), some_images(3)
    denoiser.candidates = Candidates(list("abcde"), [10, 11, 12, 13, 14])
    classifier = DiffusionClassifier(denoiser, Draws(6), microbatch=11)
    full = [r.scores_K for r in classifier(images)]
    own = list(classifier(images, candidates=[[4, 1], [2], [0, 3, 2]]))
    for scores_K, result in zip(full, own, strict=True):
        torch.testing.assert_close(result.scores_K, scores_K[result.candidates_K], rtol=1e-6, atol=0)
        assert result.candidate == result.candidates_K[result.scores_K.argmin()]
        assert result.prediction == 10 + result.candidate
    assert [r.candidates_K.tolist() for r in own] == [[4, 1], [2], [0, 3, 2]]
    assert [r.nfe for r in own] == [12, 6, 18]
    for both in ([1, 3], (1, 3), np.array([1, 3]), torch.tensor([1, 3]), range(1, 4, 2)):
        assert all(r.candidates_K.tolist() == [1, 3] for r in classifier(images, candidates=both))
    for each in (np.array([[0, 1], [1, 2], [0, 4]]), torch.tensor([[0, 1], [1, 2], [0, 4]])):
        assert [r.candidates_K.tolist() for r in classifier(images, candidates=each)] == each.tolist()


def test_no_images_no_results():
    assert list(DiffusionClassifier(Toy(), Draws(2))(some_images(0))) == []


def streamed(classifier, images, ids=None, candidates=None):
    run = classifier.run()
    run.add(images, ids, candidates)
    return run.finish()


def test_results_can_be_looked_at_again():
    results = DiffusionClassifier(Toy(2), Draws(5))(some_images(3))
    assert [r.image_id for r in results] == [r.image_id for r in results] == [0, 1, 2]
    assert results[1].image_id == 1


def test_results_come_as_soon_as_they_are_decided():
    denoiser = Toy(2)
    results = streamed(DiffusionClassifier(denoiser, Draws(5), microbatch=10, in_flight=1), some_images(3))
    assert denoiser.calls == []
    for calls in (1, 2, 3):
        next(results)
        assert len(denoiser.calls) == calls
        assert torch.is_grad_enabled()  # the consumer's loop may train


def test_oldest_images_come_first():
    denoiser = Toy(2)
    results = streamed(DiffusionClassifier(denoiser, Draws(5), microbatch=4), some_images(3))
    next(results)
    assert len(denoiser.calls) == 3  # the third has the last two rows of its ten


def test_results_are_in_the_order_given_even_if_decided_earlier():
    denoiser, rule = Toy(), DropOneEachDraw()
    classifier = DiffusionClassifier(denoiser, Draws(16), elimination=rule, microbatch=100)
    results = streamed(classifier, some_images(4), "abcd", [[0, 1, 2, 3, 4], [0, 1], [1, 2], [3]])
    first = next(results)
    assert len(rule.rounds_of_images[1]) == 1  # decided after one draw, long before the first image
    assert first.draws_K.max() > 1
    rest = list(results)
    assert [first.image_id, *(r.image_id for r in rest)] == list("abcd")
    assert [r.nfe for r in rest] == [2, 2, 16]  # a single candidate is scored all the same


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(
    ("microbatch", "in_flight"), [(1, None), (3, None), (13, None), (50, None), (50, 2), (5000, None)]
)
def test_cost_is_what_the_network_saw_and_micro_batches_are_full(rule, microbatch, in_flight):
    denoiser, images = Toy(), some_images(8)
    classifier = DiffusionClassifier(denoiser, Draws(16), elimination=rule, microbatch=microbatch, in_flight=in_flight)
    results = list(classifier(images))
    sizes = [len(x_t) for x_t, _, _ in denoiser.calls]
    assert all(len(t) == len(candidate) == len(x_t) for x_t, t, candidate in denoiser.calls)
    assert sum(sizes) == sum(r.nfe for r in results) == sum(int(r.draws_K.sum()) for r in results)
    assert max(sizes) <= microbatch
    assert denoiser.encoded == 8
    if in_flight is None:  # not full only when no image is left to fill it
        assert all(size == microbatch or n == 8 for size, n in zip(sizes, denoiser.encoded_before_call, strict=True))
    if isinstance(rule, Exhaustive):
        assert all(r.nfe == 5 * 16 for r in results)
        spent = np.cumsum(sizes)
        assert in_flight or set(sizes[:-1]) <= {microbatch}
        assert denoiser.encoded_before_call == np.ceil(spent / 80).tolist()  # no image before it is needed
    # Paired: there are as many distinct noisy inputs as (image, draw) pairs, each seen once by each candidate.
    x_t, _, candidate = (torch.cat(parts) for parts in zip(*denoiser.calls, strict=True))
    distinct, pair = torch.unique(x_t.flatten(1), dim=0, return_inverse=True)
    assert len(distinct) == sum(int(r.draws_K.max()) for r in results)
    assert len(torch.unique(torch.stack([pair, candidate]), dim=1).T) == len(x_t)


class DropAndForget(DropOneEachDraw):
    def start(self, num_candidates: int) -> deque:
        return deque(maxlen=1)


@pytest.mark.parametrize("rule", [Exhaustive(), DropAndForget("errors")], ids=["exhaustive", "ragged"])
def test_memory_does_not_grow_with_draws(rule):
    class Watched(Zeros):
        tensors = 0

        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            self.encoded += 1
            if self.encoded % 50 == 15:
                found = {id(o): o.numel() for o in gc.get_objects() if type(o) is Tensor}
                self.tensors = max(self.tensors, sum(found.values()))
            return super().predict(x_t, t, candidate)

    def peak(draws: int) -> tuple[int, int]:
        denoiser = Watched(200)
        classifier = DiffusionClassifier(denoiser, Draws(draws), elimination=rule, microbatch=500)
        gc.collect()
        tracemalloc.start()  # sees what numpy allocates, but not what torch does
        list(classifier(some_images(1)))
        arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return arrays, denoiser.tensors

    peak(50)
    few, many = peak(50), peak(1000)
    assert few[1] > 500 * int(np.prod(SHAPE))  # the watch works
    assert many[0] < 1.2 * few[0] + 20_000  # the timesteps themselves
    assert many[1] < 1.2 * few[1]


class Composite(Toy):
    """Has a part that stays in evaluation mode whatever the rest does, as a frozen encoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.frozen = nn.Dropout(), nn.Dropout().eval()
        self.modes_seen: set[bool] = set()

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        self.modes_seen |= {module.training for module in self.modules()}
        return super().predict(x_t, t, candidate)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


@pytest.mark.parametrize("root_trains", [True, False])
@pytest.mark.parametrize("how", ["to the end", "break", "close", "error"])
def test_training_mode_is_left_and_restored(root_trains, how):
    denoiser = Composite()
    denoiser.training = root_trains
    before = modes(denoiser)
    assert before == [root_trains, True, False]
    results = streamed(DiffusionClassifier(denoiser, Draws(2), microbatch=10), some_images(3))
    if how == "to the end":
        assert len(list(results)) == 3
    elif how == "break":
        for _ in results:
            break
        del results
    elif how == "close":
        next(results)
        assert modes(denoiser) == [False] * 3
        results.close()
    else:
        whole = denoiser.predict
        denoiser.predict = lambda *rows: whole(*rows)[:1]
        with pytest.raises(ValueError, match="output of shape"):
            list(results)
    assert denoiser.modes_seen == {False}
    assert modes(denoiser) == before
    assert all(not x_t.requires_grad for x_t, _, _ in denoiser.calls)


def test_a_class_with_its_own_train_is_told():
    """Some merge adapters into the weights in evaluation mode, and have to undo it."""

    class Merging(Toy):
        merged = False

        def train(self, mode: bool = True) -> "Merging":
            self.merged = not mode
            return super().train(mode)

        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            assert self.merged
            return super().predict(x_t, t, candidate)

    denoiser = Merging()
    assert len(list(DiffusionClassifier(denoiser, Draws(2))(some_images(2)))) == 2
    assert not denoiser.merged
    assert denoiser.training


def test_errors_are_float32_under_autocast():
    class Watched(Toy):
        seen: tuple = ()

        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            self.seen += ((torch.is_autocast_enabled("cpu"), (x_t.flatten(1) @ self.weight).dtype, x_t.dtype),)
            return super().predict(x_t, t, candidate)

    denoiser, images = Watched(), some_images(3)
    plain = list(DiffusionClassifier(denoiser, Draws(20))(images))
    assert set(denoiser.seen) == {(False, torch.float32, torch.float32)}
    denoiser.seen = ()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = list(DiffusionClassifier(denoiser, Draws(20), keep_errors=True)(images))
    assert set(denoiser.seen) == {(True, torch.bfloat16, torch.float32)}
    assert mixed[0].errors_KS.dtype == torch.float32
    assert mixed[0].scores_K.dtype == torch.float64
    assert mixed[0].errors_KS.unique().numel() == 100  # no ties by rounding
    for a, b in zip(plain, mixed, strict=True):
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=2e-2, atol=0)
        assert not torch.equal(a.scores_K, b.scores_K)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_half_precision_outputs_are_converted_in_float32(prediction):
    """What a bf16 network says, its noise prediction and error follow in float32."""

    class Half(Toy):
        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            return super().predict(x_t, t, candidate).bfloat16()

    class Rounded(Half):
        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            return super().predict(x_t, t, candidate).float()

    schedule, images = NoiseSchedule.linear(prediction=prediction), some_images(2)
    runs = [list(DiffusionClassifier(kind(5, schedule), Draws(9))(images)) for kind in (Half, Rounded)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.scores_K, b.scores_K)
    rule = DropOneEachDraw("distances")
    list(DiffusionClassifier(Half(5, schedule), Draws(9), elimination=rule)(images))
    first = rule.rounds_of_images[0][0]
    assert first.distances_RAA.dtype == first.errors_RA.dtype == np.float32


def test_the_winner_ranks_first_whatever_the_rule_says():
    class KeepTheWorst(Elimination):
        def survivors(self, state, current):
            return current.scores_A == current.scores_A.max()

    for result in DiffusionClassifier(Toy(), Draws(4), elimination=KeepTheWorst())(
        some_images(3), candidates=[3, 1, 4]
    ):
        assert result.candidates_K[result.ranking[0]] == result.candidate
        assert result.scores_K[result.ranking[0]] == result.scores_K.max()
        assert result.ranking[1] == result.scores_K.argmin()


@pytest.mark.parametrize(
    "rule", [Exhaustive(), Stages((4, 8, 16), (4, 3, 2)), DropOneEachDraw()], ids=["exhaustive", "stages", "ragged"]
)
def test_ranking_is_by_endurance_then_score(rule):
    for result in DiffusionClassifier(Toy(), Draws(16), elimination=rule)(some_images(5)):
        by_hand = sorted(range(5), key=lambda k: (-result.draws_K[k], result.scores_K[k]))
        assert result.ranking == by_hand
        assert result.candidate == by_hand[0]


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


def test_distances_in_mixed_precision():
    """Autocast has no opinion on what waits in half precision."""
    images, settings = some_images(4), {"draws": Draws(16), "elimination": LikelihoodRatio(), "microbatch": 37}
    whole = DiffusionClassifier(Toy(), **settings)(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = DiffusionClassifier(Toy(), **settings)(images)
    assert [result.prediction for result in mixed] == [result.prediction for result in whole]
    assert all(result.nfe <= 80 for result in mixed)


# --- what candidates have in common ----------------------------------------------------------------------------------


class Sharing(Toy):
    """Computes its hidden values once for each (image, draw)."""

    def predict_shared(self, x_t: Tensor, t: Tensor, pair: Tensor, candidate: Tensor) -> Tensor:
        self.calls.append((x_t, t, candidate))
        hidden = (x_t.flatten(1) @ self.weight)[pair] + self.table[candidate] * (t / 1000)[pair, None]
        return torch.tanh(hidden).view(-1, *x_t.shape[1:])


@pytest.mark.parametrize("microbatch", [3, 7, 64])
def test_a_denoiser_that_can_share_gets_each_pair_of_image_and_draw_once(microbatch):
    results, calls = [], []
    for make in (Toy, Sharing):
        denoiser = make()
        classifier = DiffusionClassifier(denoiser, Draws(6), elimination=DropOneEachDraw(), microbatch=microbatch)
        results.append(classifier(some_images(5), ids="abcde"))
        calls.append(denoiser.calls)
    for a, b in zip(*results, strict=True):
        assert (a.prediction, a.nfe, a.draws_K.tolist()) == (b.prediction, b.nfe, b.draws_K.tolist())
        torch.testing.assert_close(a.scores_K, b.scores_K, rtol=1e-6, atol=0)
    for (rows, _, candidate), (pairs, times, same) in zip(*calls, strict=True):
        assert torch.equal(candidate, same)
        assert len(pairs) == len(times) == len(pairs.unique(dim=0)) == len(rows.unique(dim=0))


def test_a_predict_of_its_own_is_not_passed_over():
    """By the pairs of the class that it comes from."""

    class Other(Sharing):
        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            return super().predict(x_t, t, candidate) / 2

    changed = Sharing()
    changed.predict = Other().predict
    expected = [result.scores_K for result in DiffusionClassifier(Other(), Draws(3))(some_images(2), ids="ab")]
    found = [result.scores_K for result in DiffusionClassifier(changed, Draws(3))(some_images(2), ids="ab")]
    whole = [result.scores_K for result in DiffusionClassifier(Sharing(), Draws(3))(some_images(2), ids="ab")]
    for own, replaced, shared in zip(expected, found, whole, strict=True):
        assert torch.equal(own, replaced)
        assert not torch.allclose(own, shared)
