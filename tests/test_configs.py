"""Every file in configs/ is a whole experiment that the command line understands."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_diffclf.cli import default_run_dir, main
from lightning_diffclf.commands.configs import CONFIGS, layers

# which go on top of another, or below it
TOPS = {
    "likelihood_ratio.yaml",
    "gradient_search.yaml",
    "gpus_8.yaml",
    "compile.yaml",
    "small_memory.yaml",
    "fsdp.yaml",
    "clip.yaml",
    "timm.yaml",
    "sit_256.yaml",
    "repa_256.yaml",
    "lightningdit_256.yaml",
    "edm2_512.yaml",
    "on_digit_scenes.yaml",
    "on_pixel_digits.yaml",
    "on_imagenet_r.yaml",
    "on_imagenet_sketch.yaml",
}
DATA = ["imagenet", "imagenetv2", "imagenet_a", "objectnet"]
LAYERS = TOPS | {"dit_256.yaml", "dit_512.yaml", "sd_paper.yaml"} | {f"on_{data}.yaml" for data in DATA}
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
    assert values["extends"] is None
    written = yaml.safe_load(text)
    for key in ("model", "data"):
        assert values[key]["class_path"] == written.get(key, {}).get("class_path", values[key]["class_path"])
        assert values[key]["init_args"].items() >= written.get(key, {}).get("init_args", {}).items()


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


@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("data", DATA)
def test_cells_of_table_4_have_the_papers_settings(data, size, capsys):
    values = parsed(capsys, f"dit_{size}_{data}.yaml")
    assert values["classifier"]["draws"] == 250
    assert values["classifier"]["loss"] == "l2"
    assert values["classifier"]["elimination"] is None
    assert values["data"]["init_args"]["size"] == 8 * values["model"]["init_args"]["input_size"] == size
    assert values["data"]["init_args"]["crop"] == "published"
    assert values["trainer"]["precision"] == "32-true"
    assert "95 % interval" in (CONFIGS / f"dit_{size}_{data}.yaml").read_text()
    assert parsed(capsys, f"dit_{size}.yaml", f"on_{data}.yaml") == values | {"run_dir": f"runs/dit_{size}"}
    assert f"--config on_{data}.yaml" in (CONFIGS / f"on_{data}.yaml").read_text()


@pytest.mark.parametrize("name", ["dit_imagenet", "dit_imagenet_512", "dit_b2_imagenet", "dit_s2_imagenet"])
def test_training_is_as_published(name, capsys):
    values = parsed(capsys, f"{name}.yaml")
    model, data = values["model"]["init_args"], values["data"]["init_args"]
    assert (model["lr"], model["weight_decay"], model["warmup_steps"], model["decay"]) == (1e-4, 0, 0, "none")
    assert (model["schedule"], model["learn_sigma"], model["class_dropout_prob"]) == ("linear", True, 0.1)
    assert (data["batch_size"], data["size"], data["flip"]) == (256, 8 * model["input_size"], True)
    assert (values["ema"]["decay"], values["trainer"]["precision"]) == (0.9999, "bf16-mixed")


def test_layers_of_training(capsys):
    below = parsed(capsys, "dit_imagenet.yaml")
    values = parsed(capsys, "dit_imagenet.yaml", "gpus_8.yaml", "compile.yaml", "small_memory.yaml")
    assert (values["trainer"]["devices"], values["trainer"]["accumulate_grad_batches"]) == (8, 8)
    changed = {"compile": True, "checkpointing": True}
    assert values["model"]["init_args"] == below["model"]["init_args"] | changed
    assert values["data"] == below["data"]
    sharded = parsed(capsys, "dit_imagenet.yaml", "gpus_8.yaml", "fsdp.yaml")
    assert sharded["trainer"]["strategy"]["class_path"].endswith("ModelParallelStrategy")
    assert sharded["trainer"]["strategy"]["init_args"]["save_distributed_checkpoint"] is False
    assert sharded["ema"] == below["ema"]


@pytest.mark.parametrize("name", ["sd_cifar10.yaml", "dit_digits.yaml", "dit_256_imagenet.yaml"])
def test_the_rule_can_be_laid_on_top(name, capsys):
    below, values = parsed(capsys, name), parsed(capsys, name, "likelihood_ratio.yaml")
    assert values["classifier"]["elimination"]["class_path"].endswith("LikelihoodRatio")
    assert values["classifier"]["elimination"]["init_args"]["alpha"] == 0.01
    assert "samples" not in values["classifier"]["elimination"]["init_args"]
    assert values["classifier"]["draws"] == below["classifier"]["draws"]
    assert values["model"] == below["model"]


@pytest.mark.parametrize("name", ["sd_pets.yaml", "winoground.yaml"])
def test_clip_takes_the_place_of_stable_diffusion(name, capsys):
    below, values = parsed(capsys, name), parsed(capsys, name, "clip.yaml")
    assert values["model"]["class_path"].endswith("ZeroShotCLIP")
    assert values["model"]["init_args"]["prompts"] == below["model"]["init_args"]["prompts"]
    assert values["data"]["init_args"] == below["data"]["init_args"] | {"size": None}
    assert (values["classifier"]["draws"], values["classifier"]["elimination"]) == (None, None)


@pytest.mark.parametrize("layer", ["sit_256", "repa_256", "lightningdit_256", "edm2_512"])
def test_networks_of_others_on_imagenet(layer, capsys):
    values, dit = parsed(capsys, f"{layer}.yaml", "on_imagenet.yaml"), parsed(capsys, "dit_256_imagenet.yaml")
    assert values["model"]["class_path"].endswith("PublishedNetwork")
    assert values["model"]["init_args"]["family"] == layer.partition("_")[0]
    assert values["run_dir"] == f"runs/{layer}"
    assert values["data"]["init_args"] == dit["data"]["init_args"] | {"size": None}
    assert values["classifier"] == dit["classifier"]
    assert f"--config {layer}.yaml --config on_imagenet.yaml" in (CONFIGS / f"{layer}.yaml").read_text()


@pytest.mark.parametrize("data", ["imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"])
def test_timm_on_data_made_like_imagenet(data, capsys):
    values = parsed(capsys, "timm.yaml", f"on_{data}.yaml")
    assert values["model"]["class_path"].endswith("TimmClassifier")
    assert values["data"]["init_args"]["size"] is None
    assert values["data"]["init_args"]["root"].startswith(f"data/{data.replace('_', '-')}")


def test_the_search_can_be_laid_on_top(capsys):
    values = parsed(capsys, "dit_digit_triples.yaml", "likelihood_ratio.yaml", "gradient_search.yaml")
    assert values["classifier"]["proposal"]["class_path"] == "lightning_diffclf.GradientSearch"
    assert values["classifier"]["proposal"]["init_args"]["draws"] == 6


# --- files that extend others -----------------------------------------------------------------------------------------


def write(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_what_a_file_extends_comes_below_it(tmp_path, capsys):
    (tmp_path / "below").mkdir()
    write(tmp_path / "below", lowest="ema: {decay: 0.1}\ncheckpoint: {every_n_train_steps: 3}")
    write(
        tmp_path, side="extends: below/lowest.yaml\nrun_dir: runs/side\nema: {decay: 0.2}", plain="seed_everything: 7"
    )
    write(tmp_path, top="extends: [dit_digits.yaml, side.yaml, plain.yaml]\nmodel: {init_args: {lr: 1e-2}}")
    top = tmp_path / "top.yaml"
    assert [path.name for path in layers(top)] == [
        "dit_digits.yaml",
        "lowest.yaml",
        "side.yaml",
        "plain.yaml",
        "top.yaml",
    ]
    values = parsed(capsys, str(top))
    assert values["model"]["init_args"] == parsed(capsys, "dit_digits.yaml")["model"]["init_args"] | {"lr": 0.01}
    assert (values["ema"]["decay"], values["checkpoint"]["every_n_train_steps"]) == (0.2, 3)
    assert (values["seed_everything"], values["run_dir"]) == (7, "runs/side")
    assert default_run_dir(None, [str(top)]) == Path("runs/side")
    # what is written of a run is whole: it is read again without the files that it was made of
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(values))
    assert parsed(capsys, str(tmp_path / "again.yaml")) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: top.yaml", "'.*top.yaml' extends itself"),
        ("extends: side.yaml", "'.*top.yaml' extends itself"),
        ("extends: nowhere.yaml", "no file 'nowhere.yaml', neither in '.*' nor in .*dit_digits.yaml"),
        ("extends: {a: 1}", r"extends: \{'a': 1\}, expected the name of a file or a list of them"),
        ("extends: [1]", r"extends: \[1\], expected"),
        ("a: [", "'.*top.yaml' is no YAML file"),
    ],
)
def test_files_that_cannot_be_layered(tmp_path, capsys, text, message):
    write(tmp_path, top=text, side="extends: top.yaml")
    with pytest.raises(SystemExit):
        main(["test", f"--config={tmp_path / 'top.yaml'}"])
    assert re.search(message, capsys.readouterr().err)


def test_only_files_extend():
    for given in ("--extends=dit_digits.yaml", "--config=extends: dit_digits.yaml\nrun_dir: there\n"):
        with pytest.raises(SystemExit, match="extends: only files say what they extend"):
            main(["test", "--config=dit_digits.yaml", given])
