"""What a user wants of a pruned model, in words: "speed 2x", "flops 0.5", "size 30MB", "heads 0.5, neurons 0.4"."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError
from engine.model.pruning.units import Kind

Measure = Literal["speed", "flops", "size", "share"]
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9}
_WISH = re.compile(r"(speed|flops|size|heads|neurons)\s+([0-9.]+)\s*(x|kb|mb|gb)?", re.IGNORECASE)
REMEDY = "give speed 2x, flops 0.5, size 30MB, heads 0.5, neurons 0.4, or the last two with a comma between"


@dataclass(frozen=True)
class Target:
    """A bound of one measure."""

    measure: Measure
    value: float = 0.0
    """speed: how many times as fast; flops: share of the encoder's; size: bytes"""
    shares: tuple[tuple[Kind, float], ...] = ()
    """share: how many of the heads, neurons or both are kept"""

    def __str__(self) -> str:
        """As a user may give it."""
        if self.measure == "share":
            return ", ".join(f"{kind} {share:g}" for kind, share in self.shares)
        value = {"speed": f"{self.value:g}x", "size": f"{self.value / 1e6:g}MB"}.get(self.measure, f"{self.value:g}")
        return f"{self.measure} {value}"


def parse_target(text: str) -> Target:
    """A target from a user's words.

    Raises:
        UserError: it is none.
    """
    found = [_WISH.fullmatch(wish.strip()) for wish in text.split(",")]
    try:
        parsed = [(each[1].lower(), float(each[2]), (each[3] or "").lower()) for each in found if each is not None]
    except ValueError:
        parsed = []
    names = [name for name, _, _ in parsed]
    if not parsed or len(parsed) < len(found) or len(set(names)) < len(names):
        raise _wrong(text)
    if all(name in ("heads", "neurons") and not unit and 0 < value <= 1 for name, value, unit in parsed):
        return Target("share", shares=tuple((name, value) for name, value, _ in parsed))  # type: ignore[misc]
    name, value, unit = parsed[0]
    fits = {
        "speed": unit in ("x", "") and value >= 1,
        "flops": not unit and 0 < value <= 1,
        "size": unit in _UNITS and value > 0,
    }
    if len(parsed) > 1 or not fits.get(name):
        raise _wrong(text)
    return Target(name, value * _UNITS.get(unit, 1.0))  # type: ignore[arg-type]


def _wrong(text: str) -> UserError:
    return UserError(f"target: {text!r} is not allowed; {REMEDY}")
