"""Pictures drawn by another process are those that this one would draw, and there are some without it."""

import json
import sys

import pytest

from lightning_diffclf.results import drawing
from lightning_diffclf.results.drawing import pictures

CHART = json.dumps({"data": {"values": [{"x": 1}, {"x": 2}]}, "mark": "point", "encoding": {"x": {"field": "x"}}})


def test_another_process_draws_the_same(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("base64", "vl_convert", "lightning_diffclf"):  # of a folder of others: not imported
        (tmp_path / f"{name}.py").write_text("raise SystemExit(1)")
    drawn = drawing.svg(CHART)
    here = drawn, drawing.png(drawn)
    monkeypatch.setattr(drawing, "_draw", lambda charts: pytest.fail("it was drawn here"))
    assert pictures({"a": CHART, "b": CHART}) == {"a": here, "b": here}
    assert here[0].startswith("<svg")
    assert here[1].startswith(b"\x89PNG")


@pytest.mark.parametrize("python", ["/bin/false", "/nowhere/python"])
def test_without_another_process_pictures_are_drawn_here(python, monkeypatch):
    monkeypatch.setattr(sys, "executable", python)
    assert pictures({"a": CHART}).keys() == {"a"}


def test_a_chart_that_cannot_be_drawn_says_so():
    with pytest.raises(ValueError, match="conversion failed"):
        pictures({"a": '{"mark": "nonsense"}'})
