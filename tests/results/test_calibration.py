import dataclasses

import numpy as np
import pytest

from lightning_diffclf import Posterior
from lightning_diffclf.results.calibration import calibrate, crossfitted, fit, fold_of, judge
from lightning_diffclf.results.statistics import ece
from tests.results.made_up import made_up_rows


@pytest.mark.parametrize("sharp", [0.2, 1.0, 5.0])
def test_the_temperature_of_calibrated_rows_is_found(sharp):
    rows = list(made_up_rows(2000, 6, sharp=sharp))
    assert fit(rows, range(6), Posterior()).temperature == pytest.approx(sharp, rel=0.1)
    raw = judge(rows, range(6), [Posterior()] * 2000)
    found = calibrate(rows, range(6), Posterior())
    assert found.calibrated_ece < 0.04
    if sharp != 1:
        assert ece(raw.confidence, raw.right) > 0.1
        assert found.calibrated_nll < raw.scores()["nll"]
        assert found.calibrated_brier < raw.scores()["brier"]


def test_no_image_is_judged_by_a_temperature_that_it_was_fitted_to():
    rows = list(made_up_rows(300, 4))
    posteriors = crossfitted(rows, range(4), Posterior())
    for i in (0, 7, 100):
        others = [row for row in rows if fold_of(row.id) != fold_of(rows[i].id)]
        assert posteriors[i] == fit(others, range(4), Posterior())
        changed = [dataclasses.replace(row, label=(row.label + 1) % 4) if row is rows[i] else row for row in rows]
        assert crossfitted(changed, range(4), Posterior())[i] == posteriors[i]
    assert len({fold_of(row.id) for row in rows}) == 5


def test_judged_is_what_a_plain_softmax_says():
    rows = [dataclasses.replace(row, label=row.label % 3) for row in made_up_rows(20, 5, sharp=2.0)]
    judged = judge(rows, [0, 1, 1, 2, 0], [Posterior(temperature=2.0)] * 20)
    for i, row in enumerate(rows):
        logits = -row.differences_K.astype(float) * 64 / 2
        p_K = np.exp(logits) / np.exp(logits).sum()
        p_C = np.array([p_K[0] + p_K[4], p_K[1] + p_K[2], p_K[3]])
        assert judged.confidence[i] == pytest.approx(p_C.max())
        assert judged.squares[i] == pytest.approx(np.square(p_C).sum())
        assert judged.label[i] == pytest.approx(p_C[row.label])
        assert judged.right[i] == (p_C.argmax() == row.label)


def test_images_that_cannot_tell_are_left_out():
    rows = list(made_up_rows(120, 4))
    expected = fit(rows[:100], range(4), Posterior())
    strange = [
        *rows[:100],
        dataclasses.replace(rows[100], candidates_K=np.array([(rows[100].label + 1) % 4], np.int32)),
        dataclasses.replace(rows[101], prediction=None, differences_K=np.full(4, np.inf, np.float32)),
    ]
    strange[100] = dataclasses.replace(strange[100], differences_K=np.zeros(1, np.float32))
    assert fit(strange, range(4), Posterior()).temperature == pytest.approx(expected.temperature)
    assert fit([], range(4), Posterior()) == Posterior()
    assert calibrate(rows[:49], range(4), Posterior()) is None
