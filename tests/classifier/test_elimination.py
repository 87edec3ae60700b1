import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_diffclf import Stages
from lightning_diffclf.classifier import Round


def shown(done, active, scores, **more):
    return Round("l2", done, 100, 64, active, scores, **({"weights_R": np.ones(1)} | more))


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
