"""Lines through accuracies on logit axes, and runs beside them."""

import json
from pathlib import Path
from shutil import copy, copytree

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import beta

from lightning_diffclf.commands import run
from lightning_diffclf.commands.cells import folder_of
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.paper import LINES, TABLES
from lightning_diffclf.results.robustness import Counted, clopper_pearson, fit, read_timm, robustness
from tests.baselines.evaluation import evaluate
from tests.data.test_corruptions import Counting

ORDINARY = np.array([0.6, 0.7, 0.8, 0.9, 0.95])
LINE = expit(-3 + 1.5 * np.log(ORDINARY / (1 - ORDINARY)))  # logit(shifted) = -3 + 1.5 logit(ordinary)


def test_the_line_is_found_and_runs_stand_above_it():
    found = fit(np.append(ORDINARY, [1.0, 0.5]), np.append(LINE, [0.9, 0.0]))  # infinite logits are left out
    assert found == pytest.approx((1.5, -3.0, 5))
    known = [dict(zip("abcde", values.tolist(), strict=True)) for values in (ORDINARY, LINE)]
    one = robustness(known[0] | {"z": 0.5}, known[1], [(Counted("x", 90, 100), Counted("y", 60, 100))])
    [row] = one.runs.to_dict("records")
    assert one.models["model"].tolist() == list("abcde")
    assert row["expected"] == pytest.approx(LINE[3])
    assert row["effective"] == pytest.approx(0.6 - LINE[3])
    assert row["effective_low"] < row["effective"] < row["effective_high"]


@pytest.mark.parametrize(("right", "total"), [(0, 20), (20, 20), (352, 360)])
def test_intervals_are_clopper_and_pearsons(right, total):
    low = beta.ppf(0.0025, right, total - right + 1) if right else 0.0
    high = beta.ppf(0.9975, right + 1, total - right) if right < total else 1.0
    assert clopper_pearson(right, total) == pytest.approx((right / total, low, high))


def test_what_cannot_be_fitted_or_read(tmp_path):
    with pytest.raises(ValueError, match="fit: 2 models"):
        fit(ORDINARY[:2], LINE[:2])
    with pytest.raises(FileNotFoundError, match="results: no file"):
        read_timm(tmp_path / "no.csv")
    for text in ("model,top5\na,1\n", "model,top1\na,101\n", "model,top1\na,x\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=r"bad.csv', line 2: .*expected columns 'model' and 'top1' in percent"):
            read_timm(tmp_path / "bad.csv")


def test_the_command(tmp_path, capsys, monkeypatch):
    for name, values in (("ordinary", ORDINARY), ("shifted", LINE)):
        lines = [f"{model},{100 * top1:.6f},1" for model, top1 in zip("abcde", values, strict=True)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["model,top1,img_size", *lines, "a,1.0,384"]))
    evaluate(tmp_path / "plain", Counting(), DigitsDataModule())
    evaluate(tmp_path / "noisy", Counting(), DigitsDataModule(), corruption="brightness/1")
    runs = [str(tmp_path / name) for name in ("plain", "noisy")]
    files = [f"--{name}={tmp_path / name}.csv" for name in ("ordinary", "shifted")]
    run("robustness", [*files, f"--run={json.dumps(runs)}", f"--out={tmp_path / 'out'}"])
    assert "effective robustness, against 5 models" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert numbers["line"]["slope"] == pytest.approx(1.5, abs=1e-4)
    accuracy = json.loads((tmp_path / "noisy" / "metrics.json").read_text())["metrics"]["accuracy"]
    assert numbers["runs"][0]["shifted"] == accuracy
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"robustness.{end}" for end in ("json", "png", "svg")
    }
    monkeypatch.chdir(tmp_path)  # the paper's figure: the same from its own cells
    first, second, *_ = (folder_of(Path("out"), "fig6", cell) for cell in TABLES["fig6"])
    for folder, there in ((first, "plain"), (second, "noisy")):
        copytree(tmp_path / there, folder / "evaluation")
    for csv, name in zip(LINES["fig6"], ("ordinary", "shifted"), strict=True):
        Path(csv.what).parent.mkdir(parents=True, exist_ok=True)
        copy(tmp_path / f"{name}.csv", csv.what)
    run("reproduce", ["fig6", "--out=out"])
    drawn = json.loads(Path("out/fig6/figures/robustness.json").read_text())
    assert drawn["line"] == numbers["line"]
    assert [one["shifted"] for one in drawn["runs"]] == [accuracy]  # of the row that is there
    with pytest.raises(UserError, match="run: 1 folders, expected pairs"):
        run("robustness", [*files, f"--run={json.dumps(runs[:1])}"])
