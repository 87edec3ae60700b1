"""Images that come in groups: their intervals in reports, comparisons and metrics."""

import json
from dataclasses import replace

import lightning as L
import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_diffclf import DiffusionClassifierCallback
from lightning_diffclf.results import headline
from lightning_diffclf.results.compare import compare, to_table
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.groups import Grouped
from lightning_diffclf.results.statistics import Clusters, wilson
from tests.gaussians import Gaussians, loader
from tests.results.made_up import made_up_rows, made_up_run


def with_groups(rows, every: int):
    return [replace(row, group=f"patient {int(row.id) // every}") for row in rows]


@pytest.fixture
def rows():
    return list(made_up_rows(90, 4))


def test_intervals_are_those_of_groups(rows, tmp_path):
    run = Evaluation.read(made_up_run(tmp_path / "run", with_groups(rows, 6), 4))
    right = np.array([row.prediction == row.label for row in rows])
    expected = Clusters.of(right, [int(row.id) // 6 for row in rows])
    assert run.accuracy == pytest.approx(expected.share())
    assert run.numbers["groups"] == 15
    assert (run.numbers["accuracy_low"], run.numbers["accuracy_high"]) == pytest.approx(expected.share()[1:])
    p = right.mean()
    assert run.numbers["design_effect"] == pytest.approx(expected.error**2 / (p * (1 - p) / 90))
    [line] = [one for one in headline.details(run) if one.name == "accuracy"]
    assert "of 15 groups of images" in line.note
    low, high = (f"{100 * end:.1f}" for end in expected.share()[1:])
    assert f"(95 % interval {low} to {high} %)" in headline.sentence(run)


class Films(L.LightningDataModule):
    """Images of films of four frames."""

    def test_dataloader(self):
        return loader(12)

    def group_of(self, image_id):
        return image_id // 4


def test_a_data_module_says_groups(tmp_path):
    callback = DiffusionClassifierCallback(draws=2, output_dir=str(tmp_path), error_maps=0)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    L.Trainer(accelerator="cpu", callbacks=[callback], **quiet).test(Gaussians(), Films(), verbose=False)
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pydict()
    assert rows["group"] == [str(int(one) // 4) for one in rows["id"]]
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    right = np.array(rows["prediction"]) == np.array(rows["label"])
    expected = Clusters.of(right, rows["group"]).share()
    assert (metrics["groups"], metrics["accuracy_low"]) == (3, pytest.approx(expected.low))


def test_without_groups_nothing_changes(rows, tmp_path):
    run = Evaluation.read(made_up_run(tmp_path / "run", rows, 4))
    assert run.accuracy == wilson(run.summary.right, 90)
    assert run.numbers.keys() == run.summary.numbers().keys()


def test_images_without_a_group_are_one_each(rows):
    some = Grouped()
    half = with_groups(rows[:40], 4) + [replace(row, label=None) for row in rows[40:45]] + rows[45:]
    for part in (half[:13], half[13:60], half[60:]):
        some.update(part)
    right = np.array([row.prediction == row.label for row in rows[:40] + rows[45:]])
    groups = [f"{int(row.id) // 4} of 4" for row in rows[:40]] + [row.id for row in rows[45:]]
    assert some.clusters.share() == pytest.approx(Clusters.of(right, groups).share())


def test_a_comparison_by_groups(rows, tmp_path, capsys):
    other = [replace(row, prediction=(row.prediction + 1) % 4) if int(row.id) < 12 else row for row in rows]
    names = ("a", "b", "c", "d")
    for name, some in zip(names, (rows, other, with_groups(rows, 6), with_groups(other, 6)), strict=True):
        made_up_run(tmp_path / name, some, 4)
    a, b, c, d = (Evaluation.read(tmp_path / name) for name in names)
    alone, grouped = compare(a, b), compare(c, d)
    gain = np.array([(x.prediction == x.label) - (y.prediction == y.label) for x, y in zip(rows, other, strict=True)])
    clusters = Clusters.of(gain, [int(row.id) // 6 for row in rows])
    assert grouped.difference == pytest.approx(clusters.interval())
    assert grouped.p_value == pytest.approx(clusters.p_value)
    assert (alone.groups, grouped.groups) == (None, 15)
    assert alone.difference.value == pytest.approx(gain.mean())
    assert grouped.difference.value == pytest.approx(gain.mean())
    assert alone.p_value < 0.05 < grouped.p_value  # two patients are all that differs
    assert grouped.first["groups"] == 15
    assert any("p, by 15 groups" in str(cell) for cell in to_table(grouped, "c", "d").columns[0].cells)
