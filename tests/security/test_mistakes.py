"""Common mistakes are one clear error each."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_diffclf import Candidates, DiffusionClassifier, DiffusionClassifierCallback, Draws, NoiseSchedule
from lightning_diffclf.cli import evaluate, main, train
from lightning_diffclf.data.prompts import from_csv
from lightning_diffclf.errors import UserError
from tests.classifier.toys import Toy
from tests.results.made_up import made_up_rows, made_up_run


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def told(capsys, command, args) -> str:
    """The one message of a command that must fail."""
    with pytest.raises(SystemExit) as exit_info:
        command(args)
    message = f"{exit_info.value.code if isinstance(exit_info.value.code, str) else ''}{capsys.readouterr().err}"
    assert "Traceback" not in message
    assert len(message) < 1500
    return message


@pytest.mark.parametrize(
    "content",
    [
        b"data: [", b"a: b: c", b"\xff\xfea\x00", b"run_dir: \xe9", b"a: 2024-13-45", b"- a\n- b", b"3", b"\x00",
        b"!!python/object/apply:os.system ['touch PWNED']", b"model: &a [*a]", b"model: &a {b: [*a]}", b"", b"# none\n",
    ],
)  # fmt: skip
def test_files_of_settings(content, capsys):
    Path("x.yaml").write_bytes(content)
    assert "error: config: 'x.yaml'" in told(capsys, evaluate, ["--config=x.yaml"])
    assert "config: 'x.yaml'" in told(capsys, train, ["--config=x.yaml"])
    assert not Path("PWNED").exists()


HEAD = b"prompt,classname,classidx\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,classname,classidx\nna\u00efve,na\u00efve,0\n".encode("latin-1"), "is not in UTF-8, byte 28"),
        ("prompt,classname,classidx\na,a,0\n".encode("utf-16"), "is not in UTF-8, byte 0"),
        (HEAD + b'"' + b"a" * 200_000 + b'",a,0\n', "cannot be read as CSV (field larger than field limit"),
        (HEAD + b"a,a,99999999999999999999\n", "line 2: "),
        (HEAD + b"a,a," + b"9" * 5000 + b"\n", "line 2: "),
        (HEAD + b"a,a,999999999\n", "has no prompt for class 0 (999999999 classes without one)"),
        (HEAD + "a,a,\u0663\n".encode(), "line 2: "),
        (HEAD + b"a,a,1.5\n", "line 2: "),
        (HEAD + b"a,a,-1\n", "line 2: "),
        (HEAD + b"a\n", "line 2: "),
        (b"classidx,classname,prompt\n0,a,a photo of a, without quotes\n", "no more fields than columns"),
        (HEAD + b",a,0\n", "line 2: "),
        (HEAD, "has no rows"),
        (b"", "lacks ['prompt', 'classname', 'classidx']"),
        (
            b"\0" * 10,
            "lacks ['prompt', 'classname', 'classidx']" if sys.version_info >= (3, 11) else "line contains NUL",
        ),
    ],
)
def test_prompts_in_csv(content, message):
    Path("p.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        from_csv("p.csv")
    assert "prompts: 'p.csv'" in str(error.value)
    assert message in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("names", ["abc", b"abc", 3, None])
def test_a_name_is_no_list_of_names(names):
    with pytest.raises(UserError, match="expected a list of names"):
        Candidates(names)
    if names is not None:
        with pytest.raises(UserError, match="expected a list of names"):
            Candidates(["a", "b", "c"], class_names=names)


@pytest.mark.parametrize("index", [0.5, "1", None, float("nan"), float("inf"), 10**20, [0], -1])
def test_class_indices_are_whole_numbers(index):
    with pytest.raises(UserError, match="candidates: class index"):
        Candidates(["a", "b"], [0, index])


def test_usual_class_indices():
    for index in (1, 1.0, np.int64(1), torch.tensor(1), np.float32(1)):
        assert Candidates(["a", "b"], [0, index]).classes == (0, 1)


@pytest.mark.parametrize(
    ("schedule", "timesteps"),
    [
        (NoiseSchedule.linear(), [0, 1000]),
        (NoiseSchedule.linear(), [-1, 5]),
        (NoiseSchedule.linear(), [0.5, 5.0]),
        (NoiseSchedule.linear(), [[1], [2]]),
        (NoiseSchedule.rectified_flow(), [0.5, 1.5]),
        (NoiseSchedule.rectified_flow(), [-0.1, 0.5]),
        (NoiseSchedule.rectified_flow(), [float("nan"), 0.5]),
    ],
)
def test_timesteps_are_on_the_schedule(schedule, timesteps):
    with pytest.raises(UserError, match=r"draws: timesteps of shape .* from .* to .*, expected"):
        Draws(2, timesteps=torch.tensor(timesteps)).visit(schedule)


def test_fixed_draws_are_tensors():
    for name in ("timesteps", "noise"):
        with pytest.raises(TypeError, match=f"draws: {name} are a list, expected a tensor of 2"):
            Draws(2, **{name: [1, 2]})
        with pytest.raises(TypeError, match=f"draws: {name} are a Tensor"):
            Draws(2, **{name: torch.tensor(2)})
    toy = Toy()
    usual = toy.schedule.timesteps(2)
    assert torch.equal(DiffusionClassifier(toy, Draws(2, timesteps=usual)).timesteps_S, usual)


@pytest.mark.parametrize("out", ["", " ", "a\0b"])
def test_places_to_write_to_have_names(out, capsys):
    made_up_run(Path("run"), made_up_rows(5, 3), 3)
    before = sorted(Path().rglob("*"))
    for args in (
        ["report", "run"], ["merge", "run"], ["compare", "run", "run"], ["replay", "x.parquet"],
        ["sample", "--ckpt=x"], ["export", "--ckpt=x"], ["shards", "--data=x"], ["encode", "--data=x"],
    ):  # fmt: skip
        assert f"out: {out!r}, expected the name of a file or folder" in told(capsys, main, [*args, f"--out={out}"])
    assert f"out: {out!r}, expected the name of a folder" in told(capsys, evaluate, ["--ckpt=x", f"--out={out}"])
    with pytest.raises(UserError, match="output_dir"):
        DiffusionClassifierCallback(output_dir=out)
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "content", [b"", b"{", b"3", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"identity": 1, "info": 2}',
                b'{"identity": {}, "info": {}}', b'{"identity": {}, "info": {"candidate_classes": 3}}'],
)  # fmt: skip
def test_settings_of_runs(content, capsys):
    run = made_up_run(Path("run"), made_up_rows(5, 3), 3)
    (run / "settings.json").write_bytes(content)
    for args in (["report", "run"], ["merge", "run", "--out=x"], ["compare", "run", "run"]):
        assert "error: run: '" in told(capsys, main, args)


def test_settings_whose_candidates_are_no_list(capsys):
    run = made_up_run(Path("run"), made_up_rows(5, 3), 3)
    values = json.loads((run / "settings.json").read_text())
    for name in ("candidate_classes", "class_names", "timesteps_S"):
        for value in (None, 3, [None], "abc", [[1]]):
            changed = values | {"info": values["info"] | {name: value}}
            (run / "settings.json").write_text(json.dumps(changed))
            assert "error: run: '" in told(capsys, main, ["report", "run"])
