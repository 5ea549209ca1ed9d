"""The sentence pairs of an epoch for next-sentence prediction, from sentence lengths alone.

The algorithm is that of BERT's create_pretraining_data.py (Devlin et al. 2019) with five changes:

- The target length is drawn for each pair, not per document, so that short documents don't shift the share
  of short pairs.
- The other document of a random pair is uniform over all *other* documents; BERT retries ten times and may
  then take the same one.
- A chunk of one sentence has no next, so BERT calls it random, which leaves more than half of the pairs
  random. With a share f of such chunks, the others are random with probability (0.5 - f) / (1 - f) here,
  which keeps the split at 50/50 as long as f is below one half. f is measured in each block of documents.
- Pairs are made anew in every epoch, not ten times in advance.
- A sentence longer than half a pair, which truncation may cut however the pair is made, is divided into equal parts
  of at most a quarter of a pair, each a sentence from then on. Whole, it would lose both ends in nearly every epoch:
  truncation takes about as much off its front as off its back.

Every random number is a function of (seed, epoch, first sentence of the chunk). So a chunk is computed for every
sentence at once, as if each began one; the real chunks are those that are reached from the first sentences of the
documents, each chunk leading to the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.data.pretraining.masking import PAIRS_DOMAIN, Bits, derive_key, random_bits, uniform
from engine.errors import UserError

Int64s = NDArray[np.int64]
Int32s = NDArray[np.int32]
Flags = NDArray[np.bool_]

#: version of the algorithm for texts with over-long sentences; others have plans of version 1, which divided none
PLAN_VERSION = 2
#: sentences planned at a time (whole documents); bounds the memory of temporaries
BLOCK_SENTENCES = 2**20

_TARGET, _A_END, _COIN, _DOCUMENT, _SENTENCE, _FRONT_A, _FRONT_B, _ORDER = range(8)
_SPECIAL_TOKENS = 3
_BALANCE_ROUNDS, _BALANCE_TOLERANCE = 16, 1e-3
_STRIDE = 16
#: log2 of the number of tokens that are sampled: few enough for milliseconds, enough for a tenth of a percent
_LOOKED_AT_BITS = 21


@dataclass(frozen=True)
class PairPlan:
    """P pairs in training order; positions count tokens of the split."""

    a_start: Int64s
    """[P] first token of segment A"""
    a_length: Int32s
    """[P] tokens of segment A, at least 1"""
    b_start: Int64s
    """[P] first token of segment B"""
    b_length: Int32s
    """[P] tokens of segment B, at least 1"""
    is_random: Flags
    """[P] true where B is from another document: NSP label 1"""

    def __len__(self) -> int:
        return len(self.a_start)


def plan_epoch(
    sentence_lengths: NDArray[np.integer],
    document_starts: NDArray[np.integer],
    *,
    sequence_length: int,
    short_sequence_probability: float,
    seed: int,
    epoch: int,
) -> PairPlan:
    """All pairs of an epoch, shuffled: a pure function of the arguments.

    Args:
        sentence_lengths: [S] tokens of each sentence; empty sentences are passed over.
        document_starts: [D + 1] first sentence of each document, then S; empty documents are passed over.
        sequence_length: tokens of a sequence, [CLS] and two [SEP] included.
        short_sequence_probability: share of pairs with a target length uniform in [2, sequence_length - 3].
        seed: seed of the run.
        epoch: counts from 0.

    Raises:
        UserError: fewer than two documents have text.
    """
    lengths, starts = _without_empty(sentence_lengths, document_starts)
    lengths, starts = _without_over_long(lengths, starts, sequence_length - _SPECIAL_TOKENS)
    if len(starts) - 1 < 2:
        raise UserError(
            f"data.path: {len(starts) - 1} document(s) with text; next-sentence prediction draws from another "
            "document, so give at least 2 (plain text can be split at blank lines), or --data.objective mlm"
        )
    corpus = _Corpus(lengths, starts)
    rules = _Rules(sequence_length - _SPECIAL_TOKENS, short_sequence_probability, derive_key(seed, PAIRS_DOMAIN, epoch))
    blocks = [_plan_block(corpus, first, last, rules) for first, last in _blocks(corpus.starts)]
    order = np.argsort(rules.bits(_ORDER, np.arange(sum(map(len, blocks)))))
    return PairPlan(*(np.concatenate([getattr(b, field.name) for b in blocks])[order] for field in fields(PairPlan)))


def plan_version(sentence_lengths: NDArray[np.integer], sequence_length: int) -> int:
    """The first version of the algorithm that makes the same plans of these sentences as this one.

    A run goes on in the data order that it began with as long as this is the same.

    Args:
        sentence_lengths: [S] tokens of each sentence.
        sequence_length: as for `plan_epoch`.
    """
    limit = sequence_length - _SPECIAL_TOKENS
    return PLAN_VERSION if sentence_lengths.max(initial=0) > _longest(limit) else 1


def truncated_lengths(a: ArrayLike, b: ArrayLike, limit: int) -> tuple[Int64s, Int64s]:
    """Lengths of pairs after BERT's truncation to `limit` >= 2 tokens in all, elementwise.

    BERT takes one token at a time off the longer segment, off B when equal: the longer one shrinks to the
    shorter, then they alternate, B first.
    """
    a, b = np.asarray(a, np.int64), np.asarray(b, np.int64)
    excess = np.maximum(a + b - limit, 0)
    uneven = np.minimum(excess, np.abs(a - b))
    even = excess - uneven
    a_removed = np.where(a > b, uneven, 0) + even // 2
    return a - a_removed, b - (excess - a_removed)


@dataclass(frozen=True)
class _Rules:
    limit: int
    """tokens of A and B together"""
    short_probability: float
    key: Bits

    def bits(self, stream: int, counter: Int64s) -> Bits:
        return random_bits(random_bits(self.key, stream), counter)


class _Corpus:
    """Lengths [S] and document starts [D + 1] with neither empty sentences nor empty documents."""

    def __init__(self, lengths: NDArray[np.integer], starts: Int64s) -> None:
        self.lengths, self.starts = lengths, starts
        self.documents = len(starts) - 1
        # Token positions of every 16th sentence: a full prefix sum would take more memory than the lengths.
        sums = np.add.reduceat(lengths, np.arange(0, len(lengths), _STRIDE), dtype=np.int64)
        self._strided = np.concatenate(([0], np.cumsum(sums)))

    def token_position(self, sentences: Int64s) -> Int64s:
        """Position of the first token of each sentence."""
        stride = sentences // _STRIDE
        before = stride[:, None] * _STRIDE + np.arange(_STRIDE)
        lengths = self.lengths[np.minimum(before, len(self.lengths) - 1)]
        within = np.where(before < sentences[:, None], lengths, 0)
        position: Int64s = self._strided[stride] + within.sum(axis=1, dtype=np.int64)
        return position

    def tokens_up_to(self, first: Int64s, end: Int64s, wanted: Int64s) -> Int64s:
        """Tokens of the fewest sentences from `first` on that have `wanted` tokens or reach `end`, at least one."""
        total, following = self.lengths[first].astype(np.int64), first + 1
        growing = np.arange(len(first))
        while True:
            growing = growing[(total[growing] < wanted[growing]) & (following[growing] < end[growing])]
            if growing.size == 0:
                return total
            total[growing] += self.lengths[following[growing]]
            following[growing] += 1


def _without_empty(
    lengths: NDArray[np.integer], starts: NDArray[np.integer]
) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
    """Drop empty sentences, then empty documents; token positions stay as they are."""
    kept = lengths > 0
    if not kept.all():
        starts = np.concatenate(([0], np.cumsum(kept)))[starts]
        lengths = lengths[kept]
    return lengths, np.unique(starts).astype(np.int64)


def _longest(limit: int) -> int:
    """Tokens of the longest segment that truncation of a pair to `limit` leaves whole, whatever the other segment."""
    return limit // 2


def _without_over_long(lengths: NDArray[np.integer], starts: Int64s, limit: int) -> tuple[NDArray[np.integer], Int64s]:
    """Divide over-long sentences into parts, which count as sentences; token positions stay as they are."""
    over_long = np.flatnonzero(lengths > _longest(limit))
    if over_long.size == 0:
        return lengths, starts
    whole = lengths[over_long]
    parts = (whole - 1) // (limit // 4) + 1
    added = np.concatenate(([0], np.cumsum(parts - 1, dtype=np.int64)))
    number = np.arange(parts.sum(dtype=np.int64)) - np.repeat(added[:-1] + np.arange(len(parts)), parts)
    place = np.repeat(over_long + added[:-1], parts) + number
    divided = np.empty(len(lengths) + added[-1], lengths.dtype)
    short = np.ones(len(divided), np.bool_)
    short[place] = False
    divided[short] = np.delete(lengths, over_long)
    divided[place] = np.repeat(whole // parts, parts) + (number < np.repeat(whole % parts, parts))
    return divided, starts + added[np.searchsorted(over_long, starts)]


def _blocks(starts: Int64s) -> Iterator[tuple[int, int]]:
    """Ranges of documents with at most `BLOCK_SENTENCES` sentences, or of one document."""
    first, documents = 0, len(starts) - 1
    while first < documents:
        fitting = int(np.searchsorted(starts, starts[first] + BLOCK_SENTENCES, side="right")) - 1
        last = max(first + 1, fitting)
        yield first, last
        first = last


def _plan_block(corpus: _Corpus, first: int, last: int, rules: _Rules) -> PairPlan:
    """The pairs of documents `first` to `last`, in the text's order."""
    bounds = corpus.starts[first : last + 1]
    origin = bounds[0]
    lengths = corpus.lengths[origin : bounds[-1]]
    document = np.repeat(np.arange(first, last), np.diff(bounds))
    tokens = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
    chunks = _chunks(tokens, corpus.starts[document + 1] - origin, origin, rules)
    start, is_random = _follow(chunks, bounds[:-1] - origin)
    a_end, end = chunks.a_end[start], chunks.end[start]
    a_length = tokens[a_end] - tokens[start]
    b_start, b_length = tokens[a_end], tokens[end] - tokens[a_end]
    base = corpus.token_position(origin[None])[0]
    b_start += base
    wanted = chunks.target[start[is_random]] - a_length[is_random]
    b_start[is_random], b_length[is_random] = _random_segments(
        corpus, document[start[is_random]], wanted, start[is_random] + origin, rules
    )
    a_start, a_length, b_start, b_length = _truncate(
        tokens[start] + base, a_length, b_start, b_length, start + origin, rules
    )
    return PairPlan(a_start, a_length.astype(np.int32), b_start, b_length.astype(np.int32), is_random)


@dataclass(frozen=True)
class _Chunks:
    """The chunk that would begin at each sentence of a block; sentences count within the block."""

    target: Int64s
    """tokens aimed at"""
    end: Int64s
    """sentence after the chunk"""
    a_end: Int64s
    """sentence after segment A"""
    coin: NDArray[np.float64]
    """uniform in [0, 1): B is random where it is below the probability"""


def _chunks(tokens: Int64s, document_end: Int64s, origin: np.int64, rules: _Rules) -> _Chunks:
    sentence = np.arange(len(document_end))
    short = uniform(rules.bits(_TARGET, sentence + origin))
    target = np.full(len(sentence), rules.limit)
    if rules.short_probability > 0:
        # Given that it is below the probability, the same number is uniform there and serves for the length.
        spread = 2 + (short / rules.short_probability * (rules.limit - 1)).astype(np.int64)
        target = np.where(short < rules.short_probability, np.minimum(spread, rules.limit), target)
    end = np.minimum(np.searchsorted(tokens, tokens[:-1] + target), document_end)
    cut = uniform(rules.bits(_A_END, sentence + origin))
    a_end = sentence + 1 + (cut * (end - sentence - 1)).astype(np.int64)
    return _Chunks(target, end, a_end, uniform(rules.bits(_COIN, sentence + origin)))


def _follow(chunks: _Chunks, first_sentences: Int64s) -> tuple[Int64s, Flags]:
    """First sentences of the chunks that the documents are divided into, and whether their B is random.

    A random B leaves the rest of the chunk to the next one, so the share of chunks of one sentence depends on the
    probability that balances it: a fixed point. Each round at least about halves the distance to it (two-sentence
    documents halve it, long ones need two or three rounds).
    """
    forced = chunks.end == np.arange(1, len(chunks.end) + 1)
    balanced = 0.5
    for _ in range(_BALANCE_ROUNDS):
        probability = balanced
        is_random = forced | (chunks.coin < probability)
        start = _reachable(np.where(is_random, chunks.a_end, chunks.end), first_sentences)
        share = float(forced[start].mean())
        balanced = (0.5 - share) / (1.0 - share) if share < 0.5 else 0.0
        if abs(balanced - probability) < _BALANCE_TOLERANCE:
            break
    return start, is_random[start]


def _reachable(following: Int64s, first: Int64s) -> Int64s:
    """Sentences reached from `first` by going from i to following[i] > i, ascending.

    Pointer doubling: after round k every sentence within 2^k steps is marked and `following` jumps 2^k steps,
    so the number of rounds is logarithmic in the number of chunks of the longest document.
    """
    beyond = len(following)
    reached = np.zeros(beyond + 1, np.bool_)
    reached[first] = True
    jump = np.append(following, beyond)
    count = 0
    while (marked := np.flatnonzero(reached)).size > count:
        count = marked.size
        reached[jump[marked]] = True
        jump = jump[jump]
    return marked[marked < beyond]


def _random_segments(
    corpus: _Corpus, own: Int64s, wanted: Int64s, counter: Int64s, rules: _Rules
) -> tuple[Int64s, Int64s]:
    """First token and length of a segment from a random sentence of a random document other than `own`."""
    document = (uniform(rules.bits(_DOCUMENT, counter)) * (corpus.documents - 1)).astype(np.int64)
    document += document >= own
    begin, end = corpus.starts[document], corpus.starts[document + 1]
    sentence = begin + (uniform(rules.bits(_SENTENCE, counter)) * (end - begin)).astype(np.int64)
    return corpus.token_position(sentence), corpus.tokens_up_to(sentence, end, wanted)


def _truncate(
    a_start: Int64s, a_length: Int64s, b_start: Int64s, b_length: Int64s, counter: Int64s, rules: _Rules
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Shorten pairs to the limit; each removed token comes off the front or the back with equal probability."""
    a_kept, b_kept = truncated_lengths(a_length, b_length, rules.limit)
    a_front = _heads(a_length - a_kept, rules.bits(_FRONT_A, counter))
    b_front = _heads(b_length - b_kept, rules.bits(_FRONT_B, counter))
    return a_start + a_front, a_kept, b_start + b_front, b_kept


def _heads(tosses: Int64s, keys: Bits) -> Int64s:
    """Binomial(tosses, 1/2), elementwise: the number of ones among that many random bits."""
    heads, left = np.zeros_like(tosses), tosses.copy()
    word = 0
    while (unfinished := np.flatnonzero(left > 0)).size:
        used = np.minimum(left[unfinished], 64)
        bits = random_bits(keys[unfinished], word) >> (64 - used).astype(np.uint64)
        heads[unfinished] += np.bitwise_count(bits)
        left[unfinished] -= used
        word += 1
    return heads


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
