import itertools

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_diffclf import LikelihoodRatio, PairedTest, Stages
from lightning_diffclf.classifier import Round
from lightning_diffclf.classifier.sequential import SequentialTest


def shown(done, active, scores, **more):
    return Round("l2", done, 100, 64, active, scores, **({"log_snr_R": np.zeros(1), "weights_R": np.ones(1)} | more))


@given(st.lists(st.integers(1, 120), min_size=1, max_size=4, unique=True))
@example([2, 3, 4, 5])  # 2 and 3 together are 4
@settings(deadline=None)
def test_stages_visit_the_grids_of_the_reference(samples):
    samples = sorted(samples)
    rule = Stages(samples, [1] * len(samples))
    grid, evaluated, stops = list(range(samples[-1])), [], []
    for n in samples:  # "t_to_eval[len // n // 2 :: len // n][:n]", without what was evaluated
        stage = grid[len(grid) // n // 2 :: len(grid) // n][:n]
        evaluated += [t for t in stage if t not in evaluated]
        stops.append(len(evaluated))
    assert rule.order(samples[-1]) == evaluated
    done, seen = 0, []
    while done < len(evaluated):
        done = rule.next_stop(done, len(evaluated))
        seen.append(done)
    assert seen == sorted(set(stops))


def adaptive_evaluation(samples, keep, errors_KT):
    """The paper's Algorithm 2 as its code runs it. Timesteps that each candidate saw, in order, and the winner."""
    t_to_eval = list(range(samples[-1]))
    evaluated = {k: [] for k in range(len(errors_KT))}
    remaining = list(evaluated)
    for n, n_keep in zip(samples, keep, strict=True):
        stage = t_to_eval[len(t_to_eval) // n // 2 :: len(t_to_eval) // n][:n]
        for k in remaining:
            evaluated[k] = evaluated[k] + [t for t in stage if t not in evaluated[k]]
        remaining = sorted(remaining, key=lambda k: np.mean(errors_KT[k, evaluated[k]]))[:n_keep]
    return evaluated, remaining[0]


def spend(rule, errors_KT):
    """The same by asking the rule, one round after another."""
    order, active = rule.order(errors_KT.shape[1]), np.arange(len(errors_KT))
    evaluated, done = {k: [] for k in range(len(errors_KT))}, 0
    state = rule.start(len(errors_KT))
    while done < len(order):
        stop = rule.next_stop(done, len(order))
        for k in active:
            evaluated[k] = order[:stop]
        done, scores = stop, errors_KT[active][:, order[:stop]].mean(1)
        active = active[rule.survivors(state, shown(done, active, scores))]
    return evaluated, active[0]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(sorted),
    st.lists(st.integers(2, 9), min_size=3, max_size=3),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
@example([2, 3, 4, 5], [3, 3, 2], 4, 0)  # 2 and 3 cover what 4 would add: its keep counts all the same
@example([1, 2, 3, 4], [9, 8, 2], 9, 1)
@settings(deadline=None)
def test_stages_spend_what_the_reference_spends(samples, keep, num_candidates, seed):
    keep = [*sorted(keep, reverse=True)[: len(samples) - 1], 1][: len(samples)]
    errors_KT = np.random.default_rng(seed).random((num_candidates, samples[-1]))
    expected, winner = adaptive_evaluation(samples, keep, errors_KT)
    assert spend(Stages(samples, keep), errors_KT) == (expected, winner)


def test_stages_keep_the_lowest_scores():
    rule = Stages((2, 8), (2, 1))
    scores = np.array([0.4, 0.1, 0.3, 0.2])
    assert rule.survivors(None, shown(2, np.arange(4), scores)).tolist() == [False, True, False, True]
    assert rule.survivors(None, shown(8, np.array([1, 3]), np.array([0.3, 0.2]))).tolist() == [False, True]


@pytest.mark.parametrize(
    ("samples", "keep", "message"),
    [
        ((50, 500), (5,), "equally many"),
        ((), (), "at least one"),
        ((50, 50), (5, 1), "rising"),
        ((0, 50), (5, 1), "rising numbers from 1"),
        ((50, 500), (1, 5), "never rise"),
        ((50, 500), (5, 0), "at least 1"),
    ],
)
def test_bad_stages(samples, keep, message):
    with pytest.raises(ValueError, match=message):
        Stages(samples, keep)


# --- sequential tests ----------------------------------------------------------------------------------------------


def random_draws(seed: int, draws: int = 6, candidates: int = 5, dims: int = 12):
    """Residuals and predictions of a made-up network: errors (S, K) and distances (S, K, K)."""
    rng = np.random.default_rng(seed)
    predictions = rng.normal(size=(draws, candidates, dims)) * rng.uniform(0.1, 1, size=(draws, 1, 1))
    noise = predictions[:, :1] + rng.normal(size=(draws, 1, dims)) * rng.uniform(0.2, 1, size=(draws, 1, 1))
    errors = np.square(noise - predictions).mean(2).astype(np.float32)
    distances = np.square(predictions[:, :, None] - predictions[:, None]).mean(3).astype(np.float32)
    return errors, distances


def reversal_of(rule, state, current, best):
    return rule.reversal([state], [current], np.array([best]))[0]


GRID = np.array([4.0, 1.0, 6.0, 3.0, 0.0, 5.0, 2.0, 9.0, 8.0, 7.0])  # places of the draws on the time axis


def rounds_of(errors, distances, weights, stops, total, dims=12, active=None):
    """What a rule is shown at ``stops``, by plain loops."""
    active = np.arange(errors.shape[1]) if active is None else active
    for first, last in zip([0, *stops], stops, strict=False):
        yield Round(
            "l2",
            last,
            total,
            dims,
            active,
            (weights[:last, None] * errors[:last, active]).mean(0),
            -GRID[first:last],
            weights[first:last],
            errors[first:last, active],
            distances[first:last][:, active][:, :, active],
        )


@given(st.integers(0, 2**32), st.lists(st.integers(1, 6), min_size=1, max_size=4, unique=True), st.booleans())
@settings(deadline=None)
def test_reversal_of_the_likelihood_ratio_is_the_formula(seed, stops, weighted):
    errors, distances = random_draws(seed)
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, 6) if weighted else np.ones(6)
    rule, n = LikelihoodRatio(inflation=3.0), max(stops)
    state = rule.start(5)
    for current in rounds_of(errors, distances, weights, sorted(stops), total=10):
        best = int(np.argmin(current.scores_A))
        reversal = reversal_of(rule, state, current, best)
        rule.remember([state], [current], [np.ones(5, dtype=bool)])
    for k in range(5):
        if k == best:
            continue
        difference = variance = misfit_dd = misfit_dg = misfit_gg = 0.0
        for j in range(n):
            d, g, s2 = float(errors[j, k]) - float(errors[j, best]), float(distances[j, best, k]), errors[j, best]
            difference += weights[j] * d
            variance += weights[j] ** 2 * 4 * s2 * g / 12
            misfit_dd, misfit_dg, misfit_gg = (
                misfit_dd + d * d / (4 * s2 * g / 12),
                misfit_dg + d * 12 / (4 * s2),
                misfit_gg + g * 12 / (4 * s2),
            )
        # c is 3 here unless the differences vary more than that, which is measured over all rivals
        expected = scipy.stats.norm.cdf(-difference / np.sqrt(3.0 * variance * (1 - n / 10)))
        at_least_three = scipy.stats.norm.cdf(-difference / np.sqrt(30.0 * variance * (1 - n / 10)))
        low, high = sorted([expected, at_least_three])
        assert low * (1 - 1e-5) <= reversal[k] <= high * (1 + 1e-5)
        if n == 1:
            assert reversal[k] == pytest.approx(expected, rel=1e-5)


@given(st.integers(0, 2**32), st.integers(2, 6), st.booleans())
@settings(deadline=None)
def test_reversal_of_the_paired_test_is_the_formula(seed, n, weighted):
    errors, distances = random_draws(seed)
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, 6) if weighted else np.ones(6)
    rule, order = PairedTest(), sorted(range(n), key=lambda j: GRID[j])
    state = rule.start(5)
    for current in rounds_of(errors, distances, weights, sorted({max(1, n // 2), n}), total=10):
        best = int(np.argmin(current.scores_A))
        reversal = reversal_of(rule, state, current, best)
    squares, mean = 0.0, {}
    for k in set(range(5)) - {best}:
        d = [weights[j] * (float(errors[j, k]) - float(errors[j, best])) for j in order]
        mean[k] = sum(d) / n
        squares += sum((b - a) ** 2 for a, b in itertools.pairwise(d))
    variance = squares / 2 / (n - 1) / 4  # of one draw, pooled over the four rivals
    for k, m in mean.items():
        t = m / np.sqrt(variance / n * (1 - n / 10))
        freedom = 2 * (n - 1) ** 2 / (3 * n - 4) * 16 / 7
        assert reversal[k] == pytest.approx(scipy.stats.t.sf(t, df=freedom), rel=1e-4, abs=1e-12)


@pytest.mark.parametrize(("n", "rivals"), [(2, 1), (3, 4), (8, 9), (20, 99)])
def test_degrees_of_freedom_of_the_paired_test(n, rivals):
    """A variance estimate with f degrees of freedom has a squared coefficient of variation of 2 / f."""
    rng = np.random.default_rng(0)
    errors = rng.standard_normal((20_000, n, rivals + 1))
    differences = errors[:, :, 1:] - errors[:, :, :1]
    pooled = np.square(np.diff(differences, axis=1)).mean((1, 2)) / 2
    freedom = 2 * (n - 1) ** 2 / (3 * n - 4) * 4 * rivals / (rivals + 3)
    assert 2 / (pooled.var() / pooled.mean() ** 2) == pytest.approx(freedom, rel=0.1)


def test_a_trend_over_timesteps_is_no_uncertainty():
    """Draws that cover the time axis evenly know the mean of a trend; independent draws would not."""
    trend = np.linspace(0, 1, 8).astype(np.float32)
    errors = np.stack([np.zeros(8), 0.3 + trend], axis=1).astype(np.float32)
    scores, grid = errors.mean(0).astype(float), np.arange(8.0)
    current = Round("l2", 8, 10**9, 9, np.arange(2), scores, grid, np.ones(8), errors)
    rule = PairedTest()
    independent = scipy.stats.ttest_rel(errors[:, 1], errors[:, 0], alternative="greater").pvalue
    assert reversal_of(rule, rule.start(2), current, 0)[1] < independent / 50


@given(
    st.sampled_from([PairedTest, LikelihoodRatio]),
    st.floats(1e-6, 0.49),
    st.integers(0, 2**32),
    st.permutations(range(5)),
)
@settings(deadline=None)
def test_sequential_rules_keep_the_best_spend_less_than_alpha_and_ignore_the_order(kind, alpha, seed, order):
    errors, distances = random_draws(seed, draws=10)
    rule, order = kind(alpha), np.array(order)
    survivors = []
    for e, d in ((errors, distances), (errors[:, order], distances[:, order][:, :, order])):
        state, active, done, left = rule.start(5), np.arange(5), 0, []
        while done < 10 and len(active) > 1:
            stop = rule.next_stop(done, 10)
            *_, current = rounds_of(e, d, np.ones(10), [done, stop] if done else [stop], 10, active=active)
            stays = rule.survivors(state, current)
            assert stays[np.argmin(current.scores_A)]
            assert state.spent <= alpha * (1 + 1e-12)
            active, done = active[stays], stop
            left.append(active)
        survivors.append(left)
    assert len(survivors[0]) == len(survivors[1])
    for plain, permuted in zip(*survivors, strict=True):
        assert plain.tolist() == sorted(order[permuted])


@pytest.mark.parametrize(
    ("chances", "left"),
    [([0.03, 0.06], []), ([0.07], []), ([0.04, 0.07], [0.07]), ([0.06, 0.07], [0.06, 0.07]), ([0.11], [0.11])],
)
def test_the_last_duel_may_spend_all_of_alpha_and_others_half(chances, left):
    class Told(SequentialTest):
        def reversal(self, states, rounds, best_F):
            return np.array([[1.0, *chances]])

    rule, count = Told(alpha=0.1), len(chances) + 1
    state = rule.start(count)
    stays = rule.survivors(state, shown(1, np.arange(count), np.arange(count, dtype=float)))
    assert stays.tolist() == [True, *(chance in left for chance in chances)]
    assert state.spent == pytest.approx(sum(chances) - sum(left))


@pytest.mark.parametrize("rule", [PairedTest(0.2), LikelihoodRatio(0.2)], ids=["pairs", "likelihood"])
def test_candidates_that_predict_the_same_stay(rule):
    """Their differences are zero, and so are the variances."""
    errors, distances = random_draws(0)
    errors[:, 1], distances[:, 1], distances[:, :, 1] = errors[:, 0], distances[:, 0], distances[:, :, 0]
    state = rule.start(5)
    for current in rounds_of(errors, distances, np.ones(6), [2, 4, 5], total=6, active=np.arange(2)):
        assert rule.survivors(state, current).all()


@pytest.mark.parametrize("loss", ["l1", "huber"])
def test_noise_of_other_losses(loss):
    """The standard deviation that the rule assumes is that of simulated differences, for predictions that are close."""
    rng = np.random.default_rng(0)
    dims, scale = 256, {"l1": 0.7, "huber": 0.3}[loss]
    value = {"l1": np.abs, "huber": lambda x: np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)}[loss]
    shift = 0.05 * rng.normal(size=dims)
    residual = scale * rng.normal(size=(4000, dims))
    e_best, e_rival = value(residual).mean(1), value(residual + shift).mean(1)
    assumed = []
    for pair in zip(e_best, e_rival, strict=True):
        errors = np.array([pair], dtype=np.float32)
        distances = np.full((1, 2, 2), np.square(shift).mean(), dtype=np.float32)
        current = Round(
            loss, 1, 10**9, dims, np.arange(2), errors[0].astype(float), np.zeros(1), np.ones(1), errors, distances
        )
        rule = LikelihoodRatio()
        assumed.append((pair[1] - pair[0]) / -scipy.special.ndtri(reversal_of(rule, rule.start(2), current, 0)[1]))
    assert np.sqrt(np.mean(np.square(assumed))) == pytest.approx(np.std(e_rival - e_best), rel=0.1)


@pytest.mark.parametrize("alpha", [0, 0.5, -0.1, 1, float("nan")])
@pytest.mark.parametrize("kind", [PairedTest, LikelihoodRatio])
def test_bad_alpha(kind, alpha):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: alpha {alpha}, expected a probability in \(0, 0.5\)"):
        kind(alpha)


def test_other_bad_settings():
    with pytest.raises(ValueError, match=r"growth 0\.9"):
        PairedTest(growth=0.9)
    with pytest.raises(ValueError, match="inflation -1"):
        LikelihoodRatio(inflation=-1)
    with pytest.raises(ValueError, match="loss 'kl' is no distance"):
        LikelihoodRatio().check("kl")


@given(st.floats(1, 3), st.integers(1, 500))
def test_stops_grow(growth, total):
    rule, done, stops = PairedTest(growth=growth), 0, 0
    while done < total:
        after = rule.next_stop(done, total)
        assert done < after <= max(done + 1, done * growth)
        done, stops = after, stops + 1
    assert growth == 1 or stops <= 3 / (growth - 1) + 2 + np.log(total) / np.log(growth)
