"""Every file in configs/ is a whole experiment that the command line understands."""

from pathlib import Path

import pytest
import yaml

from lightning_diffclf.cli import CONFIGS, main

LAYERS = {"likelihood_ratio.yaml"}  # which go on top of another
WHOLE = sorted(path.name for path in CONFIGS.glob("*.yaml") if path.name not in LAYERS)

# Li et al. 2023, table 6 (schedule) and its code (loss).
PAPER = {
    "food101": ([20, 50, 100, 500], [20, 10, 5, 1], "l2"),
    "cifar10": ([50, 500], [5, 1], "l1"),
    "aircraft": ([20, 50, 100, 500], [20, 10, 5, 1], "l2"),
    "pets": ([25, 250], [5, 1], "l1"),
    "flowers102": ([20, 50, 100, 500], [20, 10, 5, 1], "l1"),
    "stl10": ([100, 500], [5, 1], "l1"),
    "imagenet": ([50, 100, 500, 1000], [500, 50, 10, 1], "l2"),
    "objectnet": ([50, 100, 500, 1000], [25, 10, 5, 1], "l2"),
}


def parsed(capsys, *names: str) -> dict:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(["test", *(f"--config={name}" for name in names), "--print_config"])
    assert exit_info.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", WHOLE)
def test_it_parses(name, capsys):
    values = parsed(capsys, name)
    assert values["run_dir"] == f"runs/{Path(name).stem}"
    text = (CONFIGS / name).read_text()
    assert f"--config {name}" in text  # says how it is used
    written = yaml.safe_load(text)
    for key in ("model", "data"):
        assert values[key]["class_path"] == written[key]["class_path"]
        assert values[key]["init_args"].items() >= written[key].get("init_args", {}).items()


@pytest.mark.parametrize("name", PAPER)
def test_cells_of_table_1_have_the_papers_settings(name, capsys):
    samples, keep, loss = PAPER[name]
    values = parsed(capsys, f"sd_{name}.yaml")
    rule = values["classifier"]["elimination"]
    assert rule["class_path"].endswith("Stages")
    assert (rule["init_args"]["samples"], rule["init_args"]["keep"]) == (samples, keep)
    assert values["classifier"]["loss"] == loss
    assert values["model"]["init_args"]["prompts"] == values["data"]["init_args"]["name"] == name
    assert "95 % interval" in (CONFIGS / f"sd_{name}.yaml").read_text()


@pytest.mark.parametrize("name", ["sd_cifar10.yaml", "dit_digits.yaml"])
def test_the_rule_can_be_laid_on_top(name, capsys):
    below, values = parsed(capsys, name), parsed(capsys, name, "likelihood_ratio.yaml")
    assert values["classifier"]["elimination"]["class_path"].endswith("LikelihoodRatio")
    assert values["classifier"]["elimination"]["init_args"]["alpha"] == 0.01
    assert "samples" not in values["classifier"]["elimination"]["init_args"]
    assert values["classifier"]["draws"] == below["classifier"]["draws"]
    assert values["model"] == below["model"]
