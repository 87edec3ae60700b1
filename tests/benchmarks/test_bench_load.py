"""What the benchmark of large runs makes up must be what evaluations store."""

from pathlib import Path

import numpy as np

from lightning_diffclf.results.evaluation import Evaluation


def test_runs_that_are_made_up_are_runs(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from bench_load import make_run

    make_run(tmp_path / "run", 0, 40, 12, 20, 3)
    run = Evaluation.read(tmp_path / "run")
    assert run.summary.images == 40
    assert 0.4 < run.summary.accuracy.value <= 1  # 70 %, and a twelfth of the others
    assert np.isfinite(run.summary.numbers()["nfe_per_image"])
