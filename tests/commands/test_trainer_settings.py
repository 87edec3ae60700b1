import re
from typing import Union

import pytest
from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer

from lightning_diffclf.cli import train
from lightning_diffclf.commands.trainer_settings import check_trainer, integers_first, refusals

FINE = [1, -1, 8, "auto", "3", "-1", "0,1", "2,", "[0, 3]", [0], [1, 4], None]
WRONG = [0, -3, "0", "-2", "nonsense", "[0,x]", "1.5", [], ["a"], ""]


@pytest.mark.parametrize("devices", FINE, ids=repr)
def test_devices(devices):
    check_trainer(Namespace(devices=devices))


@pytest.mark.parametrize("devices", WRONG, ids=repr)
def test_what_are_no_devices(devices):
    with pytest.raises(ValueError, match=r"trainer\.devices: .*, expected a number, -1 for all, a list"):
        check_trainer(Namespace(devices=devices))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "ddpp"}, r"trainer\.strategy: no strategy 'ddpp'; did you mean 'ddp'\?"),
        (
            {
                "strategy": Namespace(init_args=Namespace(data_parallel_size=8, tensor_parallel_size=1)),
                "devices": "2",
                "num_nodes": 1,
            },
            "data_parallel_size 8, tensor_parallel_size 1, but 2 processes",
        ),
        ({"strategy": "ddp_spwan"}, "did you mean 'ddp_spawn'"),
        ({"accelerator": "gpuu"}, r"trainer\.accelerator: no accelerator 'gpuu'; did you mean 'gpu'\?"),
        ({"accumulate_grad_batches": 0}, r"trainer\.accumulate_grad_batches: 0, expected at least 1"),
    ],
)
def test_names_and_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        check_trainer(Namespace(**settings))
    check_trainer(Namespace(strategy="ddp_find_unused_parameters_true", accelerator="cuda", accumulate_grad_batches=2))
    check_trainer(Namespace(strategy=Namespace(class_path="lightning.pytorch.strategies.FSDPStrategy")))


def test_what_lightning_refuses_is_a_line():
    with pytest.raises(ValueError, match=r"^trainer: `max_steps` must be a non-negative integer or -1"), refusals():
        Trainer(max_steps=-7, logger=False)
    with pytest.raises(ZeroDivisionError), refusals():  # a defect keeps its traceback
        print(1 / 0)


def test_on_the_command_line(capsys, tmp_path):
    """Before anything is made; what the parser itself refuses names what was probably meant as well."""
    common = ["--config=dit_digits.yaml", f"--run_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    for flags, message in (
        (["--trainer.precision=bf61"], "trainer.precision: 'bf61', expected int or one of "),
        (["--trainer.precision=bf61"], "; did you mean 'bf16'?"),
        (["--trainer.strategy=ddpp"], "did you mean 'ddp'?"),
        (["--trainer.accelerator=tpu"], "error: trainer: "),
    ):
        with pytest.raises(SystemExit) as left:
            train([*common, *flags])
        said = f"{left.value.code if isinstance(left.value.code, str) else ''}{capsys.readouterr().err}"
        assert message in said
        assert len(said) < 700
    assert not list(tmp_path.iterdir())


class Limited:
    """As Trainer."""

    def __init__(self, limit: int | float | None = None, often: int | float | str | None = None) -> None: ...


@pytest.mark.parametrize(("given", "meant"), [("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("null", None)])
def test_one_is_one_batch_and_one_point_zero_are_all(given, meant):
    parser = ArgumentParser()
    parser.add_class_arguments(Limited, "trainer")
    actions = {action.dest: action for action in parser._actions}
    actions["trainer.limit"]._typehint = Union[float, int, None]  # noqa: UP007  (which Python 3.10 takes it for)
    actions["trainer.often"]._typehint = Union[float, int, str, None]  # noqa: UP007
    args = [f"--trainer.limit={given}", f"--trainer.often={given}"]
    assert (repr(parser.parse_args(args).trainer.limit) == repr(meant)) == (given != "1")  # the mistake
    integers_first(parser)
    found = parser.parse_args(args).trainer
    assert repr(found.limit) == repr(found.often) == repr(meant)
    assert repr(parser.parse_object({"trainer": {"limit": meant}}).trainer.limit) == repr(meant)


def test_the_trainer_has_such_options(capsys):
    with pytest.raises(SystemExit):
        train(["fit", "--help"])
    options = " ".join(capsys.readouterr().out.split()).partition(" options: ")[2].split(" --trainer.")
    described = {option.partition(" ")[0]: option for option in options}
    limits = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
    for name in (*limits, "overfit_batches", "val_check_interval"):
        assert re.search(r"\(type: (Optional\[)?Union\[int, float\b", described[name]), name
