"""The share of [UNK] among the word pieces of a text: a tokenizer made for other text loses what this one says."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import UserError

#: above this share most sentences lose a word; with a vocabulary of the text's own language it is well below 1 %
MAX_UNKNOWN_SHARE = 0.2


def count_unknown(vocabulary: Vocabulary, ids: NDArray[Any]) -> tuple[int, int]:
    """[UNK] among ids, and the word pieces: all ids but those of [CLS] and [SEP]."""
    frame = np.isin(ids, (vocabulary.cls_id, vocabulary.sep_id))
    return int((ids == vocabulary.unk_id).sum()), len(ids) - int(frame.sum())


def share(unknown: int, pieces: int) -> float:
    """[UNK] as a share of the pieces; 0 where there are none."""
    return unknown / pieces if pieces else 0.0


def check_unknown(unknown: int, pieces: int, bound: float, what: str, field: str) -> None:
    """Refuse a text of which more than `bound` is [UNK].

    Args:
        unknown: number of [UNK].
        pieces: number of word pieces, those included.
        bound: largest share that is allowed, in [0, 1].
        what: name of the text, for the message.
        field: name of the option that sets the bound.

    Raises:
        UserError: too many unknown pieces.
    """
    if share(unknown, pieces) > bound:
        raise UserError(
            f"{field}: {share(unknown, pieces):.1%} of the {pieces:,} word pieces of {what} are [UNK], more than "
            f"{bound:.1%}; give a tokenizer that was made for this text, or raise it to go on all the same"
        )
