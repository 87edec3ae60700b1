"""Hours that the paper's tables take on a GPU that is not here: network calls by the rules, operations by the planner.

    python benchmarks/bench_reproduce.py

Operations of a call are counted as `evaluate.py --plan` counts them (`FlopCounterMode`), on networks without weights.
Calls are those of each configuration's rule, which `Stages` and `Exhaustive` fix beforehand. The GPU is an assumption:
so many operations a second, all the time. On a machine that has one, `--plan` measures it.
"""

import copy
import platform
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import torch
import yaml
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from lightning_diffclf import Candidates, DiffusionClassifier, DiT, Exhaustive, Stages
from lightning_diffclf.classifier.contest import Contest, Terms, judge
from lightning_diffclf.commands.configs import CONFIGS, layers
from lightning_diffclf.data.digit_scenes import DigitScenesDataModule, caption_of_one
from lightning_diffclf.models.pipeline import PipelineDenoiser, load

# The paper's rate for Stable Diffusion at 512^2, fp16, batches of 32, on a 3090: 1,000 s for the 100,000 calls of an
# ImageNet image (table 7). An H100 is taken to reach 40 % of its 989 dense bf16 TFLOP/s.
PAPER_CALLS_PER_SECOND = 100.0
H100 = 0.4 * 989e12

SD2 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}  # stable-diffusion-2-base, as published

TABLE_1 = {
    "sd_food101.yaml": (101, 25_250),
    "sd_cifar10.yaml": (10, 10_000),
    "sd_aircraft.yaml": (100, 3_333),
    "sd_pets.yaml": (37, 3_669),
    "sd_flowers102.yaml": (102, 6_149),
    "sd_stl10.yaml": (10, 8_000),
    "sd_imagenet.yaml": (1000, 2_000),
    "sd_objectnet.yaml": (113, 18_574),
}  # classes and images
TABLE_3 = {"winoground.yaml": (3, 800)}  # both captions and none of each image
TABLE_4 = {
    "imagenet": (1000, 10_000),
    "imagenetv2": (1000, 10_000),
    "imagenet_a": (200, 7_500),
    "objectnet": (113, 18_574),
}


def flops_of_sd() -> float:
    """Of one call of Stable Diffusion 2's UNet at 512^2."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = UNet2DConditionModel(**SD2).eval()
        assert sum(weight.numel() for weight in net.parameters()) == 865_910_724
        net(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 1024))
    return float(counter.get_total_flops())


def flops_of_dit(size: int) -> float:
    """Of one call of DiT-XL/2."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = DiT.from_name("DiT-XL/2", input_size=size // 8).eval()
        net(torch.zeros(1, 4, size // 8, size // 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return float(counter.get_total_flops())


def calls(config: str, classes: int) -> int:
    """Network calls for an image by the rule of a configuration."""
    draws, rule = 250, {}
    for path in layers(CONFIGS / config):
        said = (yaml.safe_load(path.read_text()) or {}).get("classifier", {})
        draws, rule = said.get("draws") or draws, rule | said.get("elimination", {}).get("init_args", {})
    stages = Stages(tuple(rule["samples"]), tuple(rule["keep"])) if rule else Exhaustive()
    contest = Contest(Terms(stages, "l2", np.zeros(draws), np.ones(draws)), classes)
    while not contest.decided:
        contest.land(np.random.default_rng(0).random((contest.stop - contest.done, len(contest.playing)), np.float32))
        judge([contest], 1)
    return contest.nfe


def right_if_taken_for(prediction: str, draws: int = 20) -> str:
    """Of the first scenes of digits, those that the tiny Stable Diffusion, a v-prediction network, tells rightly."""
    data = DigitScenesDataModule()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    captions = [caption_of_one(digit) for digit in range(10)]
    net = PipelineDenoiser(load("assets/sd_digits"), Candidates(captions), captions)
    assert net.schedule.prediction == "v_prediction"
    schedule = copy.copy(net.schedule)
    schedule.prediction = prediction
    taken = SimpleNamespace(schedule=schedule, candidates=net.candidates, encode=net.encode, predict=net.predict)
    found = DiffusionClassifier(taken, draws=draws)(batch["image"], ids=range(len(batch["image"])))
    right = sum(one.prediction == label for one, label in zip(found, batch["label"].tolist(), strict=True))
    return f"{right} of {len(found)}"


def main() -> None:
    sd, dit = flops_of_sd(), {size: flops_of_dit(size) for size in (256, 512)}
    rtx_3090 = PAPER_CALLS_PER_SECOND * sd
    networks = [("SD 2, 512^2", sd), *((f"DiT-XL/2, {size}^2", flops) for size, flops in dit.items())]
    print("| network | FLOPs of a call | calls/s, 3090 | calls/s, H100 |\n| --- | --- | --- | --- |")
    for name, flops in networks:
        print(f"| {name} | {flops:.3e} | {rtx_3090 / flops:,.0f} | {H100 / flops:,.0f} |")
    print("\n| table | configuration | images | NFE / image | NFE | hours, 3090 | hours, H100 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = [("1", name, *what, sd) for name, what in TABLE_1.items()]
    rows += [("3", name, *what, sd) for name, what in TABLE_3.items()]
    rows += [
        ("4", f"dit_{size}_{data}.yaml", *what, flops) for size, flops in dit.items() for data, what in TABLE_4.items()
    ]
    totals: dict[str, list[float]] = {}
    for table, config, classes, images, flops in rows:
        per_image = calls(config, classes)
        hours = [images * per_image * flops / rate / 3600 for rate in (rtx_3090, H100)]
        totals[table] = [a + b for a, b in zip(totals.get(table, [0, 0]), hours, strict=True)]
        numbers = " | ".join(
            [f"{images:,}", f"{per_image:,}", f"{images * per_image:.3g}", *(f"{h:,.0f}" for h in hours)]
        )
        print(f"| {table} | `{config}` | {numbers} |")
    for table, hours in totals.items():
        print(f"| {table} | all | | | | {' | '.join(f'{one:,.0f}' for one in hours)} |")
    print(
        "\nThe tiny Stable Diffusion, a v-prediction network, 20 draws: right answers by its own conversion, and taken"
    )
    print(f"for an epsilon network: {right_if_taken_for('v_prediction')}, {right_if_taken_for('epsilon')}.")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "lightning-diffclf"))
    print(f"\n{platform.machine()}, {packages}. Hours are counted, not run.")


if __name__ == "__main__":
    main()
