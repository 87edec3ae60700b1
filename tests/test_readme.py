"""What the README shows is run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from lightning_diffclf import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands_of(code: str) -> list[str]:
    """The commands of a block of bash, without comments."""
    return [line.partition(" # ")[0].strip() for line in code.replace("\\\n", " ").splitlines()]


BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
ZERO_SHOT, TRAINED, OWN = (code for language, code in BLOCKS if language == "python")
COMMANDS = [command for language, code in BLOCKS if language == "bash" for command in commands_of(code)]
SMALLER = {
    "train.py": "--trainer.max_steps=3 --trainer.val_check_interval=3 --checkpoint.every_n_train_steps=3 "
    "--model.hidden_size=16 --model.depth=1 --model.num_heads=2 --model.warmup_steps=1 --classifier.fit_images=2 "
    "--samples.steps=2 --samples.columns=2 --trainer.enable_progress_bar=false",
    "evaluate.py": "--trainer.limit_test_batches=1 --data.eval_batch_size=3 --trainer.enable_progress_bar=false",
}
MAINS = {"train.py": cli.train, "evaluate.py": cli.evaluate, "diffclf": cli.main}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_commands_and_api_run_as_written(folder, monkeypatch, capsys):
    """In the order of the README, made smaller by further flags; then the Python example on what they left."""
    monkeypatch.chdir(folder)
    seen = set()
    for command in COMMANDS:
        program, *args = shlex.split(command)
        if program == "make":
            assert re.search(rf"^{args[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
        else:
            script, *flags = args if program == "python" else (program, *args)
            flags = [str(ROOT / flag) if flag.startswith("tests/") else flag for flag in flags]
            MAINS[script]([*flags, *SMALLER.get(script, "").split()])
            seen.add(script)
    assert seen == set(MAINS)
    assert len(list(Path("runs/dit_digits").glob("evaluation*"))) == 3
    assert Path("runs/dit_digits/all/errors.parquet").is_file()
    code = TRAINED.replace("Draws(100)", "Draws(10)").replace("draws=100", "draws=2").replace("(10, 100)", "(2, 10)")
    exec(compile(code, "README.md", "exec"), {})
    assert not list(folder.rglob("lightning_logs"))
    assert len(re.findall(r"^\d+ \d tensor\(", capsys.readouterr().out, re.MULTILINE)) == 4


def test_own_denoiser_classifies(capsys):
    torch.manual_seed(0)
    assert len(OWN.splitlines()) <= 30
    exec(compile(OWN, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "['dark', 'bright', 'bright']"


def test_zero_shot_says_which_digit(capsys):
    exec(compile(ZERO_SHOT.replace("tests/data", str(ROOT / "tests" / "data")), "README.md", "exec"), {})
    assert re.fullmatch(r"\[\{'score': 0\.\d+, 'label': '\w+'\}\]\n", capsys.readouterr().out)
