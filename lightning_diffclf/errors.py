"""What the user did wrong, told in one line: the command line shows these without a traceback, and nothing else."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was asked for cannot be done: names the thing, what was found and what was expected.

    Everything else that is raised is a defect, of this package or below it, and keeps its traceback.
    """


class WrongType(UserError, TypeError):
    """Something of another type than expected."""


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class FailedWrite(UserError, OSError):
    """A file that cannot be read or written: a full disk, no permission."""


def user_error(error: BaseException | None) -> UserError | None:
    """The error meant for the user: this one, or what others say was its cause; None if it is a defect."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


def check_at_least(least: int, **numbers: int | None) -> None:
    """Raise UserError unless each of ``numbers`` that is not None is whole, and ``least`` or more; names the first.

    Example:
        >>> check_at_least(1, batch_size=0)
        Traceback (most recent call last):
        lightning_diffclf.errors.UserError: batch_size: 0, expected at least 1
    """
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise WrongType(f"{name}: {value!r}, expected a whole number, at least {least}")
        if value is not None and value < least:
            raise UserError(f"{name}: {value}, expected at least {least}")


def first_line(error: BaseException) -> str:
    """What an error of another library says, as far as it fits into a message of ours."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
