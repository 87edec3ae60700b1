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
