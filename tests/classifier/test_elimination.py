import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_diffclf import Stages
from lightning_diffclf.classifier import Round


@given(st.lists(st.integers(1, 120), min_size=1, max_size=4, unique=True))
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


def test_stages_keep_the_lowest_scores():
    rule = Stages((2, 8), (2, 1))
    scores = np.array([0.4, 0.1, 0.3, 0.2])
    assert rule.survivors(None, Round(2, np.arange(4), scores)).tolist() == [False, True, False, True]
    assert rule.survivors(None, Round(8, np.array([1, 3]), np.array([0.3, 0.2]))).tolist() == [False, True]


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
