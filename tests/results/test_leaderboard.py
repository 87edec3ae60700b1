"""Runs of the same images, the best first; those of others are refused."""

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_diffclf.commands import main
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.leaderboard import board, names_of, to_html, to_markdown, write_leaderboard
from lightning_diffclf.results.statistics import holm, mcnemar, wilson
from tests.results.made_up import made_up_rows, made_up_run

DATA = {"data": {"class": "Folder", "root": "there", "size": 512}}


@pytest.fixture
def rows():
    return list(made_up_rows(120, 5))


def worse(rows, every: int):
    """Every n-th answer is another, and costs less."""
    return [
        replace(row, prediction=(row.prediction + 1) % 5, nfe=3) if int(row.id) % every == 0 else row for row in rows
    ]


def runs(folder: Path, **rows) -> dict[str, Evaluation]:
    return {name: Evaluation.read(made_up_run(folder / name, some, 5, **DATA)) for name, some in rows.items()}


def test_order_and_numbers_are_those_of_plain_loops(rows, tmp_path):
    found = board(
        runs(tmp_path, bad=worse(rows, 3), good=rows, fair=worse(rows, 20), part=worse(rows, 2)[:60]), "letters"
    )
    right = {
        "good": [row.prediction == row.label for row in rows],
        "fair": [row.prediction == row.label for row in worse(rows, 20)],
        "bad": [row.prediction == row.label for row in worse(rows, 3)],
    }
    part = sum(row.prediction == row.label for row in worse(rows, 2)[:60]) / 60
    shares = {name: sum(one) / 120 for name, one in right.items()} | {"part": part}
    assert [one.run for one in found.standings] == sorted(shares, key=lambda name: -shares[name])
    best = found.standings[0]
    assert (best.rank, best.behind, best.p_value) == (1, None, None)
    by_name = {one.run: one for one in found.standings}
    assert by_name["bad"].accuracy == wilson(sum(right["bad"]), 120)
    assert by_name["bad"].nfe_per_image == pytest.approx(sum(row.nfe for row in worse(rows, 3)) / 120)
    assert best.run == "good"
    pairs = {name: list(zip(right["good"], right[name], strict=True)) for name in ("fair", "bad")}
    p = [mcnemar(sum(a and not b for a, b in one), sum(b and not a for a, b in one)) for one in pairs.values()]
    assert [by_name[name].p_value for name in pairs] == pytest.approx(holm(p))
    assert by_name["part"].p_value is None  # other images


def test_equal_runs_share_a_rank_and_the_cheaper_comes_first(rows, tmp_path):
    found = board(runs(tmp_path, dear=rows, cheap=[replace(row, nfe=1) for row in rows], bad=worse(rows, 2)))
    assert [(one.rank, one.run) for one in found.standings] == [(1, "cheap"), (1, "dear"), (3, "bad")]
    assert found.standings[1].behind.value == 0
    assert found.standings[1].p_value == 1
    assert found.title == "Folder"


def test_networks_may_want_the_same_images_prepared_in_their_own_way(rows, tmp_path):
    here = Evaluation.read(made_up_run(tmp_path / "a", rows, 5, **DATA))
    data = {"class": "Folder", "root": "there", "preparation": {"size": 224}}
    there = Evaluation.read(made_up_run(tmp_path / "b", rows, 5, data=data))
    assert len(board({"a": here, "b": there}).standings) == 2


@pytest.mark.parametrize(
    ("identity", "classes", "message"),
    [
        (
            {"data": {"class": "Folder", "root": "elsewhere"}},
            5,
            r"'b' and 'a' .*data\.root: 'elsewhere' there, 'there' h",
        ),
        (DATA | {"corruption": {"kind": "jpeg"}}, 5, "corruption: "),
        (DATA, 6, r"classes: 6 \(kind 0 <&>, .* there, 5 "),
    ],
    ids=["data", "corruption", "classes"],
)
def test_runs_that_disagree_about_data_are_refused(rows, tmp_path, identity, classes, message):
    here = Evaluation.read(made_up_run(tmp_path / "a", rows, 5, **DATA))
    there = Evaluation.read(made_up_run(tmp_path / "b", list(made_up_rows(20, classes)), classes, **identity))
    with pytest.raises(ValueError, match=message):
        board({"a": here, "b": there})


def test_labels_have_to_agree_and_to_be_there(rows, tmp_path):
    others = [replace(row, label=(row.label + 1) % 5) for row in rows[:1]] + rows[1:]
    with pytest.raises(ValueError, match=r"image '0' has label . in one run, . in another"):
        board(runs(tmp_path, a=rows, b=others))
    with pytest.raises(ValueError, match="has no labels"):
        board(runs(tmp_path, c=[replace(row, label=None) for row in rows]))


def test_names_are_escaped_and_files_hold_the_same(rows, tmp_path):
    name = "<b>|x|</b> & *y*"
    both = [
        board({name: run, "plain": run2}, "<i>letters</i>") for run, run2 in [runs(tmp_path, a=rows, b=rows).values()]
    ]
    html, markdown = to_html(both), to_markdown(both)
    assert "<b>" not in html
    assert "&lt;b&gt;|x|&lt;/b&gt; &amp; *y*" in html
    assert "<script" not in html
    assert "<i>" not in html + markdown
    assert "| 1 | &lt;b>\\|x\\|&lt;/b> &amp; \\*y\\* |" in markdown
    assert len(re.findall("data:image/svg", html)) == 2
    paths = write_leaderboard(both, tmp_path / "page")
    assert [path.name for path in paths] == ["leaderboard.html", "leaderboard.md", "leaderboard.csv"]
    lines = list(csv.DictReader(io.StringIO(paths[2].read_text())))
    assert [line["run"] for line in lines] == [one.run for one in both[0].standings]
    assert [float(line["accuracy"]) for line in lines] == [one.accuracy.value for one in both[0].standings]


def test_the_command(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    for name, some in {"x": rows, "y": worse(rows, 2)}.items():
        made_up_run(tmp_path / name / "evaluation", some, 5, **DATA)
    main(["leaderboard", "x/evaluation", "y/evaluation", "--title", "letters", "--out", "page"])
    printed = capsys.readouterr().out
    assert printed.index("│ x ") < printed.index("│ y ")
    assert "letters" in Path("page/leaderboard.html").read_text()
    with pytest.raises(SystemExit, match=r"error: run: no settings\.json in 'nowhere'"):
        main(["leaderboard", "nowhere"])


def test_short_names():
    assert names_of(["runs/a/evaluation"]) == ["a/evaluation"]
    assert names_of(["a/x/evaluation", "b/x/evaluation"]) == ["a", "b"]
    assert names_of(["a", "a/b"]) == ["a", "b"]
