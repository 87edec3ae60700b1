import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from lightning_diffclf import DiffusionClassifier, Draws, NoiseSchedule, Recipe, Stages
from lightning_diffclf.classifier.draws import KeyedNoise, middle_first, nested_order
from tests.gaussians import Gaussians, Samples


@given(st.integers(1, 400), st.data())
@settings(deadline=None)
def test_every_prefix_covers_the_grid_evenly(count, data):
    order = nested_order(count).tolist()
    assert sorted(order) == list(range(count))
    n = data.draw(st.integers(1, count))
    visited = sorted(order[:n])
    gaps = np.diff([*visited, visited[0] + count])
    # golden-ratio points leave no gap above (1 + golden ratio)² / n of the circle; 2 for rounding to ranks
    assert gaps.max() <= 2.62 * count / n + 2


def test_every_prefix_of_the_default_draws_covers_the_grid_evenly():
    visited = nested_order(250).numpy()
    for n in range(1, 251):
        points = np.sort(visited[:n])
        assert np.diff([*points, points[0] + 250]).max() <= 2.62 * 250 / n + 2
    ascending = np.arange(250)[:125]  # the bound is one: half of the ascending grid is far from it
    assert np.diff([*ascending, 250]).max() > 2.62 * 2 + 2


def noise(keyed: KeyedNoise, image_id, draw: int, size: int = 64) -> np.ndarray:
    out = np.empty(size, dtype=np.float32)
    keyed.fill(out, keyed.key(image_id), draw)
    return out


def test_noise_is_a_fresh_philox_stream_for_each_draw():
    keyed = KeyedNoise(3)
    noise(keyed, "other", 9, 7)  # whatever was drawn before
    for draw in (0, 1, 2**40):
        philox = np.random.Philox(counter=[0, 0, 0, draw], key=keyed.key("image"))
        expected = np.random.Generator(philox).standard_normal(64, dtype=np.float32)
        assert np.array_equal(noise(keyed, "image", draw), expected)


def test_the_key_is_a_hash_of_seed_and_image():
    """Stored results stay comparable as long as this holds."""
    digest = hashlib.blake2b(b"3/cat.png", digest_size=16).digest()
    expected = [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")]
    assert KeyedNoise(3).key("cat.png").tolist() == expected
    assert KeyedNoise(0).key(7).tolist() == KeyedNoise(0).key("7").tolist()
    keys = [tuple(KeyedNoise(s).key(i).tolist()) for s in (0, 1, 12, -1) for i in (0, 2, "2/0", "", "a")]
    assert len(set(keys)) == len(keys)


def test_noise_depends_on_seed_image_and_draw_only():
    reference = noise(KeyedNoise(0), 7, 1)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(noise(KeyedNoise(0), "7", 1), reference)
    torch.manual_seed(2)
    assert np.array_equal(noise(KeyedNoise(0), np.int64(7), 1), reference)
    others = [noise(KeyedNoise(1), 7, 1), noise(KeyedNoise(0), 8, 1), noise(KeyedNoise(0), 7, 2)]
    for other in others:
        assert abs(np.corrcoef(reference, other)[0, 1]) < 0.5
        assert not np.array_equal(other, reference)


def test_noise_is_standard_normal():
    keyed = KeyedNoise(0)
    values = np.concatenate([noise(keyed, i, d, 50) for i in range(40) for d in range(50)])
    assert kstest(values, "norm").pvalue > 1e-3
    assert values.dtype == np.float32


def test_draws_and_images_are_independent():
    keyed = KeyedNoise(0)
    values = np.stack([noise(keyed, i, d, 4000) for i in range(5) for d in range(5)])
    correlations = np.corrcoef(values)[np.triu_indices(25, 1)]
    assert np.abs(correlations).max() < 4.5 / 4000**0.5  # 300 pairs: chance of 0.2 % if independent


def test_default_draws_are_the_papers_timesteps_in_nested_order():
    visited = Draws(250).visit(NoiseSchedule.linear())
    assert sorted(visited.tolist()) == list(range(2, 1000, 4))
    assert visited[:4].tolist() != sorted(visited[:4].tolist())


def test_given_timesteps_are_kept():
    given_timesteps = torch.tensor([9, 3, 5])
    draws = Draws(3, timesteps=given_timesteps)
    assert torch.equal(draws.visit(NoiseSchedule.linear()), given_timesteps)
    assert draws.visit(NoiseSchedule.linear(), order=[2, 0]).tolist() == [5, 9]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Draws(0), "draws: 0, expected at least 1"),
        (lambda: Draws(2.5), "draws: 2.5, expected a whole number, at least 1"),
        (lambda: Draws("10"), "draws: '10', expected a whole number, at least 1"),
        (lambda: Draws(3, timesteps=torch.arange(4)), "count is 3 but 4 timesteps are given"),
        (lambda: Draws(3, noise=torch.zeros(2, 1, 2, 2)), "count is 3 but 2 noise are given"),
        (lambda: Draws(2000).visit(NoiseSchedule.linear()), "2000 draws: the schedule allows 1 … 1000"),
        (lambda: Draws(3).visit(NoiseSchedule.linear(), range(5)), "draws: 3, but the elimination rule spends up to 5"),
        (lambda: Draws(5, antithetic=True), "draws: 5 antithetic ones, expected an even number"),
        (lambda: Draws(2, timesteps=torch.arange(2), antithetic=True), "antithetic ones beside fixed timesteps"),
        (lambda: Draws(2, noise=torch.zeros(2, 1, 2, 2), antithetic=True), "antithetic ones beside fixed timesteps"),
        (lambda: Draws(10, grid=4, antithetic=True), "grid: 4 timesteps for 10 draws, expected at least 5"),
        (lambda: Draws(4, antithetic=True).visit(NoiseSchedule.linear(), range(4)), "antithetic: true, but the elimin"),
    ],
)
def test_bad_draws(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_antithetic_draws_are_pairs_with_opposite_noise_at_one_timestep():
    schedule, keyed, draws = NoiseSchedule.linear(), KeyedNoise(3), Draws(8, seed=3, antithetic=True)
    visited = draws.visit(schedule)
    assert visited[::2].tolist() == visited[1::2].tolist() == schedule.timesteps(4)[[2, 0, 3, 1]].tolist()
    on_one = [Draws(n, grid=100, antithetic=True).visit(schedule) for n in (6, 8)]
    assert on_one[1][:6].tolist() == on_one[0].tolist()
    out = np.empty((8, 64), dtype=np.float32)
    for draw in (5, 2, 7, 0, 1, 3, 6, 4):
        draws.fill(keyed, out[draw], keyed.key("image"), draw)
    assert np.array_equal(out[1::2], -out[::2])
    assert np.array_equal(out[::2], [noise(keyed, "image", draw) for draw in (0, 2, 4, 6)])


@pytest.mark.parametrize(("count", "seen"), [(32, 8), (250, 50), (1000, 50), (1000, 500)])
def test_middle_first_is_spread_as_a_beta_distribution_is(count, seen):
    visited = middle_first(count).numpy()
    assert sorted(visited) == list(range(count))
    far = np.abs(visited - (count - 1) / 2)
    assert far[0] <= 1 < far[:seen].mean() < far[seen:].mean()
    # As long as there is room in the middle: Kolmogorov's distance from Beta(2, 2), of which random places have 1/√n.
    few = min(seen, count // 4)
    assert kstest((visited[:few] + 0.5) / count, "beta", (2, 2)).statistic < 2 / few


@pytest.mark.parametrize("microbatch", [3, 256])
def test_in_antithetic_pairs_the_noise_of_differences_cancels_where_predictions_are_linear(microbatch):
    """Candidates of equal spread predict apart by what no noise changes, and the rest is linear in it: odd."""
    images = Samples(3).images

    def differences(seed: int, antithetic: bool) -> torch.Tensor:
        draws = Draws(6, seed=seed, antithetic=antithetic)
        results = DiffusionClassifier(Gaussians(), draws, microbatch=microbatch)(images)
        return torch.stack([one.scores_K - one.scores_K[0] for one in results])

    torch.testing.assert_close(differences(1, True), differences(2, True), rtol=1e-4, atol=1e-5)
    assert (differences(1, False) - differences(2, False)).abs().max() > 0.01


def test_antithetic_draws_of_versions_with_another_order_are_other_draws():
    assert Recipe(4, antithetic=True).identity()["antithetic"] == "middle first"  # it was true
    assert Recipe(4, antithetic=True, grid=100).identity()["antithetic"] is True
    resolved = Recipe().resolved(Draws(4, antithetic=True), Stages())
    assert resolved.identity()["antithetic"] == "middle first"


def test_antithetic_is_of_the_recipe_or_of_the_draws():
    assert DiffusionClassifier(Gaussians(), draws=4, antithetic=True).draws.antithetic
    assert DiffusionClassifier(Gaussians(), antithetic=True).draws.antithetic
    with pytest.raises(ValueError, match="antithetic: true, but draws are given that are not"):
        Recipe(Draws(4), antithetic=True)
    with pytest.raises(ValueError, match="draws: 3 antithetic ones"):
        Recipe(3, antithetic=True)
    with pytest.raises(ValueError, match="antithetic: true, but the elimination rule has grids of its own"):
        DiffusionClassifier(Gaussians(), antithetic=True, elimination=Stages((2, 4), (3, 1)))
