"""Reading ahead: in order, and no more of it than memory should hold. What is read is tested in test_store.py."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_diffclf.results.parts import AHEAD_BYTES, BATCH_BYTES, ahead


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2 * AHEAD_BYTES), max_size=40))
def test_results_come_in_order_and_wait_within_bounds(sizes):
    begun, most = [], 0

    def work(number):
        begun.append(number)
        return number

    def items():
        nonlocal most
        for number in range(len(sizes)):
            yield number
            waiting = sum(sizes[len(given_out) : number])  # begun or in a batch, and not asked for yet
            most = max(most, waiting)

    given_out = []
    for number in ahead(work, items(), sizes):
        given_out.append(number)
    assert given_out == list(range(len(sizes)))
    assert sorted(begun) == given_out
    assert most <= AHEAD_BYTES + BATCH_BYTES + max(sizes, default=0)


def test_an_error_comes_instead_of_its_batch():
    results = ahead(lambda number: 1 // number, [1, 2, 0, 3], [BATCH_BYTES, BATCH_BYTES, 1, 1])
    assert [next(results), next(results)] == [1, 0]
    with pytest.raises(ZeroDivisionError):
        next(results)
