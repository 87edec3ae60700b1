"""Lines of candidates, against plain loops over the errors of a decision."""

import numpy as np
import pyarrow as pa
import pytest

from lightning_diffclf.results.predictions import from_table, to_table
from tests.results.test_predictions import CLASSES, decided


@pytest.mark.parametrize("ensemble", ["best", "mean"])
def test_lines_are_those_of_a_plain_loop(ensemble):
    results, rows = decided(ensemble)
    ends = set()
    for result, row in zip(results, rows, strict=True):
        trail, errors_KS = row.trail, result.errors_KS.double().numpy()
        assert trail["classes"] == row.top5.tolist()
        assert trail["classes"][0] == row.prediction
        stayed_K = result.draws_K.numpy()

        def mean_error(c, n, errors_KS=errors_KS, stayed_K=stayed_K):
            means = [errors_KS[k, :n].mean() for k in range(8) if c == CLASSES[k] and stayed_K[k] >= n]
            return (min if ensemble == "best" else np.mean)(means)

        for c, behind in zip(trail["classes"], trail["behind"], strict=True):
            stayed = stayed_K[c == CLASSES].max()
            draws = trail["draws"][: len(behind)]
            assert draws == sorted({*draws, 1, stayed})  # to the very draw at which it was dropped
            assert draws[-1] == stayed
            expected = [mean_error(c, n) - mean_error(row.prediction, n) for n in draws]
            np.testing.assert_allclose(behind, expected, atol=1e-7)
            ends.add(stayed)
        assert set(trail["behind"][0]) == {0.0}
    assert len(ends) > 3


def test_without_a_decision_there_are_no_lines():
    _, rows = decided("best", broken=range(8))
    assert [row.trail for row in rows] == [None] * 20
    _, rows = decided("best", broken=[3, 7])  # a class that is out from the first draw on
    for row in rows:
        line = row.trail["behind"][row.trail["classes"].index(1)]
        assert line == []


def test_lines_are_stored_and_earlier_files_have_none():
    _, rows = decided("best")
    rows[3].trail["behind"][1][0] = 0.1  # of which float32 has another
    table = to_table(rows)
    for row, found in zip(rows, from_table(table), strict=True):
        assert found.trail["draws"] == row.trail["draws"]
        assert found.trail["classes"] == row.trail["classes"]
        for a, b in zip(found.trail["behind"], row.trail["behind"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert [row.trail for row in from_table(table.drop_columns("trail"))] == [None] * 20
    assert table.nbytes - table.drop_columns("trail").nbytes < 20 * 600
    assert isinstance(table["trail"].type, pa.StructType)
