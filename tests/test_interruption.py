import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_diffclf.interruption import interrupt, uninterrupted


def leave():
    raise SystemExit(3)


def told_twice(done):
    with uninterrupted():
        with uninterrupted():
            interrupt(leave)
            interrupt(leave)
            done.append("inner")
        done.append("outer")


def told_before_an_error():
    with uninterrupted():
        interrupt(leave)
        raise OSError("full")


def test_what_must_not_be_interrupted_is_done_first():
    done = []
    with pytest.raises(SystemExit, match="3"):
        told_twice(done)
    assert done == ["inner", "outer"]
    with uninterrupted():  # nothing waits any more
        pass
    with pytest.raises(SystemExit):
        interrupt(leave)


def test_errors_are_not_lost():
    with pytest.raises(SystemExit) as left:
        told_before_an_error()
    assert isinstance(left.value.__context__, OSError)


PROGRAM = """
import atexit, os, sys
from lightning_diffclf.interruption import Left, leaves_at_once

class Part:
    def __del__(self, write=os.write):
        write(1, b"taken apart")

part = sys.part = Part()
with leaves_at_once():
    atexit.register(print, "closed")
    print("saved", end=", ")
    {end}
"""


@pytest.mark.parametrize(
    ("end", "printed", "status"),
    [
        ("raise Left(143)", "saved, closed\n", 143),
        ("raise Left(0)", "saved, closed\n", 0),
        ("raise SystemExit(2)", "saved, closed\ntaken apart", 2),
        ("raise ValueError", "saved, closed\ntaken apart", 1),
        ("pass", "saved, closed\n", 0),
    ],
)
def test_a_program_that_is_done_is_not_taken_apart(end, printed, status):
    command = [sys.executable, "-c", PROGRAM.format(end=end)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (printed, status), done.stderr


def test_what_cannot_be_printed_is_not_lost_in_silence():
    command = [sys.executable, "-c", PROGRAM.format(end="pass")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    settings = {"cwd": Path(__file__).parents[1], "env": buffered, "stderr": subprocess.PIPE, "text": True}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, **settings)
    assert done.returncode == 120
    assert "No space left on device" in done.stderr
