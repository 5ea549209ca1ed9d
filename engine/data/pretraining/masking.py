"""MLM masking as a pure function of (seed, epoch, sample), and its counter-based random number generator.

Random bits are a hash of a key and a counter, so a sample is masked in the same way in every batch, on every rank,
in every loader process and by every version of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bits = NDArray[np.uint64]
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

#: first words of keys after the seed: uses of the same seed differ in it, so their random numbers are independent
PAIRS_DOMAIN, MASKING_DOMAIN, SEQUENCES_DOMAIN = 1, 2, 3

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_CHOOSE, _REPLACE, _SUBSTITUTE, _SPAN = range(4)
#: tokens, or words, of a span at most (Joshi et al. 2020)
LONGEST_SPAN = 10
_POSITION_BITS, _RANDOM_BITS = np.uint64(16), np.uint64(32)


def random_bits(key: ArrayLike, counter: ArrayLike) -> Bits:
    """64 random bits for each (key, counter), of the broadcast shape: a bijection of the counter.

    It is output number `counter` of SplitMix64 seeded with `key` (Steele, Lea & Flood 2014, "Fast splittable
    pseudorandom number generators"; finaliser: Stafford's variant 13).
    """
    with np.errstate(over="ignore"):
        z = np.asarray(key, np.uint64) + (np.asarray(counter, np.uint64) + np.uint64(1)) * _GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def derive_key(*words: ArrayLike) -> Bits:
    """The key of a sequence of non-negative words, such as a seed, an epoch and samples' indices; broadcasts."""
    key: Bits = np.zeros((), np.uint64)
    for word in words:
        key = random_bits(key, word)
    return key


def uniform(bits: Bits) -> NDArray[np.float64]:
    """The bits as numbers in [0, 1), multiples of 2^-53."""
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class MaskingRules:
    """What the MLM predicts and what stands in its place."""

    probability: float | NDArray[np.float64]
    """share of eligible tokens that is predicted, in all sequences or [B] in each"""
    mask_id: int
    """id of [MASK]"""
    regular_ids: Ids
    """[R] ids that a random replacement is drawn from: no special token"""
    continues_word: Flags | None = None
    """[vocabulary] true for word pieces that continue a word (##...); given for whole-word masking only"""
    mask_share: float = 0.8
    """share of predicted tokens that become [MASK]"""
    random_share: float = 0.1
    """share of them that become a random regular token; the others stay"""
    mean_span: float = 1.0
    """mean length of spans, in tokens, or words with `continues_word`, before they are cut at `LONGEST_SPAN`"""


@dataclass(frozen=True)
class Masked:
    """The result of masking ids of shape [T]."""

    ids: Ids
    """[T] ids after replacement"""
    positions: Ids
    """[M] ascending indices into T of the predicted tokens"""
    labels: Ids
    """[M] original ids there"""


def masked_count(lengths: ArrayLike, probability: ArrayLike) -> Ids:
    """Number of predicted tokens of sequences with `lengths` eligible tokens (at least 1) each; arguments broadcast.

    It needs no token, so every rank knows the loss's denominator of the global batch without communication.
    """
    share = np.asarray(probability, np.float64) * np.asarray(lengths)
    return np.asarray(np.maximum(1, np.floor(share + 0.5)).astype(np.int64))


@dataclass(frozen=True)
class MaskingRate:
    """A share of predicted tokens that changes linearly over a run: a pure function of a sample's place in it."""

    begin: float
    end: float
    epochs: float
    """of the run; the share stays at `end` behind it"""

    def of_samples(self, epoch: int, indices: Ids, size: int) -> NDArray[np.float64]:
        """[B] shares of the samples `indices` of an epoch that has `size` of them."""
        done = np.minimum((epoch + indices / size) / self.epochs, 1.0)
        return np.asarray(self.begin + (self.end - self.begin) * done)


def sample_keys(seed: int, epochs: ArrayLike, indices: ArrayLike) -> Bits:
    """Keys of the masking of samples `indices` of `epochs`; arguments broadcast."""
    return derive_key(seed, MASKING_DOMAIN, epochs, indices)


def mask_tokens(ids: Ids, eligible: Flags, lengths: Ids, keys: Bits, rules: MaskingRules) -> Masked:
    """Choose exactly `masked_count` eligible tokens of each sequence at random and replace them.

    A chosen token becomes [MASK], a random regular token or stays, with the probabilities of the rules (0.8, 0.1 and
    0.1 in Devlin et al. 2019). The tokens of a span share that fate (Joshi et al. 2020, "SpanBERT").

    Args:
        ids: [T] sequences one after the other, packed or flattened from a padded [B, L].
        eligible: [T] false at special tokens and padding; at least one true in each sequence.
        lengths: [B] tokens of each sequence, padding included; below 2^16, as is B.
        keys: [B] from `sample_keys`.
        rules: what to choose and to put there.
    """
    assert max(len(lengths), lengths.max()) < 2**16, "sequences and positions must fit 16 bits"
    starts = np.cumsum(lengths) - lengths
    candidates = np.flatnonzero(eligible)
    owner = np.repeat(np.arange(len(lengths)), lengths)[candidates]
    counts = masked_count(np.bincount(owner, minlength=len(lengths)), rules.probability)
    positions, heads = _chosen(_units(ids, candidates, owner, rules), starts, keys, counts, rules)
    row = np.searchsorted(starts, positions, side="right") - 1
    replaced = ids.copy()
    places = (positions - starts[row], heads - starts[row])
    replaced[positions] = _replacements(ids[positions], keys[row], *places, rules)
    return Masked(replaced, positions, ids[positions])


class _Units(NamedTuple):
    """U tokens or words that are chosen as a whole, ascending; each field is [U]."""

    head: Ids
    """index of the first token"""
    size: Ids
    """tokens"""
    owner: Ids
    """sequence"""


def _units(ids: Ids, candidates: Ids, owner: Ids, rules: MaskingRules) -> _Units:
    """The eligible tokens, of the sequences `owner`, or the words that they make."""
    if rules.continues_word is None:
        return _Units(candidates, np.ones_like(candidates), owner)
    follows = np.concatenate(([False], (np.diff(candidates) == 1) & (np.diff(owner) == 0)))
    is_head = ~(rules.continues_word[ids[candidates]] & follows)
    size = np.diff(np.flatnonzero(np.concatenate((is_head, [True]))))
    return _Units(candidates[is_head], size, owner[is_head])


def _chosen(units: _Units, starts: Ids, keys: Bits, counts: Ids, rules: MaskingRules) -> tuple[Ids, Ids]:
    """Ascending indices of `counts[s]` tokens of each sequence s, and of the first token of each one's span."""
    order, first = _shuffled(units, starts, keys), None
    if rules.mean_span > 1:
        first, order = _by_span(units, order, _span_lengths(units, starts, keys, rules.mean_span))
    if rules.continues_word is None:
        taken = order[_rank_in_group(units.owner) < counts[units.owner]]
        positions = units.head[taken]
    else:
        sizes = _fill(units.size[order], np.bincount(units.owner, minlength=len(starts)), counts)
        taken = np.repeat(order, sizes)
        positions = units.head[taken] + _rank_in_group(np.repeat(np.arange(len(order)), sizes))
    if first is None:
        positions.sort()
        return positions, positions
    ascending = np.argsort(positions)
    return positions[ascending], units.head[first[taken]][ascending]


def _span_lengths(units: _Units, starts: Ids, keys: Bits, mean: float) -> Ids:
    """Units of the span that would begin at each one: geometric with this mean, cut at `LONGEST_SPAN`."""
    draw = uniform(random_bits(random_bits(keys, _SPAN)[units.owner], units.head - starts[units.owner]))
    beyond = np.cumprod(np.full(LONGEST_SPAN - 1, 1.0 - 1.0 / mean))  # of a length above 1, 2, ...
    return 1 + np.searchsorted(-beyond, -draw, side="left")


def _by_span(units: _Units, order: Ids, lengths: Ids) -> tuple[Ids, Ids]:
    """The unit that each one's span begins with, and an order in which the units of a span follow one another.

    Spans begin at the units in the given order, and a unit belongs to the first span that covers it. A span ends with
    its document and at special tokens.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    apart = (np.diff(units.head) != units.size[:-1]) | (np.diff(units.owner) != 0)
    run = np.concatenate(([0], np.cumsum(apart)))
    earliest, first = place.copy(), np.arange(len(order))
    for shift in range(1, min(LONGEST_SPAN, len(order))):
        covers = (lengths[:-shift] > shift) & (run[:-shift] == run[shift:]) & (place[:-shift] < earliest[shift:])
        covered = np.flatnonzero(covers) + shift
        earliest[covered], first[covered] = place[covered - shift], covered - shift
    return first, np.argsort(earliest, kind="stable")


def _shuffled(units: _Units, starts: Ids, keys: Bits) -> Ids:
    """The units' numbers in a random order within each sequence, sequences in order.

    One sort of (sequence, random bits, number in it) packed into 64 bits; the number breaks ties, so the order doesn't
    depend on the sorting algorithm.
    """
    random = random_bits(random_bits(keys, _CHOOSE)[units.owner], units.head - starts[units.owner]) >> _RANDOM_BITS
    rank = _rank_in_group(units.owner)
    owner, number = units.owner.astype(np.uint64), rank.astype(np.uint64)
    packed = (owner << (_POSITION_BITS + _RANDOM_BITS)) | (random << _POSITION_BITS) | number
    packed.sort()
    return np.arange(len(rank)) - rank + (packed & np.uint64(2**16 - 1)).astype(np.int64)


def _rank_in_group(sorted_group: Ids) -> Ids:
    """0, 1, 2, … within each run of equal values."""
    counts = np.bincount(sorted_group)
    return np.arange(len(sorted_group)) - np.repeat(np.cumsum(counts) - counts, counts)


def _fill(sizes: Ids, words: Ids, counts: Ids) -> Ids:
    """Word pieces to take of each word: `counts[s]` in sequence s, whose words are `words[s]` entries of `sizes`.

    Words longer than what is left to take are skipped; what is missing at the end is taken from the first of these.
    Goes through the words of all sequences at once, in their order. A skipped word is longer than what is left, so the
    first skipped one always has enough pieces.
    """
    taken = np.zeros_like(sizes)
    first, left = np.cumsum(words) - words, counts.copy()
    unfilled, step = np.arange(len(words)), 0
    while (unfilled := unfilled[(left[unfilled] > 0) & (step < words[unfilled])]).size:
        word = first[unfilled] + step
        taken[word] = np.where(sizes[word] <= left[unfilled], sizes[word], 0)
        left[unfilled] -= taken[word]
        step += 1
    for sequence in np.flatnonzero(left):
        own = slice(first[sequence], first[sequence] + words[sequence])
        taken[first[sequence] + np.argmin(taken[own] > 0)] = left[sequence]
    return taken


def _replacements(originals: Ids, keys: Bits, positions: Ids, heads: Ids, rules: MaskingRules) -> Ids:
    """[MASK], random regular ids, or the originals; the first token of a span decides which."""
    choice = uniform(random_bits(random_bits(keys, _REPLACE), heads))
    draw = uniform(random_bits(random_bits(keys, _SUBSTITUTE), positions))
    substitutes = rules.regular_ids[(draw * len(rules.regular_ids)).astype(np.int64)]
    replaced = rules.mask_share + rules.random_share
    return np.where(choice < rules.mask_share, rules.mask_id, np.where(choice < replaced, substitutes, originals))
