"""The errors that a person reads as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: a field, a path, a file's content.

    The message is one line that names the field, the value and the remedy. Commands print it without a
    traceback and exit with code 2; what is no `UserError` or `RunError` is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RunError(RuntimeError):
    """A run that can't go on though nobody gave it anything wrong, such as one whose loss diverged.

    Printed as one line like a `UserError`; the exit code is 1.
    """
