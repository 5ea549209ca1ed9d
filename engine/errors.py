"""The one error type that a user's mistake raises."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave: a field, a path, a file's content.

    The message is one line that names the field, the value and the remedy. Commands print it without a
    traceback and exit with code 2; anything else that escapes is a defect of ours and keeps its traceback.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
