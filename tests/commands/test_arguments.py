"""What commands take, where it is said a second time because torch would make the help slow."""

from dataclasses import fields
from typing import get_type_hints

from lightning_diffclf.classifier import Recipe
from lightning_diffclf.commands import arguments
from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.zero_shot import RECIPE

ELSEWHERE = {"candidates": "--labels", "proposal": "--search", "elimination": "of RECIPE where none is given"}


def test_classify_takes_each_field_of_a_recipe(monkeypatch):
    parsers = []
    monkeypatch.setattr(Parser, "read", lambda self, args: parsers.append(self))
    arguments.classify([])
    given = {action.dest: action for action in parsers[0]._actions}
    plain = {field.name for field in fields(Recipe)} - set(ELSEWHERE)
    assert plain <= set(given)
    assert {name: given[name].default for name in plain} == {name: getattr(RECIPE, name) for name in plain}
    types = {name: given[name]._typehint for name in plain if hasattr(given[name], "_typehint")}
    hints = get_type_hints(Recipe)
    assert {name: types[name] for name in types if name != "draws"} == {
        name: hints[name] for name in types if name != "draws"
    }
