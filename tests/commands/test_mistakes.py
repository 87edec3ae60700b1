"""What the parser says, in plain words: the texts are those of jsonargparse and argparse."""

import pytest

from lightning_diffclf.commands.mistakes import explained, of_option, similar

OPTIONS = ["--trainer.max_steps", "--model", "--classifier.draws"]

NESTED = """Parser key "classifier.elimination":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'lightning_diffclf.classifier.elimination.Elimination'>, <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'lightning_diffclf.LikelihoodRatio':
        {}
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("unrecognized arguments: --draws 5", "no option '--draws'; did you mean '--classifier.draws'?"),
        ("unrecognized arguments: here --nothing=5 --draws", "no option '--nothing'"),
        (
            "Parser key \"data\":\n  Problem with given class_path 'lightning.LightningDataModule':\n    "
            "Option 'size' is not accepted\n  Given value type: <class 'dict'>",
            "data: options before a class is named; expected --data CLASS, or the file that names one first, and what "
            "changes it later (--config sd_pets.yaml --config clip.yaml)",
        ),
        (
            "the following arguments are required: fit.data, fit.model",
            "data and model: none given; expected --config FILE (`diffclf configs` lists those that come along)",
        ),
        ("Option 'modle' is not accepted", "no option 'modle'; did you mean 'model'?"),
        ('Parser key "x":\n  Something else', "x: Something else"),
        ("Something else", "Something else"),
        (
            NESTED.format("Option 'alfa' is not accepted"),
            "no option 'classifier.elimination.alfa'; did you mean 'classifier.elimination.alpha'?",
        ),
        (
            NESTED.format("Parser key \"alpha\":\n          Expected a <class 'float'>. Got value: much"),
            "classifier.elimination.alpha: 'much', expected float",
        ),
    ],
)
def test_messages(message, told):
    assert explained(message, OPTIONS) == told


def test_what_resembles_nothing_is_not_guessed():
    assert similar("--zebra", OPTIONS) == []
    assert similar("-", OPTIONS) == []


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("size: 0, expected 1", "data.size: 0, expected 1"),  # two have it, one has this value
        ("size: 1, expected 2", "size: 1, expected 2"),  # none has: made of others
        ("size: 'x', expected 2", "samples.size: 'x', expected 2"),
        ("alpha: 10, expected 1", "alpha: 10, expected 1"),  # 1 is not 10
        ("size", "size"),
    ],
)
def test_names_are_whole_where_that_is_certain(message, told):
    values = {"model.init_args.size": 4, "data.init_args.size": 0, "samples.size": "x", "a.alpha": 1, "b.alpha": 2}
    assert of_option(message, values) == told
