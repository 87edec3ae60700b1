"""The wheel is the whole product: what a clone has beside the package is within it there."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_diffclf.commands.configs import CONFIGS

ROOT = Path(__file__).parents[1]
PARTS = ("lightning_diffclf", "configs", "assets", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with nothing but the wheel, unpacked: made of a copy, because building leaves files behind."""
    source, built, site = (tmp_path_factory.mktemp(name) for name in ("source", "built", "site"))
    for part in map(ROOT.joinpath, PARTS):
        if part.is_dir():
            shutil.copytree(part, source / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(part, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning: Package" not in done.stderr  # of a folder that is not listed in pyproject.toml
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(site)
    return site


def files_of(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_it_has_all_files_and_no_others(installed):
    package = files_of(ROOT / "lightning_diffclf")
    configs = {f"configs/{name}" for name in files_of(CONFIGS)}
    assets = {f"assets/{name}" for name in files_of(ROOT / "assets")}
    assert {"__init__.pyi", "py.typed", "results/report.html.j2"} <= package
    assert {"configs/suites/digits.yaml", "configs/slurm/train.sbatch"} <= configs
    assert files_of(installed / "lightning_diffclf") == package | configs | assets
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"lightning_diffclf"}


def test_what_comes_with_it_is_found_from_anywhere(installed, tmp_path):
    code = """
from lightning_diffclf.commands import main
from lightning_diffclf.commands.configs import find
from lightning_diffclf.shipped import shipped
main(["configs", "--copy", "dit_digits.yaml", "--out", "mine.yaml"])
main(["configs", "--copy", "slurm/train.sbatch"])
main(["configs", "--copy", "suites/digits.yaml", "--out", "suite.yaml"])
main(["suite", "suite.yaml", "--dry-run"])
print(shipped("assets/sd_digits"), find("sd_digits.yaml"), sep="\\n")
"""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-3000:]
    package = installed / "lightning_diffclf"
    assert done.stdout.count("to do") == 6
    found = done.stdout.splitlines()[-2:]
    assert found == [str(package / "assets" / "sd_digits"), str(package / "configs" / "sd_digits.yaml")]
    assert (tmp_path / "mine.yaml").read_bytes() == (ROOT / "configs" / "dit_digits.yaml").read_bytes()
    job = (tmp_path / "train.sbatch").read_text()
    assert job == (ROOT / "configs" / "slurm" / "train.sbatch").read_text()
    assert "train.py" not in job  # which an installed package has not
