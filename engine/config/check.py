"""The one check that every field uses."""

from __future__ import annotations

from engine.errors import UserError


def require(condition: bool, name: str, value: object, remedy: str) -> None:
    """Raise a `UserError` that names the field, its value and the remedy unless `condition` holds."""
    if not condition:
        raise UserError(f"{name}: {value!r} is not allowed; {remedy}")
