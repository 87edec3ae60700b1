"""The notebooks of docs/ run, and print what they show; numbers may differ a little on other machines."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type in ("stream", "display_data") for output in outputs)
    return "".join(output.text for output in outputs if output.output_type == "stream")


def executed(name: str, folder: Path) -> tuple[str, str]:
    """What a notebook prints now, and what it shows as it is stored."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    shown = printed(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return printed(notebook), shown


def without_numbers(text: str) -> str:
    return re.sub(r"\s*\d[\d.]*", " #", text)


def test_quick_start(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    now, shown = executed("quick_start", tmp_path)
    assert without_numbers(now) == without_numbers(shown)
    answers = re.findall(r"^(\w+) +(\w+) +[\d.]+%", now, re.MULTILINE)
    assert len(answers) == 8
    assert sum(truth == answer for truth, answer in answers) >= 7
    assert "same decisions: True" in now


def test_own_model(tmp_path):
    now, shown = executed("own_model", tmp_path)
    assert without_numbers(now) == without_numbers(shown)
    right, calls = re.search(r"(\d+)% of 120 images right\n(\d+) network calls", now).groups()
    assert int(right) >= 90
    assert int(calls) < 100


@pytest.mark.parametrize("name", ["quick_start", "own_model"])
def test_it_is_small(name):
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 40_000
