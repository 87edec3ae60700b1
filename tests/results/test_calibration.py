import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import softmax

from lightning_diffclf import Posterior
from lightning_diffclf.results import calibration
from lightning_diffclf.results.calibration import CrossFitted, Sample, calibrate, fold_of
from lightning_diffclf.results.columns import Columns
from lightning_diffclf.results.predictions import to_table
from lightning_diffclf.results.summary import Outline, Summary, judge
from tests.results.made_up import made_up_outline, made_up_rows


def sample_of(rows, outline: Outline) -> Sample:
    return sample_of_chunks([rows], outline)


def sample_of_chunks(chunks, outline: Outline) -> Sample:
    sample = Sample(outline)
    for chunk in chunks:
        sample.update(chunk)
    return sample


@pytest.mark.parametrize("sharp", [0.2, 1.0, 5.0])
def test_the_temperature_of_calibrated_rows_is_found(sharp):
    rows, outline = list(made_up_rows(2000, 6, sharp=sharp)), made_up_outline(6)
    found = calibrate(sample_of(rows, outline), [rows])
    assert found.temperature == pytest.approx(sharp, rel=0.1)
    assert found.calibrated_ece < 0.04
    if sharp != 1:
        raw = Summary.of(outline, [rows]).numbers()
        assert raw["ece"] > 0.1
        assert found.calibrated_nll < raw["nll"]
        assert found.calibrated_brier < raw["brier"]


def test_chunks_of_any_size_and_kind_give_the_same():
    rows, outline = list(made_up_rows(300, 6)), made_up_outline(6)
    whole = calibrate(sample_of(rows, outline), [rows])
    table = to_table(rows[::-1])
    chunks = [table.slice(0, 1), table.slice(1, 0), *table.slice(1).to_batches(max_chunksize=70)]
    found = calibrate(sample_of_chunks(chunks, outline), chunks)
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(whole), rel=1e-12)


def test_temperatures_are_fitted_to_some_images_only(monkeypatch):
    """Those with the lowest digests of their ids, whatever the order and the chunks."""
    rows, outline = list(made_up_rows(200, 4)), made_up_outline(4)
    monkeypatch.setattr(calibration, "ENOUGH", 30)
    sample = Sample(outline)
    for row in rows[::-1]:
        sample.update([row])
    first = sorted(rows, key=lambda row: calibration.order_of(row.id))[:30]
    differences_BC = torch.tensor(np.stack([row.differences_K for row in first]))
    expected = Posterior().fit(differences_BC, torch.tensor([row.label for row in first]), 64)
    assert sample.fit().temperature == pytest.approx(expected.temperature)
    assert len(sample._examples) <= 60  # what it keeps does not grow with the number of images


@pytest.mark.parametrize("chunk", [1, 7, 200])
def test_what_is_kept_is_enough_whatever_fold_is_left_out(chunk, monkeypatch):
    """Also where folds are of very different sizes."""
    rows, outline = list(made_up_rows(400, 4)), made_up_outline(4)
    rows = [row for i, row in enumerate(rows) if fold_of(row.id) == 2 or i % 6 == 0]
    monkeypatch.setattr(calibration, "ENOUGH", 20)
    sample = sample_of_chunks([rows[a : a + chunk] for a in range(0, len(rows), chunk)], outline)
    for fold in range(calibration.FOLDS):
        first = sorted((row for row in rows if fold_of(row.id) != fold), key=lambda row: calibration.order_of(row.id))
        differences_BC, labels = np.stack([row.differences_K for row in first[:20]]), [row.label for row in first[:20]]
        assert sample.fit(leave_out=fold) == Posterior().fit(differences_BC, np.array(labels), 64)


def test_no_image_is_judged_by_a_temperature_that_it_was_fitted_to():
    rows, outline = list(made_up_rows(300, 4)), made_up_outline(4)
    posteriors = CrossFitted(sample_of(rows, outline)).posteriors
    for i in (0, 7, 100):
        fold = fold_of(rows[i].id)
        others = [row for row in rows if fold_of(row.id) != fold]
        assert posteriors[fold] == sample_of(others, outline).fit()
        changed = [dataclasses.replace(row, label=(row.label + 1) % 4) if row is rows[i] else row for row in rows]
        assert CrossFitted(sample_of(changed, outline)).posteriors[fold] == posteriors[fold]
    assert len({fold_of(row.id) for row in rows}) == 5


def test_judged_is_what_a_plain_softmax_says():
    classes = [0, 1, 1, 2, 0]
    outline = dataclasses.replace(made_up_outline(3), classes=tuple(classes))
    rows = [
        dataclasses.replace(row, label=row.label % 3, prediction=classes[row.prediction])
        for row in made_up_rows(20, 5, sharp=2.0)
    ]
    judged = judge(Columns(rows, Sample.COLUMNS), outline, Posterior(temperature=2.0))
    for i, row in enumerate(rows):
        d = row.differences_K.astype(float)
        p_C = softmax(-np.array([min(d[0], d[4]), min(d[1], d[2]), d[3]]) * 64 / 2)
        assert judged.confidence[i] == pytest.approx(p_C.max())
        assert judged.squares[i] == pytest.approx(np.square(p_C).sum())
        assert judged.label[i] == pytest.approx(p_C[row.label])
        assert judged.right[i] == (p_C.argmax() == row.label)


def test_every_image_is_judged_by_the_temperature_of_its_fold():
    rows, outline = list(made_up_rows(100, 4)), made_up_outline(4)
    crossfitted = CrossFitted(sample_of(rows, outline))
    for chunk in (rows[:30], rows[30:]):
        crossfitted.update(chunk)
    for i, row in enumerate(rows):
        expected = judge(Columns([row], Sample.COLUMNS), outline, crossfitted.posteriors[fold_of(row.id)])
        for values_B, value in zip(crossfitted.judged, expected, strict=True):
            assert values_B[i] == pytest.approx(value[0], rel=1e-12)


def test_images_that_cannot_tell_are_left_out():
    rows, outline = list(made_up_rows(120, 4)), made_up_outline(4)
    expected = sample_of(rows[:100], outline).fit()
    other = np.array([(rows[100].label + 1) % 4], np.int32)
    strange = [
        *rows[:100],
        dataclasses.replace(rows[100], candidates_K=other, differences_K=np.zeros(1, np.float32)),
        dataclasses.replace(rows[101], prediction=None, differences_K=np.full(4, np.inf, np.float32)),
        dataclasses.replace(rows[102], label=None),
    ]
    assert sample_of(strange, outline).fit().temperature == pytest.approx(expected.temperature)
    assert sample_of([], outline).fit() == Posterior()
    assert calibrate(sample_of(rows[:49], outline), [rows[:49]]) is None


def test_few_candidates_of_many_classes_are_judged_as_all_would_be():
    """Places for candidates only, not for classes, give the probabilities of a softmax over all classes."""
    rng, classes = np.random.default_rng(0), np.array([3, 0, 3, 7, 1, 5, 0, 9])
    outline = dataclasses.replace(made_up_outline(10), classes=tuple(classes.tolist()))
    rows = []
    for row, count in zip(made_up_rows(40, 8), rng.integers(1, 6, 40), strict=True):
        chosen = rng.permutation(8)[:count].astype(np.int32)
        differences = rng.exponential(0.02, count).astype(np.float32)
        differences[rng.random(count) < 0.2] = np.inf
        rows.append(dataclasses.replace(row, candidates_K=chosen, differences_K=differences))
    judged, columns = judge(Columns(rows, Sample.COLUMNS), outline, Posterior()), Columns(rows, Sample.COLUMNS)
    assert columns.tried(outline.classes, 10).classes_BW.shape == (40, 5)
    for i, row in enumerate(rows):
        best_C = np.full(10, np.inf)
        np.minimum.at(best_C, classes[row.candidates_K], row.differences_K)
        p_C = softmax(-best_C * 64) if np.isfinite(best_C).any() else np.full(10, 0.1)
        assert judged.confidence[i] == pytest.approx(p_C.max())
        assert judged.label[i] == pytest.approx(p_C[row.label])
        assert judged.squares[i] == pytest.approx(np.square(p_C).sum())
        tried = columns.tried(outline.classes, 10).classes_BW[i]
        assert sorted(tried[tried >= 0]) == sorted(set(classes[row.candidates_K].tolist()))
