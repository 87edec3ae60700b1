"""Imports run downwards: each layer of docs/architecture.md imports the layers below it, and none of its siblings."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_diffclf"

GROUND: set[str] = set()  # any module that is not listed here: imports others of the ground only
LAYERS = {
    "data": GROUND,
    "denoiser": GROUND,
    "classifier": {"denoiser"},
    "models": {"denoiser"},
    "results": {"data", "denoiser", "classifier"},
    "sampling": GROUND,
    "modules": {"data", "denoiser", "models", "sampling"},
    "baselines": {"data", "models", "modules", "sampling"},
    "callbacks": {"data", "denoiser", "classifier", "models", "results", "modules", "sampling"},
}
TOP = {
    "__init__",
    "__main__",
    "app",
    "cli",
    "commands",
    "classify",
    "trained",
    "zero_shot",
    "estimator",
}  # import what they like; nothing below imports them

EXCEPTIONS = {
    ("classifier/from_checkpoint.py", "trained"): "DiffusionClassifier.from_checkpoint: imported when it is called",
}  # (file, layer that it imports): why


def imports_of(path: Path) -> set[str]:
    """Names of the modules that a file imports anywhere, also within functions."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    members = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in members), f"{path}: a relative import"
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    # ``from package import name`` may name a module or a member of the package: here, of the package itself
    return names | {f"{node.module}.{alias.name}" for node in members for alias in node.names}


def layer_of(name: str) -> str:
    """``lightning_diffclf.data.stream.Share`` is of ``data``."""
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    file = path.relative_to(PACKAGE).as_posix()
    own = file.removesuffix(".py").split("/")[0]
    if own in TOP:
        return
    found = {layer_of(name) for name in imports_of(path) if name.split(".")[0] == PACKAGE.name} - {own}
    above = {layer for layer in found if layer in LAYERS.keys() | TOP} - LAYERS.get(own, GROUND)
    excepted = {layer for name, layer in EXCEPTIONS if name == file}
    assert above == excepted, f"{file} imports {sorted(above)}; {own} may import {sorted(LAYERS.get(own, GROUND))}"


def test_the_package_does_not_import_scikit_learn():
    """Its examples and the estimator do, when they are imported."""
    left, seen = [PACKAGE / "__init__.py"], set()
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.parse(path.read_text()).body:  # not what functions import
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            assert not any(name.split(".")[0] == "sklearn" for name in names), path
            own = [PACKAGE.parent / name.replace(".", "/") for name in names if name.split(".")[0] == PACKAGE.name]
            files = [one for place in own for one in (place.with_suffix(".py"), place / "__init__.py")]
            left += [one for one in files if one.is_file()]
    assert len(seen) > 1


def test_the_method_needs_neither_lightning_nor_diffusers():
    for layer in ("classifier", "denoiser.py", "schedule.py", "noise.py"):
        place = PACKAGE / layer
        for path in place.rglob("*.py") if place.is_dir() else [place]:
            roots = {name.split(".")[0] for name in imports_of(path)}
            assert not roots & {"lightning", "diffusers", "transformers", "torchmetrics"}, path
