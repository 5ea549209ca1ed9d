"""The share of the text that the sentence pairs of an epoch cover."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.data.pretraining.pairs import PairPlan

#: log2 of the number of tokens that are sampled: few enough for milliseconds, enough for a tenth of a percent
_LOOKED_AT_BITS = 21


def shown_share(plan: PairPlan, tokens: int) -> float:
    """Share of the `tokens` >= 1 of a split that are in a segment of the plan, in [0, 1].

    Exact up to 2^21 tokens. Of a longer split every 2nd, 4th, ... token is sampled.
    """
    shift = max(0, (tokens - 1).bit_length() - _LOOKED_AT_BITS)
    looked_at = ((tokens - 1) >> shift) + 1
    # Token i << shift lies in a segment if it is neither before its first token nor after its last.
    changes = np.zeros(looked_at + 1, np.int64)
    for start, length in ((plan.a_start, plan.a_length), (plan.b_start, plan.b_length)):
        changes += np.bincount(_up(start, shift), minlength=looked_at + 1)
        changes -= np.bincount(_up(start + length, shift), minlength=looked_at + 1)
    return float(np.count_nonzero(np.cumsum(changes[:-1]))) / looked_at


def _up(positions: NDArray[np.int64], shift: int) -> NDArray[np.int64]:
    """Positions divided by 2^shift, rounded up."""
    return (positions + ((1 << shift) - 1)) >> shift
