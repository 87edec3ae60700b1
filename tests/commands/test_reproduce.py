"""What a table of the paper lacks on this machine, what it would run, and what it says of runs that are there."""

import json
from pathlib import Path

import pytest

from lightning_diffclf.cli import train
from lightning_diffclf.commands import arguments, main, run
from lightning_diffclf.commands.cells import commands_of, folder_of
from lightning_diffclf.commands.configs import CONFIGS
from lightning_diffclf.commands.evaluate import check_evaluation
from lightning_diffclf.commands.reproduce import outcome
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.results.errors import ERRORS
from lightning_diffclf.results.paper import FIGURES, TABLES, Cell, Figure
from tests.baselines.evaluation import evaluate
from tests.classifier.toys import Toy
from tests.data.test_corruptions import Counting
from tests.results.test_ablations import NULL, WithNull, stored


def test_every_cell_names_configurations_that_there_are():
    tables = {"table1", "table3", "table4", "table5", "table8", "table9", "table10", "digits"}
    assert set(TABLES) == {*tables, "fig3", "fig4", "fig6", "fig8"}
    assert FIGURES.keys() == {"fig3", "fig4", "fig8", "digits"}
    places = [folder_of(Path("out"), table, cell) for table, cells in TABLES.items() for cell in cells]
    assert len(set(places)) == len(places)
    for cells in [*TABLES.values(), *([figure.cell for figure in figures] for figures in FIGURES.values())]:
        for cell in cells:
            names = [flag.split("=")[1] for flag in (*cell.flags, *cell.training) if flag.startswith("--config=")]
            assert names or any(cell.network == other.row for others in TABLES.values() for other in others)
            assert all((CONFIGS / name).is_file() for name in names)
    values = {(cell.row, cell.column): cell.paper for cell in TABLES["table4"]}
    assert values["ResNet-50", "imagenet_a"] == 0.0
    assert values["Diffusion Classifier, 512", "imagenet_a"] == 30.2
    losses = {(cell.row, cell.column): (cell.paper, cell.flags[-1]) for cell in TABLES["table5"]}
    assert losses["512, l2+kl", "imagenetv2"] == (66.6, "--classifier.loss=l2+kl")
    versions = {(cell.row, cell.column): cell.paper for cell in TABLES["table10"]}
    rows = {cell.row for cell in TABLES["table1"]}
    assert len(rows) == 5
    assert len(TABLES["table1"]) == 5 * 8
    first = {(cell.column): cell.paper for cell in TABLES["table1"] if cell.row == "Diffusion Classifier"}
    assert first == {data: versions["Stable Diffusion 2.0", data] for data in first}


def test_it_says_what_is_missing_and_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    run("reproduce", ["table3"])
    shown = capsys.readouterr().out
    assert "missing: facebook/winoground: accept its terms on the Hub" in shown
    assert "missing: openai/clip-vit-large-patch14: hf download openai/clip-vit-large-patch14" in shown
    found = json.loads(Path("runs/reproduce/table3/reproduction.json").read_text())
    assert [cell["paper"] for cell in found["cells"]] == [38.5, 28.2, 33.0]
    assert all(len(cell["missing"]) == 2 for cell in found["cells"])
    with pytest.raises(SystemExit, match="error: no table 'table6'"):
        main(["reproduce", "table6"])
    run("reproduce", ["fig6"])
    assert "missing: data/timm/results-imagenet-a.csv: results/ of github.com" in capsys.readouterr().out


def test_runs_that_are_there_are_not_run_again(tmp_path, capsys):
    """Evaluations of another network in the places of two cells: whatever stands there is reported."""
    cell = TABLES["digits"][0]
    folder = folder_of(tmp_path, "digits", cell)
    _, report = evaluate(folder / "evaluation", Counting(), DigitsDataModule())
    run("reproduce", ["digits", f"--out={tmp_path}", "--dry-run"])
    assert "not run" in capsys.readouterr().out
    first, *others = json.loads((tmp_path / "digits" / "reproduction.json").read_text())["cells"]
    assert first["ours"] == pytest.approx(100 * report["metrics"]["accuracy"])
    assert (first["images"], first["nfe_per_image"]) == (360, 1)
    assert "verdict" not in first  # the paper has no digits
    assert not any("ours" in one for one in others)
    claims = {first["ours"]: "inside", first["high"] + 0.1: "outside", first["low"] - 0.1: "outside"}
    assert {paper: outcome(cell._replace(paper=paper), folder)["verdict"] for paper in claims} == claims


def test_what_it_runs(tmp_path):
    cells = {cell.row: cell for cell in TABLES["digits"]}
    trained, zero_shot = cells["DiT as classifier"], cells["tiny CLIP, zero-shot"]
    fit, evaluation = commands_of(trained, tmp_path, ["--trainer.accelerator=cpu"])
    assert fit == ["fit", "--config=dit_digits.yaml", f"--run_dir={tmp_path}"]
    checkpoint = f"--ckpt={tmp_path}/checkpoints/last.ckpt"
    rule = ["--classifier.elimination=LikelihoodRatio", "--classifier.elimination.alpha=0.01"]
    assert evaluation == ["evaluate", checkpoint, *rule, f"--out={tmp_path}/evaluation", "--trainer.accelerator=cpu"]
    assert commands_of(zero_shot, tmp_path, []) == [
        ["evaluate", "--config=clip_digits.yaml", f"--out={tmp_path}/evaluation"]
    ]


def test_images_are_drawn_before_a_network_is_trained_on_them(tmp_path):
    cells = {cell.row: cell for cell in TABLES["digits"]}
    folder = folder_of(tmp_path, "digits", cells["Synthetic SD Data"])
    draw, fit, evaluation = commands_of(cells["Synthetic SD Data"], folder, [])
    assert (draw[0], draw[-1]) == ("sample", f"--out={folder}/drawn")
    assert fit == ["fit", "--config=synthetic_digits.yaml", f"--data.root={folder}/drawn", f"--run_dir={folder}"]
    assert evaluation[0] == "evaluate"
    assert f"--ckpt={folder}/checkpoints/last.ckpt" in evaluation


def test_a_cell_may_evaluate_the_network_of_another_row(tmp_path):
    cells = {cell.row: cell for cell in TABLES["digits"]}
    own = folder_of(tmp_path, "digits", cells["DiT, l1"])
    [command] = commands_of(cells["DiT, l1"], own, [])
    network = folder_of(tmp_path, "digits", cells["DiT as classifier"])
    assert command == [
        "evaluate",
        f"--ckpt={network}/checkpoints/last.ckpt",
        "--classifier.loss=l1",
        "--classifier.elimination=PairedTest",
        f"--out={own}/evaluation",
    ]


def test_baselines_of_table_1_are_drawn_trained_and_evaluated(tmp_path):
    cells = {(cell.row, cell.column): cell for cell in TABLES["table1"]}
    folder = folder_of(tmp_path, "table1", cells["Synthetic SD Data", "imagenet"])
    draw, fit, evaluation = commands_of(cells["Synthetic SD Data", "imagenet"], folder, [])
    assert {"--labels=@imagenet:data/imagenet/val", "--prompts=imagenet", f"--out={folder}/drawn"} < set(draw)
    assert f"--data.root={folder}/drawn" in fit
    assert f"--ckpt={folder}/checkpoints/last.ckpt" in evaluation
    assert {"--data=ZeroShotDataModule", "--data.name=imagenet", "--data.per_class=2"} < set(evaluation)
    objectnet = cells["SD Features", "objectnet"]
    [command] = commands_of(objectnet, folder_of(tmp_path, "table1", objectnet), [])
    trained = folder_of(tmp_path, "table1", cells["SD Features", "imagenet"])
    assert command[1] == f"--ckpt={trained}/checkpoints/last.ckpt"  # there is nothing else to train on
    assert [one.what for one in objectnet.needs][:2] == ["data/objectnet-1.0", "data/imagenet/train"]


@pytest.mark.parametrize(
    ("row", "column"), [("SD Features", "pets"), ("Synthetic SD Data", "pets"), ("CLIP ResNet-50", "objectnet")]
)
def test_what_they_are_asked_to_do_is_understood(row, column, tmp_path, monkeypatch, capsys):
    """Settings only: nothing is loaded."""
    monkeypatch.chdir(tmp_path)
    [cell] = [cell for cell in TABLES["table1"] if (cell.row, cell.column) == (row, column)]
    if cell.training:
        with pytest.raises(SystemExit) as ended:
            train([*cell.training, "--model.num_classes=37", "--print_config"])
        assert ended.value.code in (0, None)
        assert "max_steps: 20000" in capsys.readouterr().out
    else:
        check_evaluation(arguments.evaluate(list(cell.flags)))


def test_a_figure_is_drawn_from_the_errors_of_one_run(tmp_path, monkeypatch, capsys):
    """A stored run in the place of that of the figures; a package that is missing is said like weights."""
    cell = Cell("Toy", "images", None, ("--config=sd_pets.yaml",))
    found = {("guidance", "guidance", 0.0): 86.0}
    figures = {"fig8": [Figure(cell, ("guidance",), found)], "fig3": [Figure(FIGURES["fig3"][0].cell, ("one draw",))]}
    monkeypatch.setattr("lightning_diffclf.commands.reproduce.FIGURES", figures)
    folder = folder_of(tmp_path, "figures", cell) / "evaluation"
    folder.mkdir(parents=True)
    stored(folder / ERRORS, WithNull())
    (folder / "metrics.json").write_text("{}")
    run("reproduce", ["fig8", f"--out={tmp_path}", "--dry-run"])
    printed = capsys.readouterr().out
    assert "paper, read off" in printed
    assert "86" in printed
    told = json.loads((tmp_path / "fig8" / "reproduction.json").read_text())["ablations"]
    assert {(one["run"], one["ablation"]) for one in told} == {("Toy", "guidance")}
    assert [one["paper"] for one in told if one["x"] == 0] == [86.0]
    assert (tmp_path / "fig8" / "figures" / "toy" / "guidance.svg").is_file()
    assert NULL not in printed
    run("reproduce", ["fig3", f"--errors={folder}", f"--out={tmp_path}/own"])  # of any evaluation
    assert "one draw" in capsys.readouterr().out
    stored(tmp_path / ERRORS, Toy())
    for table, message in (("fig8", "says nothing of guidance; expected"), ("table1", "means nothing for table1")):
        with pytest.raises(SystemExit, match=f"error: errors: .*{message}"):
            main(["reproduce", table, f"--errors={tmp_path}", f"--out={tmp_path}/own"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning_diffclf.commands.reproduce.find_spec", lambda name: None)
    run("reproduce", ["fig3"])
    assert "missing: data/oxford-iiit-pet" in capsys.readouterr().out
    run("reproduce", ["table1"])
    shown = capsys.readouterr().out
    assert "missing: open_clip: pip install 'lightning-diffclf[baselines]'" in shown
    assert "missing: timm/resnet50_clip.openai: hf download timm/resnet50_clip.openai" in shown
    assert "missing: data/imagenet/train: image-net.org" in shown
