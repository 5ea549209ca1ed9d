"""The full sequences of an epoch for MLM alone, from document lengths alone.

An epoch's documents stand end to end in random order, each between [CLS] and [SEP]; the epochs follow one another
without a break, and this stream is cut wherever a sequence is full. What a sequence holds of a document is a piece,
which attention doesn't leave. So that a model never meets a text without them, pieces that a cut made begin with [CLS]
and end with [SEP] too: a sequence of L tokens is [CLS], L - 2 tokens of the stream, [SEP]. These are RoBERTa's full
sentences (Liu et al. 2019) cut at tokens, since whole sentences don't fill a sequence, with ModernBERT's attention
within a document (Warner et al. 2024).

- Nothing is padded, and nothing dropped: each token of the text is in the stream of an epoch once. The last sequence of
  an epoch goes on with the first tokens of the next one, which doesn't show them again.
- Special tokens are two a document and two a sequence. Where a cut falls beside a document's own, [CLS] or [SEP] stands
  twice there, or both stand without a text; to move the cut would leave a piece of a token or two elsewhere.
- The stream of an epoch is of the same length in all of them, so arithmetic tells where a sequence begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.pretraining.masking import SEQUENCES_DOMAIN, derive_key, random_bits
from engine.errors import UserError

Int64s = NDArray[np.int64]

#: tokens that a document, and a sequence, has beside its text
SPECIAL_TOKENS = 2
_DOCUMENTS, _SEQUENCES = range(2)


@dataclass(frozen=True)
class Documents:
    """D documents with text, in the order of the split."""

    start: Int64s
    """[D] position of the first token in the split"""
    length: Int64s
    """[D] tokens, at least 1"""

    @classmethod
    def of_sentences(cls, sentence_lengths: NDArray[np.integer], document_starts: NDArray[np.integer]) -> Documents:
        """The documents of S sentences; empty ones are passed over.

        Args:
            sentence_lengths: [S] tokens of each sentence.
            document_starts: [D + 1] first sentence of each document, then S.
        """
        firsts = document_starts[:-1][np.diff(document_starts) > 0]
        length = np.add.reduceat(sentence_lengths, firsts, dtype=np.int64) if len(firsts) else np.zeros(0, np.int64)
        start = np.cumsum(length) - length
        return cls(start[length > 0], length[length > 0])

    @property
    def tokens(self) -> int:
        """Of the text."""
        return int(self.length.sum())

    @property
    def stream(self) -> int:
        """Tokens of the stream in an epoch."""
        return self.tokens + SPECIAL_TOKENS * len(self.length)


class Pieces(NamedTuple):
    """P pieces of B sequences; each field but the first is [P]."""

    number: Int64s
    """[B] pieces of each sequence, at least 1"""
    start: Int64s
    """position in the split of the first token of the text"""
    length: Int64s
    """tokens of the text; 0 where a cut left none"""
    opening: Int64s
    """[CLS] before the text, 1 or 2"""
    closing: Int64s
    """[SEP] behind the text, 1 or 2"""


@dataclass(frozen=True)
class SequencePlan:
    """Where the sequences of an epoch lie in the stream."""

    ends: Int64s
    """[D] where each document ends in the epoch's stream, its special tokens included, in the epoch's order"""
    start: Int64s
    """[D] position of its first token in the split"""
    begin: Int64s
    """[N] where the part of the stream that a sequence holds begins, in training order"""


def plan_epoch(documents: Documents, *, sequence_length: int, seed: int, epoch: int) -> SequencePlan:
    """All sequences of an epoch, shuffled but for the last, which runs into the next epoch: a pure function.

    Raises:
        UserError: the text doesn't fill a sequence.
    """
    check_fills(documents, sequence_length)
    key = derive_key(seed, SEQUENCES_DOMAIN, epoch)
    first, after = (_first_sequence(documents.stream, sequence_length, e) for e in (epoch, epoch + 1))
    begin = 1 + np.arange(first, after) * (sequence_length - SPECIAL_TOKENS) - epoch * documents.stream
    order = np.argsort(random_bits(random_bits(key, _SEQUENCES), np.arange(len(begin) - 1)))
    begin[:-1] = begin[order]
    return SequencePlan(*_ordered(documents, key), begin)


def plan_once(documents: Documents, *, sequence_length: int, seed: int) -> SequencePlan:
    """The sequences of one pass over the text, for evaluation: the last one ends with it and may be shorter."""
    width = sequence_length - SPECIAL_TOKENS
    begin = 1 + np.arange(-(-(documents.stream - SPECIAL_TOKENS) // width)) * width
    return SequencePlan(*_ordered(documents, derive_key(seed, SEQUENCES_DOMAIN, 0)), begin)


def check_fills(documents: Documents, sequence_length: int) -> None:
    """Refuse a text that is shorter than a sequence: an epoch would have none.

    Raises:
        UserError: names the field and the remedy.
    """
    if documents.stream < sequence_length - SPECIAL_TOKENS:
        raise UserError(
            f"data.sequence_length: {sequence_length} is more than the {documents.tokens} tokens of the whole text; "
            "lower it, or prepare more text"
        )


def _first_sequence(stream: int, sequence_length: int, epoch: int) -> int:
    """The number, over all epochs, of the first sequence that begins in this epoch.

    The first of all begins behind the stream's first [CLS], since it has its own.
    """
    return -(-(epoch * stream - 1) // (sequence_length - SPECIAL_TOKENS))


def _ordered(documents: Documents, key: NDArray[np.uint64]) -> tuple[Int64s, Int64s]:
    """Ends in the stream and starts in the split, in the epoch's order."""
    order = np.argsort(random_bits(random_bits(key, _DOCUMENTS), np.arange(len(documents.length))))
    return np.cumsum(documents.length[order] + SPECIAL_TOKENS), documents.start[order]


def pieces(plan: SequencePlan, begin: Int64s, end: Int64s) -> Pieces:
    """The pieces of B parts of an epoch's stream, `begin` to `end` [B], none empty.

    `opening` and `closing` count the stream's own [CLS] and [SEP]; see `closed`.
    """
    first = np.searchsorted(plan.ends, begin, side="right")
    count = np.searchsorted(plan.ends, end - 1, side="right") - first + 1
    part = np.repeat(np.arange(len(begin)), count)
    document = first[part] + np.arange(len(part)) - np.repeat(np.cumsum(count) - count, count)
    after = plan.ends[document] - 1
    opening = np.where(document > 0, plan.ends[document - 1], 0)
    left = np.maximum(begin[part], opening + 1)
    length = np.maximum(np.minimum(end[part], after) - left, 0)
    return Pieces(
        count,
        plan.start[document] + left - opening - 1,
        length,
        (begin[part] <= opening).astype(np.int64),
        (end[part] > after).astype(np.int64),
    )


def joined(parts: list[Pieces]) -> Pieces:
    """The pieces of several groups of sequences, one after the other."""
    return Pieces(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def continued(parts: Pieces, tails: Pieces, which: Int64s) -> Pieces:
    """The pieces of B sequences of which those at `which` go on with those of `tails`, of the next epoch."""
    owner = np.concatenate((np.repeat(np.arange(len(parts.number)), parts.number), np.repeat(which, tails.number)))
    order = np.argsort(owner, kind="stable")
    columns = [np.concatenate(column)[order] for column in zip(parts[1:], tails[1:], strict=True)]
    return Pieces(np.bincount(owner), *columns)


def closed(parts: Pieces) -> Pieces:
    """The pieces of sequences with the [CLS] before and the [SEP] behind each sequence's part of the stream."""
    last = np.cumsum(parts.number) - 1
    opening, closing = parts.opening.copy(), parts.closing.copy()
    opening[last - parts.number + 1] += 1
    closing[last] += 1
    return parts._replace(opening=opening, closing=closing)
