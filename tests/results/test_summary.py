"""One number, one function: live metrics, metrics.json, report and comparison say the same."""

import dataclasses
import json
import re

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.special import softmax
from torch.utils.data import DataLoader

from lightning_diffclf import Candidates, DiffusionClassifierCallback
from lightning_diffclf.results import charts, tables
from lightning_diffclf.results.compare import compare
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.headline import details
from lightning_diffclf.results.metrics import ClassifierMetrics
from lightning_diffclf.results.predictions import SCHEMA, to_table, write_table
from lightning_diffclf.results.report import make_figures, write_report
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import claim, finish
from lightning_diffclf.results.stored import SETTINGS_KEY, Stored
from lightning_diffclf.results.summary import Outline, Summary
from tests.gaussians import CLASSES, Gaussians, Samples
from tests.results.made_up import made_up_outline, made_up_rows, made_up_run, proposed_rows

PROMPTS = [0] * 5 + [c for c in range(1, CLASSES) for _ in range(2)]  # the first class has many


class Prompts(Gaussians):
    """Several prompts for each class, each a bit beside it; nothing to say of images that are far off."""

    def __init__(self) -> None:
        super().__init__()
        self.candidates = Candidates([f"prompt {k}" for k in range(len(PROMPTS))], PROMPTS)
        aside = torch.randn(len(PROMPTS), 1, 3, 3, generator=torch.Generator().manual_seed(5))
        self.means = self.means[PROMPTS] + 0.2 * aside

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        far_N = x_t.abs().amax((1, 2, 3)) > 1e3
        return super().predict(x_t, t, candidate).masked_fill(far_N[:, None, None, None], torch.nan)


def evaluated(folder, broken: int = 3, images: int = 60, **settings):
    """Live metrics of an evaluation, where the network can say nothing of the first images."""
    data = Samples(images)
    data.images[:broken] = 1e9
    callback = DiffusionClassifierCallback(output_dir=str(folder), error_maps=0, **settings)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    logged = trainer.test(Prompts(), DataLoader(data, 16), verbose=False)[0]
    return {name.removeprefix("diffclf/"): value for name, value in logged.items()}, callback.metrics


@pytest.mark.parametrize("ensemble", ["best", "mean"])
def test_live_metrics_file_report_and_comparison_agree(ensemble, tmp_path):
    run = tmp_path / "run"
    logged, live = evaluated(run, draws=6, ensemble=ensemble, abstain=1.0, temperature=2.5)
    assert {"accuracy", "nll", "brier", "ece", "coverage", "answered_accuracy", "top5"} < live.keys()
    assert 0.8 > live["coverage"] > 0.3
    expected = pytest.approx(live, rel=1e-12)
    assert logged == pytest.approx(live, rel=1e-6)  # Lightning logs in single precision
    stored = json.loads((run / "metrics.json").read_text())["metrics"]
    assert {name: stored[name] for name in live} == expected
    evaluation = Evaluation.read(run)
    assert evaluation.summary.numbers() == expected
    found = compare(evaluation, Evaluation.read(run))
    assert found.first == found.second == expected
    shown = {name: value for name, value, _ in details(evaluation)}
    assert shown["accuracy"] == f"{100 * live['accuracy']:.2f} %"
    assert shown["ECE, configured"] == f"{live['ece']:.4f}"
    assert shown["ECE, calibrated"] == f"{stored['calibrated_ece']:.4f}"
    assert shown["coverage"] == f"{100 * live['coverage']:.2f} %"
    assert evaluation.posterior.temperature == pytest.approx(stored["temperature"])


def test_numbers_are_those_of_a_plain_loop(tmp_path):
    run = tmp_path / "run"
    _, live = evaluated(run, draws=6, temperature=2.5)
    evaluation = Evaluation.read(run)
    rows = evaluation.gallery(1000)
    assert len(rows) == live["images"] == 60
    nll = brier = 0.0
    for row in rows:
        best_C = np.full(CLASSES, np.inf)
        np.minimum.at(best_C, np.array(PROMPTS)[row.candidates_K], row.differences_K)
        p_C = softmax(-best_C * 9 / 2.5) if row.prediction is not None else np.full(CLASSES, 1 / CLASSES)
        assert row.prediction in (None, p_C.argmax())  # the likeliest class is the one decided for
        nll -= np.log(p_C[row.label]) / 60
        brier += np.square(p_C - np.eye(CLASSES)[row.label]).sum() / 60
    assert live["nll"] == pytest.approx(nll)
    assert live["brier"] == pytest.approx(brier)
    assert live["accuracy"] == np.mean([row.prediction == row.label for row in rows])
    assert live["top5"] == np.mean([row.label in row.top5 for row in rows])
    everything = sum(len(row.candidates_K) * 6 for row in rows)
    assert live["speedup"] == pytest.approx(everything / sum(row.nfe for row in rows))


def test_another_temperature_on_resumption_is_that_of_all_numbers(tmp_path):
    run = tmp_path / "run"
    evaluated(run, draws=3, temperature=1.0)
    _, live = evaluated(run, draws=3, temperature=4.0)
    assert Evaluation.read(run).summary.numbers() == pytest.approx(live, rel=1e-12)


# --- what a search cost, and left ----------------------------------------------------------------------------------


def test_calls_of_search_and_contest_add_up(tmp_path):
    rows = list(proposed_rows(made_up_rows(90, 6)))
    rows[4] = dataclasses.replace(rows[4], label=None)
    run = Evaluation.read(made_up_run(tmp_path / "run", rows, 6, proposes=True))
    numbers = run.summary.numbers()
    search, contest = sum(row.search_nfe for row in rows), sum(int(row.draws_K.sum()) for row in rows)
    assert numbers["search_nfe_per_image"] == search / 90
    assert numbers["contest_nfe_per_image"] == contest / 90
    assert numbers["nfe_per_image"] == (search + contest) / 90
    assert numbers["kept_per_image"] == sum(len(row.candidates_K) for row in rows) / 90
    assert numbers["dropped_draws"] == 45
    recall = [row.label in row.candidates_K for row in rows if row.label is not None]
    assert numbers["proposal_recall"] == np.mean(recall)
    shown = {name: (value, note) for name, value, note in details(run)}
    assert shown["NFE of the search"] == (
        f"{search / 90:.1f}",
        f"of an image, {100 * search / (search + contest):.1f} % of all",
    )
    assert shown["NFE of the contest"][0] == f"{contest / 90:.1f}"
    assert shown["proposal recall"][0] == f"{100 * np.mean(recall):.2f} %"
    assert shown["dropped"][0] == "45"
    cost = tables.costs(run.costs)
    labelled = [row for row in rows if row.label is not None]
    assert cost["nfe"].iloc[-1] == pytest.approx(np.mean([row.nfe for row in labelled]))
    assert cost["nfe"].iloc[0] == pytest.approx(np.mean([row.search_nfe + len(row.candidates_K) for row in labelled]))
    live = ClassifierMetrics(run.outline)
    live.update(rows)
    assert live.compute().numbers() == pytest.approx(numbers, rel=1e-12)


def test_decisions_of_earlier_versions_are_read_and_their_split_is_unknown(tmp_path):
    rows = list(proposed_rows(made_up_rows(60, 6)))
    settings = Settings(
        {"draws": 20}, made_up_outline(6, proposes=True).to_info() | {"candidate_names": list("abcdef")}
    )
    run = claim(tmp_path / "run", settings)
    described = {SETTINGS_KEY: settings.digest.encode()}
    old = to_table(rows[:40]).drop_columns(["search_nfe", "dropped_draws"]).replace_schema_metadata(described)
    write_table(old, run / "predictions.parquet")
    evaluation = Evaluation.read(run)
    numbers = evaluation.summary.numbers()
    assert numbers["nfe_per_image"] == np.mean([row.nfe for row in rows[:40]])
    assert numbers["proposal_recall"] == np.mean([row.label in row.candidates_K for row in rows[:40]])
    assert "search_nfe_per_image" not in numbers
    assert {row.search_nfe for row in evaluation.gallery(3)} == {None}
    assert ("NFE of the search", "unknown") in [line[:2] for line in details(evaluation)]
    write_report(run)
    # and resumed: images that come now do not make it known
    new = to_table(rows[40:]).replace_schema_metadata(described)
    write_table(new, run / "parts" / "00000-new-000000.parquet")
    resumed = Evaluation.read(run)
    assert resumed.images == 60
    assert "search_nfe_per_image" not in resumed.summary.numbers()
    finish(run, settings)
    assert pq.read_table(run / "predictions.parquet")["search_nfe"].null_count == 40


# --- images without an answer --------------------------------------------------------------------------------------


def test_no_answer_is_wrong_but_no_class(tmp_path):
    _, live = evaluated(tmp_path / "run", broken=4, draws=3)
    evaluation = Evaluation.read(tmp_path / "run")
    confusion_CA = evaluation.summary.sums["confusion_CA"]
    assert confusion_CA.shape == (CLASSES, CLASSES + 1)
    labels = Samples(60).labels.numpy()
    assert confusion_CA[:, CLASSES].tolist() == np.bincount(labels[:4], minlength=CLASSES).tolist()
    assert live["accuracy"] == confusion_CA.trace() / 60
    frame = tables.confusion(evaluation.summary)
    assert frame[frame["predicted_name"] == "no answer"]["images"].sum() == 4
    assert tables.class_names(evaluation.summary)["name"].tolist()[-1] == "no answer"
    spec = charts.of_summary(evaluation.summary)["confusion"].to_dict()
    assert spec["layer"][0]["encoding"]["x"]["scale"]["domain"] == [-0.5, CLASSES + 0.5]
    assert spec["layer"][0]["encoding"]["y"]["scale"]["domain"] == [CLASSES - 0.5, -0.5]
    sure = evaluation.sureness
    assert (sure.margin[np.isin(sure.ids, ["100", "101", "102", "103"])] == -np.inf).all()  # never the surest
    html = write_report(tmp_path / "run").read_text()
    assert "(none)" not in html
    page = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert page.count('data-prediction="no answer"') == 4
    assert {name: value for name, value, _ in details(evaluation)}["no answer"] == "4"


def test_of_very_many_mistakes_the_commonest_are_drawn(monkeypatch):
    monkeypatch.setattr(tables, "MOST_PAIRS", 4)
    summary = Summary(Outline((0, 1, 2), ("a", "b", "c"), (1.0,)))
    summary.sums["confusion_CA"][:, :3] = [[9, 1, 2], [3, 8, 1], [1, 4, 0]]
    summary.sums["chance"] += 29 / 3
    frame = tables.confusion(summary)
    pairs = [tuple(pair) for pair in frame[["true", "predicted", "images"]].to_numpy().tolist()]
    assert pairs == [(0, 0, 9), (1, 0, 3), (1, 1, 8), (2, 1, 4)]
    assert frame["share"].tolist() == pytest.approx([9 / 12, 3 / 12, 8 / 12, 4 / 5])
    assert "the 4 commonest pairs" in json.dumps(charts.of_summary(summary)["confusion"].to_dict())


def test_where_all_have_answers_there_is_no_such_column(tmp_path):
    rows, outline = list(made_up_rows(50, 4)), made_up_outline(4)
    summary = Summary.of(outline, [rows])
    assert "no answer" not in tables.class_names(summary)["name"].tolist()
    domain = charts.of_summary(summary)["confusion"].to_dict()["layer"][0]["encoding"]["x"]["scale"]["domain"]
    assert domain == [-0.5, 3.5]


def test_a_run_in_which_nothing_has_an_answer(tmp_path):
    rows = [
        dataclasses.replace(
            row,
            prediction=None,
            abstained=True,
            margin=np.inf,
            top5=np.array([], np.int32),
            differences_K=np.full(3, np.inf, np.float32),
            choice_S=np.full(20, -1, np.int32),
            leader_S=np.full(20, -1, np.int32),
        )
        for row in made_up_rows(60, 3)
    ]
    run = made_up_run(tmp_path / "run", rows, 3)
    numbers = Evaluation.read(run).summary.numbers()
    assert numbers["accuracy"] == 0
    assert numbers["nll"] == pytest.approx(np.log(3))
    assert numbers["ece"] == pytest.approx(1 / 3)
    assert tables.timesteps(Evaluation.read(run).summary)["accuracy"].eq(0).all()
    write_report(run)


# --- chunks --------------------------------------------------------------------------------------------------------


def test_chunks_of_any_size_and_kind_give_the_same(monkeypatch):
    rows, outline = list(made_up_rows(120, 6)), made_up_outline(6)
    rows[5] = dataclasses.replace(rows[5], label=None)
    rows[6] = dataclasses.replace(rows[6], prediction=None, abstained=True)
    expected = Summary.of(outline, [rows])
    table = to_table(rows)
    few = table.select(Summary.COLUMNS)
    for chunks in (
        [[row] for row in rows],
        [table.slice(0, 0), table.slice(0, 50), table.slice(50)],
        few.to_batches(max_chunksize=7),
        [pa.concat_tables([few.slice(40), few.slice(0, 40)])],
    ):
        found = Summary.of(outline, chunks)
        assert found.numbers() == pytest.approx(expected.numbers(), rel=1e-12)
        for name, sums in expected.sums.items():
            np.testing.assert_allclose(found.sums[name], sums, rtol=1e-12)
    monkeypatch.setattr("lightning_diffclf.results.columns.CELLS", 50)  # in pieces of 8 images
    assert Summary.of(outline, [rows]).numbers() == pytest.approx(expected.numbers(), rel=1e-12)


def test_metrics_begin_anew_and_hold_no_images():
    rows, outline = list(made_up_rows(120, 6)), made_up_outline(6)
    metrics = ClassifierMetrics(outline)
    with pytest.raises(ValueError, match="evaluation: no image"):
        metrics.compute()
    metrics.update(rows[:70])
    first = metrics.compute()
    metrics.reset()
    metrics.update(rows[70:])
    metrics.update([])
    assert metrics.compute().numbers() == Summary.of(outline, [rows[70:]]).numbers()
    assert first.numbers() == Summary.of(outline, [rows[:70]]).numbers()
    size = sum(getattr(metrics, name).numel() for name in metrics._defaults)
    metrics.update(rows)
    assert sum(getattr(metrics, name).numel() for name in metrics._defaults) == size


def test_sums_stay_on_the_cpu_in_double_precision():
    """Not all accelerators have float64; a module that is moved or cast takes its metrics along."""
    module = torch.nn.Module()
    module.metrics = ClassifierMetrics(made_up_outline(4))
    module.to("meta").half()
    assert {getattr(module.metrics, name).device.type for name in module.metrics._defaults} == {"cpu"}
    assert module.metrics.nll.dtype == torch.float64


def test_a_report_reads_only_the_columns_it_needs(tmp_path, monkeypatch):
    run = made_up_run(tmp_path / "run", made_up_rows(60, 4), 4)
    asked = []

    def spied(stored, columns, ids=None):
        asked.append(set(columns))
        return read(stored, columns, ids)

    read = Stored.chunks
    monkeypatch.setattr(Stored, "chunks", spied)
    make_figures(Evaluation.read(run))
    assert asked
    assert not any({"thumbnail", "error_map", "scores_K"} & columns for columns in asked)
    Evaluation.read(run).gallery(5)
    assert asked[-1] == set(SCHEMA.names)


def test_an_outline_survives_as_plain_values():
    outline = dataclasses.replace(made_up_outline(3), abstains=True, proposes=True)
    outline = dataclasses.replace(outline, posterior=type(outline.posterior)("mean", 3.0))
    assert Outline.of(json.loads(json.dumps(outline.to_info()))) == outline


# --- one draw ------------------------------------------------------------------------------------------------------


def test_one_draw(tmp_path):
    _, live = evaluated(tmp_path / "run", draws=1, broken=0)
    assert live["nfe_per_image"] == len(PROMPTS)
    assert (tmp_path / "run" / "confusion.png").is_file()
    assert not {"timesteps", "cost", "survivors"} & make_figures(Evaluation.read(tmp_path / "run")).keys()  # one point
    write_report(tmp_path / "run")
