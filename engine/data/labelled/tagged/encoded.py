"""Texts with tagged words as a `SampleSource`: windows of their tokens, and the tags that are learned of them.

Shapes: N windows, B windows of a batch, R tokens whose tags are learned or scored, W words of a text, P pieces of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.data.labelled.encoded import ENCODING_CHUNK, EncodedSource, EncodedTexts, plain
from engine.data.labelled.tagged.spans import Ranges
from engine.data.labelled.windows import best_seen, windows
from engine.data.loading.source import Indices
from engine.data.tokenizer.wordpiece import Vocabulary

#: special tokens of a window: before and behind its pieces
FRAME = 2


@dataclass(frozen=True)
class TaggedWindows:
    """Windows of tokens; the tokens of window i whose tags are learned are `offsets[i]` to `offsets[i + 1]` of R.

    A piece is learned in the one window that shows most around it, so each word counts once however windows overlap. A
    window in which nothing is learned is left out.
    """

    encoded: EncodedTexts
    """windows as texts, special tokens around each"""
    offsets: Indices
    """int64 [N + 1]"""
    places: Indices
    """int64 [R], of the tokens in their windows"""
    labels: Indices
    """int64 [R], ids of their tags"""
    words: Indices
    """int64 [R], the word of which each is the first piece, counted through all texts; -1 of another piece"""
    joined: Indices
    """int64, ascending: the words that have their piece in common with the word before"""
    pieces: Indices
    """int64, pieces of each text"""


def inside(tags: Indices) -> Indices:
    """The tags of further words or pieces behind such with these: I- of B-; ids as `tag_names` orders them."""
    return tags + tags % 2


def encode_tagged(
    vocabulary: Vocabulary,
    texts: Sequence[str],
    words: Sequence[Ranges],
    tags: Sequence[Indices],
    max_length: int,
    stride: int,
    every_piece: bool,
    tokenizer: Tokenizer | None = None,
) -> TaggedWindows:
    """Encode texts, align their words with the pieces by the places of both in the text, and cut long ones in windows.

    Args:
        words: [W, 2] of each text, where they start and stop.
        tags: [W] of each text, their ids.
        max_length: tokens of a window, special tokens included.
        stride: pieces that consecutive windows share.
        every_piece: learn the tag of every piece of a word, of others than the first as `inside` says.
        tokenizer: `plain` of the vocabulary, by whoever has it already.
    """
    tokenizer = tokenizer or plain(vocabulary)  # truncation and padding of a folder must not reach offsets
    builder = _Builder(vocabulary, max_length, stride, every_piece)
    for start in range(0, len(texts), ENCODING_CHUNK):
        chunk = slice(start, start + ENCODING_CHUNK)
        encodings = tokenizer.encode_batch(texts[chunk], add_special_tokens=False)
        for encoding, ranges, ids in zip(encodings, words[chunk], tags[chunk], strict=True):
            spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            builder.add(np.array(encoding.ids, dtype=np.int32), spans, ranges, ids)
    return builder.build()


def first_pieces(pieces: Ranges, words: Ranges) -> Indices:
    """The first piece of each word, int64 [W]; -1 of a word that the tokenizer deletes.

    Args:
        pieces: [P, 2], where they start and stop in the text.
        words: [W, 2], the same of words.
    """
    if not len(pieces):
        return np.full(len(words), -1)
    # a normaliser that reorders marks may leave places out of order
    stops = np.maximum.accumulate(pieces[:, 1])
    first = np.searchsorted(stops, words[:, 0], "right")
    found = np.minimum(first, len(pieces) - 1)
    shown = (first < len(pieces)) & (pieces[found, 0] < words[:, 1])
    return np.where(shown, found, -1)


class _Builder:
    """Puts the windows of texts end to end."""

    def __init__(self, vocabulary: Vocabulary, max_length: int, stride: int, every_piece: bool) -> None:
        self.frame = np.array([vocabulary.cls_id]), np.array([vocabulary.sep_id])
        self.room, self.stride, self.every_piece = max_length - FRAME, stride, every_piece
        self.tokens: list[NDArray[Any]] = []
        self.rows: list[NDArray[Any]] = []
        """[4, R] of a window: its number, places, labels, words"""
        self.joined: list[Indices] = []
        self.pieces: list[int] = []
        self.seen = 0
        """words so far"""

    def add(self, ids: NDArray[np.int32], pieces: Ranges, words: Ranges, tags: Indices) -> None:
        """Append a text: the ids of its pieces and their places, its words' places and tags."""
        first = first_pieces(pieces, words)
        repeats = np.concatenate([[False], (first[1:] == first[:-1]) & (first[1:] >= 0)])
        own = np.flatnonzero((first >= 0) & ~repeats)
        learned = np.stack([first[own], tags[own], own + self.seen])
        if self.every_piece:
            learned = _with_further_pieces(learned, pieces, words[own])
        self.joined.append(np.flatnonzero(repeats) + self.seen)
        self.seen += len(words)
        self.pieces.append(len(ids))
        given = windows(len(ids), self.room, self.stride)
        chosen = np.array(best_seen(len(ids), given) if len(given) > 1 else [0] * len(ids), dtype=np.int64)
        for number, (start, stop) in enumerate(given):
            kept = learned[:, chosen[learned[0]] == number]
            if not kept.size:
                continue
            place = kept[0] - start + 1
            self.rows.append(np.stack([np.full_like(place, len(self.tokens)), place, *kept[1:]]))
            self.tokens.append(np.concatenate([self.frame[0], ids[start:stop], self.frame[1]]))

    def build(self) -> TaggedWindows:
        """What was added."""
        lengths = np.array([len(tokens) for tokens in self.tokens], dtype=np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        tokens = np.concatenate([*self.tokens, np.empty(0)]).astype(np.int32)
        windows_, places, labels, words = np.concatenate([*self.rows, np.empty((4, 0), np.int64)], axis=1)
        counts = np.bincount(windows_, minlength=len(lengths))
        return TaggedWindows(
            EncodedTexts(tokens, offsets, lengths, lengths),
            np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]),
            places,
            labels,
            words,
            np.concatenate([*self.joined, np.empty(0, np.int64)]),
            np.array(self.pieces, dtype=np.int64),
        )


def _with_further_pieces(learned: Indices, pieces: Ranges, words: Ranges) -> Indices:
    """Pieces, tags and words [3, R] of first pieces with those of the same words' others, whose word is -1.

    Args:
        words: where the words of `learned` start and stop.
    """
    owner = np.searchsorted(learned[0], np.arange(len(pieces)), "right") - 1
    inner = np.maximum(owner, 0)
    of_word = (owner >= 0) & (pieces[:, 0] < words[inner, 1]) if len(words) else np.zeros(len(pieces), np.bool_)
    of_word[learned[0]] = False
    further = np.flatnonzero(of_word)
    more = np.stack([further, inside(learned[1][owner[further]]), np.full(len(further), -1)])
    both = np.concatenate([learned, more], axis=1)
    return both[:, np.argsort(both[0], kind="stable")]


class TaggedSource(EncodedSource):
    """Windows with tagged tokens; `read` tells the model which tokens these are.

    With `fixed` a batch also carries `index` [R], the tokens' places among those of all windows, and `split` [R].
    """

    def __init__(
        self,
        windows: TaggedWindows,
        seed: int,
        fixed: bool = False,
        group: int | None = None,
        split: int = 0,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            split: a number by which an evaluation knows whose words are scored.
            weights: what a token of each tag counts in a weighted mean, [tags]; their sum is then among the totals.
        """
        super().__init__(windows.encoded, seed, fixed, group)
        self.windows = windows
        self.split = split
        self.weights: NDArray[np.float64] | None = None
        """of each window, [N]"""
        if weights is not None:
            window = np.repeat(np.arange(self.count), np.diff(windows.offsets))
            self.weights = np.zeros(self.count)
            np.add.at(self.weights, window, weights[windows.labels])

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """read [R], ascending, among the packed tokens of these windows; labels [R]."""
        first, counts = self.windows.offsets[examples], self._learned(examples)
        rows = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        lengths = self.encoded.offsets[examples + 1] - self.encoded.offsets[examples]
        read = np.repeat(np.cumsum(lengths) - lengths, counts) + self.windows.places[rows]
        found = {"read": read, "labels": self.windows.labels[rows]}
        return {**found, "index": rows, "split": np.full_like(rows, self.split)} if self.fixed else found

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        """Windows, tokens whose tags are learned and, where tags have weights, the sum of theirs."""
        places = self._places(epoch, indices)
        counted = {"sequences": float(len(indices)), "tokens": float(self._learned(places).sum())}
        return counted if self.weights is None else counted | {"weights": float(self.weights[places].sum())}

    def _learned(self, examples: Indices) -> Indices:
        return self.windows.offsets[examples + 1] - self.windows.offsets[examples]
