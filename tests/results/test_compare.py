import dataclasses
import json

import pytest

from lightning_diffclf.cli import main
from lightning_diffclf.results.compare import compare
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.statistics import mcnemar, wilson
from tests.results.made_up import made_up_rows, made_up_run, proposed_rows


@pytest.fixture
def two(tmp_path):
    rows = list(made_up_rows(200, 5))
    others = [
        dataclasses.replace(row, prediction=(row.prediction + 1) % 5, nfe=7) if i % 10 == 0 else row
        for i, row in enumerate(rows)
    ]
    made_up_run(tmp_path / "a", rows[:190], 5)
    made_up_run(tmp_path / "b", others[20:], 5)
    return tmp_path, rows, others


def test_counts_are_those_of_a_plain_loop(two):
    folder, rows, others = two
    found = compare(Evaluation.read(folder / "a"), Evaluation.read(folder / "b"))
    pairs = list(zip(rows, others, strict=True))[20:190]
    first = [a.prediction == a.label for a, _ in pairs]
    second = [b.prediction == b.label for _, b in pairs]
    assert (found.images, found.missing) == (170, 30)
    assert found.agreement == wilson(sum(a.prediction == b.prediction for a, b in pairs), 170)
    for numbers, right in ((found.first, first), (found.second, second)):
        interval = numbers["accuracy"], numbers["accuracy_low"], numbers["accuracy_high"]
        assert interval == wilson(sum(right), 170)
    assert found.first["nfe_per_image"] == pytest.approx(sum(a.nfe for a, _ in pairs) / 170)
    assert found.second["nfe_per_image"] == pytest.approx(sum(b.nfe for _, b in pairs) / 170)
    assert found.only_first == sum(a and not b for a, b in zip(first, second, strict=True))
    assert found.only_second == sum(b and not a for a, b in zip(first, second, strict=True))
    assert found.p_value == mcnemar(found.only_first, found.only_second)
    assert 0 < found.only_second < found.only_first
    assert found.both + found.neither + found.only_first + found.only_second == 170


def test_the_command(two, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, rows, others = two
    main(["compare", str(folder / "a"), str(folder / "b"), "--out", str(folder / "plots")])
    printed = capsys.readouterr().out
    assert "McNemar, exact p" in printed
    first, second = (sum(row.nfe for row in run[20:190]) for run in (rows, others))
    assert second < first
    assert f"│ saved beside the other │ │ {1 - second / first:.1%} of the calls, 0.0% of the time │" in " ".join(
        printed.split()
    )
    assert "30 images are in one of them only" in printed
    numbers = json.loads((folder / "plots" / "comparison.json").read_text())
    assert numbers["images"] == 170
    assert numbers["first"]["accuracy_low"] < numbers["first"]["accuracy"] < numbers["first"]["accuracy_high"]
    for name in ("cost", "disagreement"):
        assert (folder / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (folder / "plots" / f"{name}.svg").read_text().startswith("<svg")


def test_runs_that_cannot_be_compared(two):
    folder, rows, _ = two
    first = Evaluation.read(folder / "a")
    made_up_run(folder / "c", rows[195:], 5)
    with pytest.raises(ValueError, match="have no image in common"):
        compare(first, Evaluation.read(folder / "c"))
    made_up_run(folder / "d", [dataclasses.replace(rows[3], label=(rows[3].label + 1) % 5)], 5)
    with pytest.raises(ValueError, match="image '3' has label"):
        compare(first, Evaluation.read(folder / "d"))
    made_up_run(folder / "e", rows[:3], 6)
    with pytest.raises(ValueError, match="have different classes"):
        compare(first, Evaluation.read(folder / "e"))


def test_runs_without_labels(two):
    folder, rows, _ = two
    made_up_run(folder / "p", [dataclasses.replace(row, label=None) for row in rows], 5)
    found = compare(Evaluation.read(folder / "a"), Evaluation.read(folder / "p"))
    assert (found.images, found.labelled, found.p_value) == (190, 0, 1.0)
    assert "accuracy" not in found.second
    main(["compare", str(folder / "a"), str(folder / "p"), "--out", str(folder / "plots")])


def test_how_often_a_proposal_keeps_what_the_other_run_decides(two, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, rows, others = two
    kept = list(proposed_rows(rows))
    made_up_run(folder / "s", kept[:190], 5, proposes=True)
    found = compare(Evaluation.read(folder / "s"), Evaluation.read(folder / "b"))
    hits = [b.prediction in a.candidates_K for a, b in zip(kept, others, strict=True)][20:190]
    assert found.first_kept == wilson(sum(hits), 170)
    assert 140 < sum(hits) < 170
    assert found.second_kept is None
    assert compare(Evaluation.read(folder / "b"), Evaluation.read(folder / "s")).second_kept == found.first_kept
    main(["compare", str(folder / "s"), str(folder / "b"), "--out", str(folder / "out")])
    printed = capsys.readouterr().out
    assert "keeps the other's decision" in printed
    assert "search_nfe_per_image" in printed
    numbers = json.loads((folder / "out" / "comparison.json").read_text())
    assert numbers["first_kept"]["value"] == sum(hits) / 170
    assert numbers["second_kept"] is None
