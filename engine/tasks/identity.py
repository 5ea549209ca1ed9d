"""What gives a run's weights their meaning: its classes, tokenizer, data and base weights.

Every checkpoint carries it, so that an export needs nothing else, and a resume must not contradict it: weights know
numbers of classes and tokens, not their names, and a position in the data means nothing in other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import UserError

SHOWN_NAMES = 10
#: characters of a fingerprint that a message shows
SHOWN_DIGITS = 12
SHA256_DIGITS = 64
MAY_CHANGE = "steps, batch, rates, layout and intervals may change"


@dataclass(frozen=True)
class Fact:
    """One thing that a run's weights or scores mean nothing without."""

    name: str
    """what it is, in words: "classes" """
    field: str
    """the option that decides it"""
    value: str | list[str] | None
    """as JSON keeps it: names, or the sha256 of a content; None where the run has none"""
    fixed: bool = True
    """whether a run that goes on must have the same"""


def values(facts: Sequence[Fact]) -> dict[str, Any]:
    """The facts as a checkpoint records them."""
    return {fact.name: fact.value for fact in facts}


def check_same(facts: Sequence[Fact], saved: dict[str, Any], path: Path) -> None:
    """Compare a run with the checkpoint that it is to go on from.

    Args:
        facts: of the run.
        saved: what the checkpoint at `path` recorded; a fact that it doesn't know is not compared.

    Raises:
        UserError: names the option, what differs and both values.
    """
    for fact in facts:
        if fact.fixed and fact.name in saved and saved[fact.name] != fact.value:
            raise UserError(
                f"{fact.field}: the {fact.name} of this run ({_shown(fact.value)}) are not those of {path} "
                f"({_shown(saved[fact.name])}); put back what that run was given ({MAY_CHANGE}), or start another run "
                "in another --output"
            )


def _shown(value: str | list[str] | None) -> str:
    if isinstance(value, list):
        return ", ".join(value[:SHOWN_NAMES]) + (", ..." if len(value) > SHOWN_NAMES else "")
    return "none" if value is None else f"sha256 {value[:SHOWN_DIGITS]}" if len(value) == SHA256_DIGITS else value
