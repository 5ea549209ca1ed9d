"""Weight decay of parts of a model, as optim.decay_of gives it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from engine.config.adapter import Frozen, frozen_parts
from engine.errors import UserError

#: the part that is outside of the encoder
HEAD = "head"


@dataclass(frozen=True)
class PartDecay:
    """The decay of one part."""

    rule: str
    """as it was given"""
    parts: Frozen | None
    """of the encoder; None for the head"""
    decay: float

    def holds(self, part: str, layer: int | None) -> bool:
        """Whether it is that of a part, or of the layer of this number."""
        return part == HEAD if self.parts is None else part != HEAD and self.parts.holds(part, layer)


def part_decays(rules: str | None) -> tuple[PartDecay, ...]:
    """The meaning of optim.decay_of, such as "embeddings=0,layers:0-5=0.05,head=0.1".

    Raises:
        UserError: a rule that is none, or a decay that is no number of at least 0.
    """
    return tuple(_part_decay(rule.strip(), str(rules)) for rule in (rules.split(",") if rules is not None else ()))


def _part_decay(rule: str, rules: str) -> PartDecay:
    part, _, value = (each.strip() for each in rule.partition("="))
    try:
        decay = float(value) if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", value) else math.nan
        if math.isfinite(decay):
            return PartDecay(rule, None if part == HEAD else frozen_parts(part), decay)
    except (ValueError, UserError):  # told below with the option's own name
        pass
    raise UserError(
        f"optim.decay_of: {rules!r} is not allowed; {rule!r} is no part and its decay of at least 0, such as "
        "embeddings=0, layers:3=0.1, layers:0-5=0.1, pooler=0, encoder=0 or head=0.1"
    )
