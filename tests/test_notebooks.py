"""The notebooks of docs/ run, and print what they show; numbers may differ a little on other machines."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


NAMES = ["quick_start", "own_model"]


def printed(cells: list[nbformat.NotebookNode]) -> str:
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What each notebook prints as it is stored."""
    return {name: printed(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells) for name in NAMES}


@pytest.fixture(scope="module")
def now(tmp_path_factory) -> dict[str, str]:
    """What each prints now: in one kernel, which imports once, and forgets all names in between."""
    cells = {name: nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4).cells for name in NAMES}
    whole = nbformat.v4.new_notebook()
    for some in cells.values():
        whole.cells += [nbformat.v4.new_code_cell("%reset -f"), *some]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        resources = {"metadata": {"path": str(tmp_path_factory.mktemp("notebooks"))}}
        NotebookClient(whole, timeout=300, resources=resources).execute()
    return {name: printed(some) for name, some in cells.items()}


def without_numbers(text: str) -> str:
    return re.sub(r"\s*\d[\d.]*", " #", text)


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_what_it_shows(name, now, shown):
    assert without_numbers(now[name]) == without_numbers(shown[name])


def test_quick_start(now):
    answers = re.findall(r"^(\w+) +(\w+) +[\d.]+%", now["quick_start"], re.MULTILINE)
    assert len(answers) == 8
    assert sum(truth == answer for truth, answer in answers) >= 7
    assert "same decisions: True" in now["quick_start"]


def test_own_model(now):
    right, calls = re.search(r"(\d+)% of 120 images right\n(\d+) network calls", now["own_model"]).groups()
    assert int(right) >= 90
    assert int(calls) < 100


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 40_000
