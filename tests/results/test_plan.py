"""The planner: counts against arithmetic, times against a network that takes a known time."""

import io
import time
from functools import partial

import lightning as L
import pytest
from rich.console import Console
from torch import nn

from lightning_diffclf import (
    DiffusionClassifier,
    DiffusionClassifierCallback,
    Draws,
    LikelihoodRatio,
    PairedTest,
    Stages,
)
from lightning_diffclf.callbacks import plan as callbacks_plan
from lightning_diffclf.results import plan as results_plan
from lightning_diffclf.results.plan import Measurement, Plan, measure, spends_the_same
from lightning_diffclf.results.stored import read_table
from tests.classifier.toys import Toy, some_images
from tests.gaussians import CLASSES, Gaussians, loader


class Slow(Toy):
    """Takes a millisecond for each row, in a linear layer and in sleep."""

    def __init__(self) -> None:
        super().__init__(4)
        self.layer = nn.Linear(32, 32)
        self.modes: list[bool] = []

    def predict(self, x_t, t, candidate):
        self.calls.append((x_t, t, candidate))
        self.modes.append(self.training)
        time.sleep(0.001 * len(x_t))
        return self.layer(x_t.flatten(1)).view_as(x_t)


def test_speed_and_operations_of_a_known_network():
    network = Slow()
    m = measure(DiffusionClassifier(network, Draws(10), microbatch=20), some_images(3), range(3), seconds=0.2)
    assert 100 < m.rows_per_second < 1000  # sleep takes at least as long as asked for, on a busy machine much longer
    assert m.flops_per_row == 2 * 32 * 32
    assert (m.num_candidates, m.draws, m.microbatch, m.exhaustive_nfe) == (4, 10, 20, 40)
    assert (m.nfe_sum, m.nfe_images) == (40, 1)  # known without trying
    assert {len(x) for x, _, _ in network.calls} == {20}  # full, although three images have 120 rows
    assert network.modes == [False] * len(network.modes)
    assert network.training


@pytest.mark.parametrize("rule", [PairedTest(), LikelihoodRatio(), Stages((2, 10), (2, 1))])
def test_cost_under_a_rule_is_that_of_the_first_images(rule):
    module, data = Gaussians(), loader(12).dataset
    classifier = DiffusionClassifier(module, Draws(10), elimination=rule, microbatch=16)
    m = measure(classifier, data.images, range(100, 112), seconds=0.01)
    expected = list(classifier(data.images[:8], range(100, 108)))
    assert (m.nfe_sum, m.nfe_images) == (sum(r.nfe for r in expected), 8)
    assert m.flops_per_row == 0
    assert classifier.recipe.elimination is rule


def test_a_rule_is_not_tried_for_longer_than_allowed():
    classifier = DiffusionClassifier(Slow(), Draws(10), elimination=PairedTest(), microbatch=20)
    begun = time.perf_counter()
    m = measure(classifier, some_images(3), range(3), seconds=0.01, rule_seconds=0.001)
    assert time.perf_counter() - begun < 2
    assert (m.nfe_sum, m.nfe_images) == (0, 0)
    plan = Plan([m], [10], "PairedTest()", exact=False)
    assert plan.nfe is None
    assert "none: the first image takes longer" in shown(plan)


def test_candidates_and_budget_count():
    classifier = DiffusionClassifier(Toy(), Draws(10), budget=12, microbatch=16)
    m = measure(classifier, some_images(2), range(2), candidates=[0, 3], seconds=0.01)
    assert (m.num_candidates, m.exhaustive_nfe) == (2, 20)
    assert (m.nfe_sum, m.nfe_images) == (24, 2)


def first_two(images):
    """A proposal that costs three calls."""
    time.sleep(0.02)
    return [[0, 1]] * len(images)


first_two.nfe = 3


@pytest.mark.parametrize("rule", [None, PairedTest()])
def test_what_a_proposal_costs_is_part_of_the_estimate(rule):
    module, data = Gaussians(), loader(12).dataset
    classifier = DiffusionClassifier(module, Draws(10), elimination=rule, proposal=first_two, microbatch=16)
    m = measure(classifier, data.images, range(100, 112), seconds=0.01)
    expected = list(classifier(data.images[:8], range(100, 108)))
    assert (m.nfe_sum, m.search_nfe_sum, m.kept_sum) == (sum(r.nfe for r in expected), 8 * 3, 8 * 2)
    assert m.exhaustive_nfe == CLASSES * 10
    plan = Plan([m, m], [10, 10], "a rule", spends_the_same(classifier), "a search", fitting=1234)
    text = " ".join(shown(plan).replace("│", " ").split())
    for part in (
        "proposal a search",
        f"NFE/image, without elimination and proposal {CLASSES * 10} ",
        f"NFE/image, estimate {plan.nfe:.6g} ",
        "NFE/image, of the proposal 3 ",
        f"NFE/image, of the contest {plan.nfe - 3:.4g}, of 2 candidates kept",
        "estimated from 16 images",
        "fitting the proposal, once at most 1,234 network calls",
    ):
        assert part in text


def test_a_proposal_is_not_asked_while_network_calls_are_timed(monkeypatch):
    def refused(images):
        raise AssertionError("asked")

    monkeypatch.setattr(results_plan, "_tried", lambda *arguments: [])
    network = Slow()
    classifier = DiffusionClassifier(network, Draws(10), microbatch=20, proposal=refused)
    m = measure(classifier, some_images(3), range(3), seconds=0.01)
    assert (m.rows_per_second > 0, m.nfe_images) == (True, 0)
    assert {len(x) for x, _, _ in network.calls} == {20}


def shown(plan: Plan) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(plan.to_table())
    return console.file.getvalue()


def test_arithmetic_of_a_plan():
    measured = [Measurement(10, 100, 256, rate, 1e9, spent, 8) for rate, spent in ((500.0, 2000), (250.0, 2400))]
    plan = Plan(measured, [1800, 1799], "PairedTest()", exact=False)
    assert plan.total_images == 3599
    assert plan.nfe == 4400 / 16
    assert plan.hours(1000) == pytest.approx(1799 * 1000 / 250 / 3600)  # the slower rank
    text = shown(plan)
    for part in ("3599", "1000", "275", "750 on 2 ranks", "1e+09", "3.599e+15", "estimated from", "16 images"):
        assert part in text
    unknown = Plan(measured, [None, None], "PairedTest()", exact=False)
    assert unknown.total_images is unknown.hours(1000) is None
    assert "hours" not in shown(unknown)
    assert "unknown" in shown(unknown)
    exact = shown(Plan(measured[:1], [36], "Exhaustive()", exact=True))
    assert "estimate" not in exact
    assert "0.02 (72 s)" in exact


# --- the callback -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quickly(monkeypatch):
    """Plans that time the network for an instant."""
    monkeypatch.setattr(callbacks_plan, "measure", partial(measure, seconds=0.01))


def trainer(*callbacks, **settings):
    quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(callbacks=list(callbacks), **quiet | settings)


@pytest.mark.parametrize(
    ("limit", "images"), [(1.0, 22), (3, 12), (0.5, 12), (1, 4)]
)  # 22 images are 6 batches of 4 at most
@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.usefixtures("quickly")
def test_the_callback_plans_and_writes_nothing(stage, limit, images, tmp_path, capsys):
    plan = DiffusionClassifierCallback(
        draws=5, elimination=PairedTest(), output_dir=str(tmp_path / "out"), keep_errors=True, plan=True
    )
    name = {"validate": "limit_val_batches", "test": "limit_test_batches", "predict": "limit_predict_batches"}[stage]
    module, runner = Gaussians(), trainer(plan, precision="bf16-mixed", **{name: limit})
    getattr(runner, stage)(module, loader(22))
    assert plan.planned.total_images == images
    assert plan.planned.ranks[0].exhaustive_nfe == 5 * CLASSES
    assert plan.planned.ranks[0].nfe_images == 4  # the first batch
    assert getattr(runner, name) == limit
    assert module.autocast_seen == {True}
    assert not (tmp_path / "out").exists()
    assert plan.results == []
    assert "plan of the evaluation" in capsys.readouterr().out
    plan.plan = False
    getattr(runner, stage)(module, loader(22))
    assert len(read_table(tmp_path / "out")) == images
    assert plan.planned is None


def test_a_plan_checks_what_the_evaluation_would():
    callback = DiffusionClassifierCallback(draws=2, plan=True)
    runner = trainer(callback)
    with pytest.raises(ValueError, match="no labels"):
        runner.test(Gaussians(), loader(4, labelled=False), verbose=False)
    assert runner.limit_test_batches == 1.0


@pytest.mark.usefixtures("quickly")
def test_two_plans_side_by_side_leave_the_trainer_as_it_was():
    plans = [DiffusionClassifierCallback(draws=draws, plan=True, name=f"n{draws}") for draws in (2, 3)]
    runner = trainer(*plans, limit_test_batches=0.5)
    runner.test(Gaussians(), loader(16), verbose=False)
    assert [p.planned.total_images for p in plans] == [8, 8]
    assert [p.planned.ranks[0].draws for p in plans] == [2, 3]
    assert runner.limit_test_batches == 0.5


def test_fit_goes_on_as_ever():
    callback = DiffusionClassifierCallback(draws=2, fit_images=3, plan=True)
    trainer(callback, max_steps=2).fit(Gaussians(), loader(8), loader(8))
    assert callback.metrics["images"] == 3
    assert callback.planned is None
