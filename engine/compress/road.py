"""What a user wants of a compressed model, and which of several candidates has it; pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.compress.quantise.latency import ROUNDS, Latency
from engine.errors import UserError

if TYPE_CHECKING:
    from engine.tasks.significance import Difference

REMEDY = 'give such as "latency 3x, accuracy -1.0" or "size 20MB, accuracy -0.5"'
_PARTS = {
    "latency": re.compile(r"latency\s+([0-9.]+)x"),
    "accuracy": re.compile(r"accuracy\s+-([0-9.]+)"),
    "size": re.compile(r"size\s+([0-9.]+)\s*MB", re.IGNORECASE),
}
#: the batch whose time the target bounds, and those that are reported
BATCHES = tuple(ROUNDS)


@dataclass(frozen=True)
class Wish:
    """Bounds that a model must keep."""

    speed: float = 1.0
    """times as fast as the fp32 model in torch, at batch 1"""
    points: float = 1.0
    """hundredths of the score that may be lost, as measured"""
    megabytes: float | None = None
    """of the graph's file"""

    def kept(self, candidate: Candidate, whole: float) -> bool:
        """Whether a candidate keeps all bounds.

        Args:
            whole: milliseconds of the fp32 model in torch.
        """
        small = self.megabytes is None or candidate.bytes <= self.megabytes * 1e6
        return self.accurate(candidate) and candidate.speed(whole) >= self.speed and small

    def accurate(self, candidate: Candidate) -> bool:
        """Whether a candidate loses no more than may be lost."""
        return candidate.change.value >= -self.points / 100


@dataclass(frozen=True)
class Candidate:
    """A graph that was made, scored and timed."""

    name: str
    folder: Path
    score: float
    change: Difference
    """from the score of the fp32 model"""
    bytes: int
    times: Mapping[int, Latency]
    """by batch"""

    def speed(self, whole: float, batch: int = BATCHES[0]) -> float:
        """How many times as fast as a model that takes so many milliseconds."""
        return whole / self.times[batch].median


def parse_wish(text: str) -> Wish:
    """The bounds in a user's words.

    Raises:
        UserError: unknown words, numbers that aren't positive, or one bound twice.
    """
    found: dict[str, float] = {}
    for part in (each.strip() for each in text.split(",")):
        match = next(((name, m) for name, form in _PARTS.items() if (m := form.fullmatch(part))), None)
        try:
            value = float(match[1][1]) if match else 0.0
        except ValueError:
            value = 0.0
        if match is None or match[0] in found or value <= 0.0:
            raise UserError(f"target: {text!r} is not allowed; {REMEDY}")
        found[match[0]] = value
    if found.get("latency", 1.0) < 1.0:
        raise UserError(f"target: {text!r} asks for a slower model; {REMEDY}")
    return Wish(found.get("latency", 1.0), found.get("accuracy", 1.0), found.get("size"))


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other one beats in score and time at once, the fastest first."""
    ordered = sorted(candidates, key=lambda each: (each.times[BATCHES[0]].median, -each.score))
    best, found = -float("inf"), []
    for each in ordered:
        if each.score > best:
            best = each.score
            found.append(each)
    return found


def chosen(candidates: Sequence[Candidate], wish: Wish, whole: float) -> Candidate:
    """The most accurate one that keeps all bounds; else the fastest that is accurate enough; else the most accurate."""
    kept = [each for each in candidates if wish.kept(each, whole)]
    if kept:
        return max(kept, key=lambda each: (each.score, each.speed(whole)))
    accurate = [each for each in candidates if wish.accurate(each)]
    if accurate:
        return max(accurate, key=lambda each: each.speed(whole))
    return max(candidates, key=lambda each: each.score)
