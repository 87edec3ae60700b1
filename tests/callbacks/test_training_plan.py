"""Plans of trainings: counts are compared with those of whole networks, and with sums worked out by hand."""

import lightning as L
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf import ClassConditionalDiT
from lightning_diffclf.callbacks import training_plan
from lightning_diffclf.callbacks.training_plan import Cost, Row, TrainingPlan, cost_of, is_quick, plan_training
from lightning_diffclf.cli import train
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.models.dit import DiT
from tests.gaussians import Gaussians
from tests.photos import photos

SMALL = {"input_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 16, "depth": 3, "num_heads": 2}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(training_plan, "SECONDS", 0.02)


def trainer(**settings) -> L.Trainer:
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar"], False)
    return L.Trainer(**{"accelerator": "cpu", "max_steps": 50} | quiet | settings)


def test_costs_are_those_of_the_whole_network():
    net = DiT(**SMALL, patch_size=2)
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).sum().backward()
    cost = cost_of("small", SMALL | {"patch_size": 2})
    assert cost.parameters == sum(weight.numel() for weight in net.parameters())
    assert cost.flops == counter.get_total_flops()
    # what AdamW and an average keep of weights: twenty bytes each; of images: what is kept, once for each
    assert cost.memory(5) - cost.memory(0) == pytest.approx(5 * cost.bytes_of_image)
    assert cost.memory(0) == 20 * cost.parameters


def test_bytes_of_an_image_are_between_what_blocks_need_and_all_they_make():
    short, long = (cost_of("", SMALL | {"patch_size": 2, "depth": depth}) for depth in (2, 12))
    tokens, width, number = 16, 16, 4  # 8 x 8 pixels in patches of 2; floats have 4 bytes
    of_a_block = (long.bytes_of_image - short.bytes_of_image) / 10
    # at the least: inputs of the four products (width, width, width, 4 x width) and queries, keys, values
    assert tokens * 10 * width * number <= of_a_block <= tokens * 40 * width * number


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_plan_of_digits(accumulate):
    module = ClassConditionalDiT(**SMALL, patch_size=2, latents=False, learn_sigma=False)
    plan = plan_training(trainer(accumulate_grad_batches=accumulate), module, DigitsDataModule(batch_size=64))
    assert (plan.images, plan.classes, plan.batch_size, plan.steps) == (1437, 10, 64, 50)
    assert plan.at_once == 64 // accumulate
    assert [row.cost.name for row in plan.rows] == ["as configured", "DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2"]
    assert plan.rows[0].measured
    assert plan.rows[0].cost.parameters == sum(weight.numel() for weight in module.net.parameters())
    for above, row in zip(plan.rows, plan.rows[1:], strict=False):
        assert row.cost.flops > above.cost.flops
        if not row.measured:
            assert row.seconds / above.seconds == pytest.approx(row.cost.flops / above.cost.flops)


def test_published_sizes_have_their_weights():
    # of table 1 of Peebles & Xie 2023, at 256 x 256: 33, 130, 458 and 675 million
    published = {"S": 33, "B": 130, "L": 458, "XL": 675}
    module = ClassConditionalDiT(model="DiT-S/2")
    for size, millions in published.items():
        arguments = training_plan._arguments(module, f"DiT-{size}/2")
        assert round(cost_of(size, arguments).parameters / 1e6) in (millions, millions - 1)


def test_a_small_network_does_not_say_how_fast_larger_ones_are(monkeypatch):
    monkeypatch.setattr(training_plan, "SECONDS", 4.0)
    small = Row(Cost("as configured", 10**5, 3e6, 2**20), 0.064, True)  # 64 images: 3e9 operations a second
    size_s, size_b = (Cost(name, 10**7, flops, 2**20) for name, flops in (("DiT-S/4", 2e9), ("DiT-B/4", 8e9)))
    assert is_quick(size_s, [small], 64)  # an image in 0.7 s, though eight would take 5 s
    assert not is_quick(size_b, [small, Row(size_s, 64 * 2e9 / 3e9, True)], 64)
    assert is_quick(size_b, [small, Row(size_s, 64 * 2e9 / 5e10, True)], 64)  # eight images in 1.3 s
    assert not is_quick(Cost("DiT-S/4", 10**7, 1e10, 2**20), [small], 64)


def test_the_table_works_out_hours():
    rows = [
        Row(Cost("as configured", 10**6, 2e9, 2**20), 0.5, True),
        Row(Cost("DiT-S/2", 10**7, 2e10, 2**20), 5, False),
    ]
    table = TrainingPlan(1000, 10, 64, 64, 7200, 2000.0, rows).to_table()
    columns = [list(column.cells) for column in table.columns]
    assert columns[4:] == [["0.5", "≈ 5"], ["128", "≈ 12.8"], ["1", "≈ 10"]]
    assert "7200 steps of 64 images (461 passes)" in table.caption


def test_only_networks_that_are_known_are_planned():
    with pytest.raises(TypeError, match="plan: of the training of a Gaussians, expected a ClassConditionalDiT"):
        plan_training(trainer(), Gaussians(), DigitsDataModule())


def test_a_plan_on_the_command_line_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "mine", each=10)
    quick = [
        "--data.num_workers=0",
        "--data.size=8",
        "--model.hidden_size=12",
        "--model.depth=1",
        "--data.batch_size=4",
    ]
    train(["--config=images.yaml", "--data.root=mine", "--trainer.accelerator=cpu", "--plan", *quick])
    assert "24 images of 3 classes" in " ".join(capsys.readouterr().out.split())
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
