"""What pages of docs/ show is run, in an empty folder and made smaller by further flags."""

import re
import shlex
from pathlib import Path

import pytest

from lightning_diffclf.callbacks import training_plan
from tests.test_readme import MAINS, ROOT, SMALLER, commands_of

PAGES = ["images.md"]
FURTHER = {script: f"{flags} --trainer.accelerator=cpu --data.num_workers=0" for script, flags in SMALLER.items()}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_plan, "SECONDS", 0.02)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for language, code in re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL):
        if language == "python":
            exec(compile(code, name, "exec"), {})
            for path in tmp_path.glob("my_images/*/*.png"):
                if int(path.stem) % 10:
                    path.unlink()
        for command in commands_of(code) if language == "bash" else []:
            program, *flags = shlex.split(command)
            script = flags.pop(0) if program == "python" else program
            MAINS[script]([*flags, *FURTHER.get(script, "").split()])
    if name == "images.md":
        assert Path("threes_and_eights.png").is_file()
        assert len(list(Path("runs").glob("*/checkpoints/last.ckpt"))) == 3
