"""The errors that a person reads as one line, without a traceback."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UserError(ValueError):
    """A mistake in what the user gave: a field, a path, a file's content.

    The message is one line that names the field, the value and the remedy. Commands print it without a
    traceback and exit with code 2; what is no `UserError` or `RunError` is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class SharedError(UserError):
    """A mistake that the ranks have told one another of, so that all of them end.

    Attributes:
        speaks: whether this rank is one that tells the user.
    """

    def __init__(self, message: str, *, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


class RunError(RuntimeError):
    """A run that can't go on though nobody gave it anything wrong, such as one whose loss diverged.

    Printed as one line like a `UserError`; the exit code is 1.
    """


class LostRankError(RunError):
    """Another rank has gone in the middle of a collective: it died, was killed, or ended with an error of its own.

    The ranks that are left meet it, and nothing collective is possible any more.

    Attributes:
        speaks: whether this rank is the one that tells the user.
    """

    #: what such a rank says of its own end
    LAST_WORD = "lost another rank"

    def __init__(self, message: str, *, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


class LateRanksError(RunError):
    """Ranks that didn't come to the start within fault.hang_timeout; the exit code is `HANG_EXIT_CODE`."""


#: exit code of a rank that has made no progress for fault.hang_timeout (EX_TEMPFAIL): start the job again
HANG_EXIT_CODE = 75


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a `UserError` that names the field, its value and the remedy unless `condition` holds."""
    if not condition:
        raise UserError(f"{name}: {value!r} is not allowed; {remedy}")
