import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from lightning_diffclf.commands import main
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.ood import Foreignness, Levels, auroc, average_precision, detect, fpr95
from tests.results.made_up import made_up_outline, made_up_rows, made_up_run

numbers = st.lists(st.integers(0, 8).map(float), min_size=2, max_size=30).map(np.array)  # with ties


@given(numbers, numbers)
@settings(deadline=None)
def test_detection_is_that_of_sklearn(known, foreign):
    truth, values = np.repeat([0, 1], [len(known), len(foreign)]), np.concatenate([known, foreign])
    assert auroc(known, foreign).value == pytest.approx(roc_auc_score(truth, values))
    assert average_precision(known, foreign) == pytest.approx(average_precision_score(truth, values))
    # known images are positive, and pass where minus the number is high
    false, true, _ = roc_curve(1 - truth, -values, drop_intermediate=False)
    assert fpr95(known, foreign) == pytest.approx(false[np.flatnonzero(true >= 0.95 - 1e-12)[0]])


def test_the_interval_is_delongs():
    rng = np.random.default_rng(0)
    known, foreign = rng.normal(size=30).round(1), rng.normal(1, 1, 20).round(1)
    beats = (foreign[:, None] > known) + 0.5 * (foreign[:, None] == known)  # with loops over pairs
    variance = beats.mean(1).var(ddof=1) / 20 + beats.mean(0).var(ddof=1) / 30
    half = norm.ppf(0.975) * np.sqrt(variance)
    assert auroc(known, foreign) == pytest.approx((beats.mean(), beats.mean() - half, min(1, beats.mean() + half)))


def test_intervals_cover():
    rng, truth, inside = np.random.default_rng(1), norm.cdf(1 / np.sqrt(2)), 0
    for _ in range(300):
        found = auroc(rng.normal(size=60), rng.normal(1, 1, 40))
        inside += found.low <= truth <= found.high
    assert 0.91 < inside / 300 < 0.985
    found = detect(rng.normal(size=200), rng.normal(2, 1, 150))
    for one in vars(found).values():
        assert one.low < one.value < one.high
    perfect = auroc(np.zeros(50), np.ones(20))
    assert perfect == (1, pytest.approx(0.025 ** (1 / 20)), 1)  # Clopper-Pearson of 20 in 20
    assert auroc(np.ones(50), np.zeros(20)).value == 0
    with pytest.raises(UserError, match="0 known and 2 foreign images"):
        detect(np.array([]), np.ones(2))


def test_numbers_of_an_image_by_hand():
    rows = list(made_up_rows(40, 6, labelled=False))
    for null in (None, 5):
        foreign = Foreignness(made_up_outline(6), null)
        for chunk in (rows[:7], rows[7:]):
            foreign.update(chunk)
        found = foreign.scores()
        for i, row in enumerate(rows):
            conditions = [k for k in range(6) if k != null]
            best = min(conditions, key=lambda k: row.differences_K[k])
            d = row.differences_K.astype(float) - row.differences_K[best]
            assert found["margin"][i] == -row.margin
            assert found["error"][i] == row.scores_K[best]
            others = [d[k] for k in conditions if k != best]
            assert found["gap"][i] == pytest.approx(-np.mean(others) / row.scores_K[best])
            if null is not None:
                assert found["unconditional"][i] == pytest.approx(-d[5] / row.scores_K[best])
        assert ("unconditional" in found) == (null is not None)


def test_an_image_without_an_answer_is_the_most_foreign():
    row = next(made_up_rows(1, 4))
    none = {"prediction": None, "margin": np.inf, "scores_K": np.full(4, np.inf)}
    foreign = Foreignness(made_up_outline(4))
    foreign.update([dataclasses.replace(row, **none, differences_K=np.full(4, np.inf, np.float32))])
    assert foreign.scores()["gap"][0] == foreign.scores()["error"][0] == np.inf


def test_levels_are_standardised_by_other_folds():
    rng = np.random.default_rng(3)
    known, foreign = Levels.__new__(Levels), Levels.__new__(Levels)
    known.log_BS, known.folds_B = rng.normal([0, 5], [1, 0.1], (500, 2)), np.arange(500) % 5
    foreign.log_BS, foreign.folds_B = np.array([[0.0, 5.3], [3.0, 5.0]]), np.array([0, 3])
    assert known.distances(known).mean() == pytest.approx(1, abs=0.1)
    assert foreign.distances(known) == pytest.approx([4.5, 4.5], rel=0.15)  # z = 0 and 3, or 3 and 0
    changed = known.log_BS.copy()
    changed[::5] += 100  # fold 0
    known_changed = Levels.__new__(Levels)
    known_changed.log_BS, known_changed.folds_B = changed, known.folds_B
    assert foreign.distances(known_changed)[0] == foreign.distances(known)[0]


def test_the_command(tmp_path, capsys):
    known = made_up_run(tmp_path / "known", made_up_rows(60, 5), 5)
    odd = [dataclasses.replace(row, label=None, margin=row.margin / 50, id=f"o{row.id}") for row in made_up_rows(40, 5)]
    foreign = made_up_run(tmp_path / "foreign", odd, 5)
    main(["ood", str(known), str(foreign), "--out", str(tmp_path / "ood.json"), "--unconditional", "kind 4 <&>"])
    told = json.loads((tmp_path / "ood.json").read_text())["scores"]
    assert told["margin"]["auroc"]["value"] > 0.9
    assert "40 foreign images among 60 known ones" in capsys.readouterr().out
    assert set(told) == {"margin", "probability", "error", "gap", "unconditional"}
    for flags, message in (
        ([str(tmp_path / "none")], "run: no settings.json"),
        ([str(known)], "ood: .* is both, known and foreign images, expected two runs"),
        ([str(foreign), "--unconditional", "nothing"], "unconditional: no candidate 'nothing'"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["ood", str(known), *flags])
    other = made_up_run(tmp_path / "other", odd, 5, recipe={"loss": "l1"})
    with pytest.raises(SystemExit, match=r"the run of known images .* was made with other ones .*recipe"):
        main(["ood", str(known), str(other)])
