"""Where a smaller model goes."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError


def check_output(output: str, model: Path | None = None) -> None:
    """Refuse the working directory, and the model's own folder.

    Raises:
        UserError: it is one of them.
    """
    if not output or output == ".":
        raise UserError("output: '.' is not allowed; name the folder to write")
    if model is not None and Path(output).resolve() == model.resolve():
        raise UserError(f"output: {output!r} is the model itself; give another folder")
