"""Bad input ends in one error that names it, before any network call where that is possible."""

import pytest
import torch
from torch import Tensor

from lightning_diffclf import (
    DiffusionClassifier,
    Draws,
    Elimination,
    LikelihoodRatio,
    NoiseSchedule,
    PairedTest,
    Stages,
)
from tests.classifier.toys import SHAPE, DropOneEachDraw, Toy, some_images

ONE_BAD = some_images(4)
ONE_BAD[2, 0, 1, 1] = torch.nan
TWO_BAD = ONE_BAD.clone()
TWO_BAD[3, 1, 0, 0] = torch.inf


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(2, *SHAPE, dtype=torch.uint8)}, TypeError, "dtype torch.uint8, expected a floating"),
        ({"images": torch.zeros(2, *SHAPE, dtype=torch.int64)}, TypeError, "dtype torch.int64, expected a floating"),
        ({"images": [1, 2]}, TypeError, "images: list"),
        ({"images": torch.zeros(2, 4, 4)}, ValueError, r"shape \(2, 4, 4\), expected \(B, C, H, W\)"),
        ({"images": torch.zeros(2, 1, *SHAPE)}, ValueError, r"shape \(2, 1, 2, 4, 4\), expected \(B, C, H, W\)"),
        ({"images": ONE_BAD}, ValueError, "NaN or infinity in image 2 and 0 others"),
        ({"images": TWO_BAD, "ids": "abcd"}, ValueError, "NaN or infinity in image 'c' and 1 others"),
        ({"images": some_images(2), "ids": [1]}, ValueError, "ids: 1 for 2 images"),
        ({"images": some_images(2), "ids": [1, 2, 3]}, ValueError, "ids: 3 for 2 images"),
        ({"images": some_images(2), "candidates": []}, ValueError, "candidates: none given"),
        ({"images": some_images(2), "candidates": [[0], []]}, ValueError, "candidates: none given"),
        ({"images": some_images(2), "candidates": [0, 5]}, ValueError, r"candidates: \[0, 5\], expected .* 0 … 4"),
        ({"images": some_images(2), "candidates": [-1, 2]}, ValueError, r"candidates: \[-1, 2\], expected .* 0 … 4"),
        ({"images": some_images(2), "candidates": [[0], [9]]}, ValueError, r"candidates: \[9\], expected .* 0 … 4"),
        ({"images": some_images(2), "candidates": [1, 1]}, ValueError, r"candidates: \[1, 1\], expected distinct"),
        ({"images": some_images(2), "candidates": [[0]]}, ValueError, "candidates: 1 lists for 2 images"),
        ({"images": some_images(2), "candidates": [[0], [1], [2]]}, ValueError, "candidates: 3 lists for 2 images"),
        ({"images": some_images(1), "candidates": [[0.7, 1.2]]}, ValueError, r"candidates: \[0.7, 1.2\], expected"),
        ({"images": some_images(1), "candidates": [0.7, 1.2]}, ValueError, r"candidates: \[0.7, 1.2\], expected"),
        ({"images": some_images(1), "candidates": "ab"}, ValueError, r"candidates: 'ab', expected distinct"),
        ({"images": some_images(2), "ids": [[0, 1], [1, 2]]}, TypeError, r"ids: \[0, 1\], expected an integer or"),
        ({"images": some_images(2), "candidates": [True, False]}, ValueError, r"candidates: \[True, False\]"),
        ({"images": some_images(2), "candidates": torch.tensor([0, 5])}, ValueError, r"candidates: \[0, 5\]"),
    ],
)
def test_bad_images_are_refused_before_any_network_call(arguments, error, message):
    denoiser = Toy()
    with pytest.raises(error, match=message):
        DiffusionClassifier(denoiser, Draws(2))(**arguments)
    assert denoiser.calls == []
    assert denoiser.encoded == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"microbatch": 0}, "microbatch: 0, expected at least 1"),
        ({"microbatch": -3}, "microbatch: -3, expected at least 1"),
        ({"in_flight": 0}, "in_flight: 0, expected at least 1"),
        ({"microbatch": 2.5}, "microbatch: 2.5, expected a whole number, at least 1"),
        ({"microbatch": True}, "microbatch: True, expected a whole number, at least 1"),
        ({"draws": Draws(1001)}, "1001 draws: the schedule allows"),
        ({"loss": "l2+l4"}, "loss: 'l2\\+l4'"),
        ({"draws": Draws(99), "elimination": Stages((10, 100), (2, 1))}, "draws: 99, but the elimination rule .* 100"),
        ({"elimination": Stages((10, 2000), (2, 1))}, "2000 draws: the schedule allows"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionClassifier(Toy(), **settings)


@pytest.mark.parametrize("lacking", ["schedule", "candidates", "encode", "predict"])
def test_a_denoiser_has_four_members(lacking):
    toy = Toy()
    members = {name: getattr(toy, name) for name in ("schedule", "candidates", "encode", "predict") if name != lacking}
    with pytest.raises(TypeError, match=rf"denoiser: Partial lacks \['{lacking}'\]"):
        DiffusionClassifier(type("Partial", (), members)())


@pytest.mark.parametrize("loss", ["kl", "nll", "l2+kl"])
def test_the_bound_needs_its_schedule_and_a_variance(loss):
    with pytest.raises(ValueError, match="needs a discrete schedule with epsilon prediction, found FlowSchedule"):
        DiffusionClassifier(Toy(schedule=NoiseSchedule.rectified_flow()), loss=loss)
    with pytest.raises(ValueError, match=r"output \(10, 2, 4, 4\), expected \(10, 4, 4, 4\): epsilon and variance"):
        list(DiffusionClassifier(Toy(), Draws(2), loss=loss)(some_images(1)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x_t: x_t[:, :1],
        lambda x_t: torch.cat([x_t] * 3, 1),
        lambda x_t: x_t[:-1],
        lambda x_t: x_t[..., :-1],
        lambda x_t: x_t.flatten(1),
    ],
)
def test_outputs_of_the_wrong_shape(wrong):
    denoiser = Toy()
    denoiser.predict = lambda x_t, t, candidate: wrong(x_t)
    found = str(tuple(wrong(torch.zeros(10, *SHAPE)).shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"predict: output of shape {found} for x_t of shape \(10, 2, 4, 4\)"):
        list(DiffusionClassifier(denoiser, Draws(2))(some_images(1)))


@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_outputs_that_are_no_numbers_of_a_network(kind):
    denoiser = Toy()
    denoiser.predict = lambda x_t, t, candidate: x_t.to(kind)
    with pytest.raises(TypeError, match=rf"denoiser.predict: dtype {kind}, expected a floating point tensor"):
        list(DiffusionClassifier(denoiser, Draws(2))(some_images(1)))


def test_encodings_of_the_wrong_shape():
    denoiser = Toy()
    denoiser.encode = lambda images: None
    with pytest.raises(TypeError, match=r"denoiser.encode: NoneType, expected a tensor \(B, C, h, w\)"):
        list(DiffusionClassifier(denoiser, Draws(2))(some_images(3)))
    denoiser.encode = lambda images: images[:1]
    with pytest.raises(ValueError, match=r"encode: \(3, 2, 4, 4\) became \(1, 2, 4, 4\)"):
        list(DiffusionClassifier(denoiser, Draws(2))(some_images(3)))
    with pytest.raises(ValueError, match=r"noise of shape \(1, 4, 4\) for x0 of shape \(2, 4, 4\)"):
        list(DiffusionClassifier(Toy(), Draws(2, noise=torch.zeros(2, 1, 4, 4)))(some_images(1)))


class Broken(Toy):
    """Returns NaN or infinity for some candidates, from a timestep on."""

    bad, value, since = (2,), torch.nan, 0

    def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
        hit = torch.isin(candidate, torch.tensor(self.bad)) & (t >= self.since)
        return torch.where(hit.view(-1, 1, 1, 1), self.value, super().predict(x_t, t, candidate))


@pytest.mark.parametrize(
    "rule",
    [None, Stages((2, 8), (3, 1)), DropOneEachDraw(), PairedTest(0.1), LikelihoodRatio(0.1)],
    ids=["all", "stages", "ragged", "pairs", "likelihood"],
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("since", [0, 500])
def test_a_broken_candidate_cannot_win(rule: Elimination | None, value: float, since: int):
    denoiser, images, draws = Broken(3), some_images(6), Draws(8)
    denoiser.bad = ()
    winner = DiffusionClassifier(denoiser, draws)(images)[0].candidate  # of the first image, while all is well
    denoiser.bad, denoiser.value, denoiser.since = (winner,), value, since
    with pytest.warns(RuntimeWarning, match="NaN or infinity for 1 of ") as caught:
        results = list(DiffusionClassifier(denoiser, draws, elimination=rule)(images))
    broken = [r for r in results if r.scores_K[winner] == torch.inf]
    assert broken
    assert {(str(w.message).split(": ")[0], str(w.message).split(" (")[1]) for w in caught} == {
        (f"image {r.image_id}", f"c{winner}); they cannot win") for r in broken
    }
    assert all(r.candidate != winner and r.ranking[0] != winner for r in broken)
    assert not any(r.scores_K.isnan().any() for r in results)


def test_other_images_do_not_suffer_from_a_broken_one():
    class BrokenImage(Toy):
        def predict(self, x_t: Tensor, t: Tensor, candidate: Tensor) -> Tensor:
            output = super().predict(x_t, t, candidate)
            return torch.where(
                (x_t.mean((1, 2, 3)) > 50).view(-1, 1, 1, 1) & (candidate == 1).view(-1, 1, 1, 1), torch.nan, output
            )

    images = some_images(5)
    images[2] += 1e6
    with pytest.warns(RuntimeWarning, match="image 2: ") as caught:
        results = list(DiffusionClassifier(BrokenImage(), Draws(4), microbatch=7)(images))
    assert len(caught) == 1
    for a, b in zip(results, DiffusionClassifier(Toy(), Draws(4), microbatch=7)(images), strict=True):
        if a.image_id != 2:
            assert torch.equal(a.scores_K, b.scores_K)
    assert results[2].scores_K.isinf().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("rule", [None, PairedTest(), LikelihoodRatio()], ids=["all", "pairs", "likelihood"])
def test_an_image_without_any_finite_error_has_no_winner(rule):
    denoiser = Broken(3)
    denoiser.bad = (0, 1, 2)
    with pytest.warns(RuntimeWarning, match="image 'x': .* 3 of 3 candidates"):
        (result,) = DiffusionClassifier(denoiser, Draws(4), elimination=rule)(some_images(1), ids=["x"])
    assert (result.prediction, result.candidate, result.abstained) == (None, None, True)
    assert result.scores_K.isinf().all()
    assert sorted(result.ranking) == [0, 1, 2]
