"""MLM masking as a pure function of (seed, epoch, sample), and its counter-based random number generator.

Random bits are a hash of a key and a counter, so a sample is masked in the same way in every batch, on every rank,
in every loader process and by every version of NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Bits = NDArray[np.uint64]
Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

#: first words of keys after the seed: uses of the same seed differ in it, so their random numbers are independent
PAIRS_DOMAIN, MASKING_DOMAIN, SEQUENCES_DOMAIN = 1, 2, 3

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_CHOOSE, _REPLACE, _SUBSTITUTE = range(3)
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

    probability: float
    """share of eligible tokens that is predicted"""
    mask_id: int
    """id of [MASK]"""
    regular_ids: Ids
    """[R] ids that a random replacement is drawn from: no special token"""
    continues_word: Flags | None = None
    """[vocabulary] true for word pieces that continue a word (##...); given for whole-word masking only"""


@dataclass(frozen=True)
class Masked:
    """The result of masking ids of shape [T]."""

    ids: Ids
    """[T] ids after replacement"""
    positions: Ids
    """[M] ascending indices into T of the predicted tokens"""
    labels: Ids
    """[M] original ids there"""


def masked_count(lengths: ArrayLike, probability: float) -> Ids:
    """Number of predicted tokens of sequences with `lengths` eligible tokens (at least 1) each, same shape.

    It needs no token, so every rank knows the loss's denominator of the global batch without communication.
    """
    return np.maximum(1, np.floor(probability * np.asarray(lengths) + 0.5)).astype(np.int64)


def sample_keys(seed: int, epochs: ArrayLike, indices: ArrayLike) -> Bits:
    """Keys of the masking of samples `indices` of `epochs`; arguments broadcast."""
    return derive_key(seed, MASKING_DOMAIN, epochs, indices)


def mask_tokens(ids: Ids, eligible: Flags, lengths: Ids, keys: Bits, rules: MaskingRules) -> Masked:
    """Choose exactly `masked_count` eligible tokens of each sequence at random and replace them.

    A chosen token becomes [MASK] with probability 0.8, a random regular token with 0.1, and stays with 0.1
    (Devlin et al. 2019).

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
    if rules.continues_word is None:
        shuffled = _shuffled(candidates, owner, starts, keys)
        positions = shuffled[_rank_in_group(owner) < counts[owner]]
    else:
        positions = _choose_words(ids, candidates, owner, starts, keys, counts, rules.continues_word)
    positions = np.sort(positions)
    row = np.searchsorted(starts, positions, side="right") - 1
    replaced = ids.copy()
    replaced[positions] = _replacements(ids[positions], keys[row], positions - starts[row], rules)
    return Masked(replaced, positions, ids[positions])


def _shuffled(heads: Ids, owner: Ids, starts: Ids, keys: Bits) -> Ids:
    """Flat positions `heads` in a random order within each sequence, sequences in order.

    One sort of (sequence, random bits, position) packed into 64 bits; the position breaks ties, so the order
    doesn't depend on the sorting algorithm.
    """
    position = (heads - starts[owner]).astype(np.uint64)
    random = random_bits(random_bits(keys, _CHOOSE)[owner], position) >> _RANDOM_BITS
    packed = (owner.astype(np.uint64) << (_POSITION_BITS + _RANDOM_BITS)) | (random << _POSITION_BITS) | position
    packed.sort()
    return starts[owner] + (packed & np.uint64(2**16 - 1)).astype(np.int64)


def _rank_in_group(sorted_group: Ids) -> Ids:
    """0, 1, 2, … within each run of equal values."""
    counts = np.bincount(sorted_group)
    return np.arange(len(sorted_group)) - np.repeat(np.cumsum(counts) - counts, counts)


def _choose_words(
    ids: Ids, candidates: Ids, owner: Ids, starts: Ids, keys: Bits, counts: Ids, continues_word: Flags
) -> Ids:
    """Choose whole words in random order, skipping those longer than what is left to choose, then fill up the count.

    What is missing at the end is taken from the first word that was skipped.
    """
    follows = np.concatenate(([False], (np.diff(candidates) == 1) & (np.diff(owner) == 0)))
    is_head = ~(continues_word[ids[candidates]] & follows)
    size_at = np.zeros(len(ids), np.int64)
    size_at[candidates[is_head]] = np.diff(np.flatnonzero(np.concatenate((is_head, [True]))))
    words = _shuffled(candidates[is_head], owner[is_head], starts, keys)
    taken = _fill(size_at[words], np.bincount(owner[is_head], minlength=len(starts)), counts)
    return np.repeat(words, taken) + _rank_in_group(np.repeat(np.arange(len(words)), taken))


def _fill(sizes: Ids, words: Ids, counts: Ids) -> Ids:
    """Word pieces to take of each word: `counts[s]` in sequence s, whose words are `words[s]` entries of `sizes`.

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


def _replacements(originals: Ids, keys: Bits, positions: Ids, rules: MaskingRules) -> Ids:
    """80 % [MASK], 10 % random regular ids, 10 % the originals."""
    choice = uniform(random_bits(random_bits(keys, _REPLACE), positions))
    draw = uniform(random_bits(random_bits(keys, _SUBSTITUTE), positions))
    substitutes = rules.regular_ids[(draw * len(rules.regular_ids)).astype(np.int64)]
    return np.where(choice < 0.8, rules.mask_id, np.where(choice < 0.9, substitutes, originals))
