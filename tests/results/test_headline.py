"""What a run amounts to, in words."""

import dataclasses
import doctest
import os
from datetime import datetime

import numpy as np
import pytest

from lightning_diffclf.errors import UserError
from lightning_diffclf.results import headline
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.headline import cards, details, names, sentence
from lightning_diffclf.results.predictions import to_table
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import claim, write_whole
from lightning_diffclf.results.stored import scan
from tests.results.made_up import made_up_outline, made_up_rows, proposed_rows

IDENTITY = {
    "recipe": {"elimination": {"class": "lightning_diffclf.classifier.sequential.LikelihoodRatio", "alpha": 0.01}},
    "module": {"class": "lightning_diffclf.modules.class_conditional_dit.ClassConditionalDiT"},
    "data": {"class": "lightning_diffclf.data.digits.DigitsDataModule"},
}


def run_of(folder, rows, classes=5, identity=IDENTITY, info=None, **outline) -> Evaluation:
    found = made_up_outline(classes, **outline)
    date = {"date": "2026-03-01"} if info is None else info
    settings = Settings(identity, found.to_info() | {"candidate_names": list(found.class_names)} | date)
    write_whole(to_table(list(rows)), settings, claim(folder, settings))
    return Evaluation.read(folder)


def test_examples():
    assert doctest.testmod(headline).failed == 0


def test_a_sentence_says_who_what_how_well_at_what_cost_and_when(tmp_path):
    rows = list(made_up_rows(200, 5))
    run = run_of(tmp_path / "run", rows)
    right = 100 * np.mean([row.prediction == row.label for row in rows])
    nfe = np.mean([row.nfe for row in rows])
    said = sentence(run)
    assert said.startswith(
        "ClassConditionalDiT classified 200 images of Digits by LikelihoodRatio and at most 20 draws per candidate: "
        f"{right:.1f} % right (95 % interval "
    )
    assert said.endswith(
        f"), with {nfe:.1f} network calls per image, {100 / nfe:.1f} × fewer than the 100 of all draws of all "
        "candidates, on 1 March 2026."
    )
    everything = [dataclasses.replace(row, draws_K=np.full(5, 20, np.int32), nfe=100, label=None) for row in rows]
    said = sentence(run_of(tmp_path / "all", everything))
    assert said == (
        "ClassConditionalDiT classified 200 images of Digits by all of 20 draws per candidate: 100 network calls per "
        "image, on 1 March 2026."
    )


def test_a_proposal_saves_what_it_leaves_out(tmp_path):
    rows = list(proposed_rows(made_up_rows(60, 5)))
    summary = run_of(tmp_path / "run", rows, proposes=True).summary
    assert summary.exhaustive_nfe == 60 * 5 * 20
    assert summary.numbers()["speedup"] == pytest.approx(6000 / sum(row.nfe for row in rows))
    own = run_of(tmp_path / "own", rows).summary  # images that bring their own candidates
    assert own.exhaustive_nfe == 20 * sum(len(row.candidates_K) for row in rows)


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        (IDENTITY, ("ClassConditionalDiT", "Digits", "LikelihoodRatio")),
        (
            {
                "module": {"class": "x.ZeroShotStableDiffusion", "pretrained": "org/stable-diffusion-2-base"},
                "data": {"class": "x.ZeroShotDataModule", "name": "pets", "root": "/data"},
            },
            ("stable-diffusion-2-base", "pets", None),
        ),
        ({"data": {"class": "x.ZeroShotDataModule", "name": "folder", "root": "/data/birds/"}}, (None, "birds", None)),
        ({"module": 3, "data": {"class": None, "root": 5}, "recipe": {"elimination": "x"}}, (None, None, None)),
        ({}, (None, None, None)),
    ],
)
def test_names_are_as_people_say_them(identity, expected):
    assert names(identity) == expected


def test_there_are_six_numbers_for_every_kind_of_run(tmp_path):
    rows = list(made_up_rows(60, 5))
    everything = [dataclasses.replace(row, draws_K=np.full(5, 20, np.int32), nfe=100) for row in rows]
    unlabelled = [dataclasses.replace(row, label=None) for row in rows]
    kinds = {
        "labelled": (rows, {}), "few": (rows[:20], {}), "unlabelled": (unlabelled, {}), "all": (everything, {}),
        "all unlabelled": ([dataclasses.replace(row, label=None) for row in everything], {}),
        "abstains": (rows, {"abstains": True}), "proposes": (proposed_rows(rows), {"proposes": True}),
        "many": (made_up_rows(60, 120), {"classes": 120}),
    }  # fmt: skip
    second = {}
    for name, (some, others) in kinds.items():
        run = run_of(tmp_path / name, some, **others)
        found = cards(run)
        assert len(found) == 6, name
        assert len({line.name for line in found}) == 6, name
        assert all(line.value and line.note for line in found)
        second[name] = found[1].name
        if name == "labelled":
            ece = run.probabilities["calibrated"].numbers()["ece"]
            assert ("calibration error", f"{100 * ece:.1f} %") in [line[:2] for line in found]
            raw = run.probabilities["configured"].numbers()["ece"]
            assert ("ECE, configured", f"{raw:.4f}") in [line[:2] for line in details(run)]
            saved = run.summary.numbers()["seconds"] * (run.summary.numbers()["speedup"] - 1)
            assert f"some {saved:.1f} s saved" in found[3].note
    assert second["labelled"] == "mean per class"
    assert second["abstains"] == "answered"
    assert second["proposes"] == "right class proposed"
    assert second["many"] == "top 5"


def test_runs_of_earlier_versions_have_the_date_of_their_settings(tmp_path):
    run = run_of(tmp_path / "run", made_up_rows(5, 5), info={})
    noon = datetime(2025, 7, 14, 12).timestamp()
    os.utime(tmp_path / "run" / "settings.json", (noon, noon))
    assert sentence(run).endswith(", on 14 July 2025.")
    strange = run_of(tmp_path / "strange", made_up_rows(5, 5), info={"date": 7})
    with pytest.raises(UserError, match=r"settings.json has date 7, expected one such as '2026-11-28'"):
        sentence(strange)


def test_decisions_counted_as_they_are_written_come_to_what_a_report_says(tmp_path):
    read = run_of(tmp_path, made_up_rows(120, 5))
    watching = Evaluation(read.path, read.settings)
    watch = watching.watch()
    for table in scan(tmp_path):
        for begin in range(0, len(table), 50):
            watch(table.slice(begin, 50))
    assert details(watching) == details(read)
