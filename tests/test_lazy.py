"""The package costs nothing until its names are asked for, and the method needs little else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_diffclf
from lightning_diffclf import classifier, lazy
from lightning_diffclf.commands import COMMANDS
from tests.results.made_up import made_up_rows, made_up_run

ROOT = Path(__file__).parents[1]
ELSE = """accelerate altair diffusers jsonargparse lightning lightning_fabric lightning_utilities matplotlib pandas peft
pyarrow pytorch_lightning rich sklearn tensorboard torch_fidelity torchmetrics transformers vl_convert webdataset"""
NETWORKS = """accelerate diffusers lightning sklearn timm torch torchmetrics torchvision transformers"""
PUBLIC = """DiT NoiseSchedule ConditionalDenoiser SearchableDenoiser Candidates DiffusionClassifier Classification Draws
Recipe Elimination Exhaustive Stages PairedTest LikelihoodRatio GradientSearch Posterior DiffusionClassifierCallback EMA
ClassConditionalDiT PublishedNetwork ZeroShotStableDiffusion"""


def python(*args: str) -> str:
    """What a fresh process prints."""
    settings = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, *args], **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("package", [lightning_diffclf, classifier], ids=lambda package: package.__name__)
def test_all_names_are_there(package):
    for name in package.__all__:
        value = getattr(package, name)
        assert value is vars(package)[name]  # asked for once
        assert getattr(value, "__name__", name) == name
    assert set(package.__all__) <= set(dir(package))
    star: dict[str, object] = {}
    exec(f"from {package.__name__} import *", star)
    assert star.keys() >= set(package.__all__)


def test_the_public_names_are_these():
    assert set(PUBLIC.split()) <= set(lightning_diffclf.__all__)
    with pytest.raises(AttributeError, match="module 'lightning_diffclf' has no attribute 'Nonsense'"):
        lightning_diffclf.Nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Nonsense'"):
        from lightning_diffclf import Nonsense  # noqa: F401


def test_a_stub_is_the_list(tmp_path):
    (tmp_path / "__init__.pyi").write_text("from a.b import C as C\nfrom a.b import D as D, E as E\n\nversion: str\n")
    assert lazy.imported_by(tmp_path / "__init__.pyi") == {"C": "a.b", "D": "a.b", "E": "a.b"}


def test_help_and_names_import_nothing_slow():
    """Neither the package, nor the list of commands, nor the options of any that need no Trainer."""
    quick = [name for name, command in COMMANDS.items() if command.module is not None]
    assert len(quick) >= 11
    code = f"""
import sys
from contextlib import suppress
import lightning_diffclf
from lightning_diffclf.commands import main
for args in [[], {", ".join(f"[{name!r}]" for name in quick)}]:
    with suppress(SystemExit):
        main([*args, "--help"])
print(*{{name.split(".")[0] for name in sys.modules}})
"""
    *shown, modules = python("-c", code).splitlines()
    assert not {"torch", "lightning", "scipy", "pandas", "pyarrow", "matplotlib", "rich", "PIL"} & set(modules.split())
    assert sum("usage: diffclf" in line for line in shown) == 1 + len(quick)


def test_the_method_and_the_network_need_little():
    """They run where nothing but torch, numpy, scipy, timm and einops, and what these need, can be imported."""
    script = ROOT / "tests" / "scripts" / "classify_toy.py"
    code = f"import runpy, sys; sys.modules |= dict.fromkeys({ELSE.split()}); runpy.run_path({str(script)!r})"
    assert 2 * 2 * 3 <= int(python("-c", code)) <= 2 * 4 * 3  # images, draws, classes


def test_results_are_read_without_torch(tmp_path):
    """Report, comparison and merge: what their processes cannot import, they do not need, nor spend memory on."""
    for name in ("a", "b"):
        made_up_run(tmp_path / name, list(made_up_rows(80, 3)), 3)
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(NETWORKS.split())}:
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from lightning_diffclf.commands import main
main(["report", "a"])
main(["compare", "a", "b", "--out", "both"])
main(["merge", "a", "a", "--out", "whole"])
main(["leaderboard", "a", "b"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreement" in done.stdout
    assert all(
        (tmp_path / name).is_file()
        for name in ("a/report.html", "both/cost.svg", "whole/predictions.parquet", "leaderboard.html")
    )
