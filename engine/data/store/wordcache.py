"""Tokenization of large texts with a cache of the token ids of words.

BERT's normaliser and splitter never look across white space, so the ids of a text are the ids of its words one after
the other, and most words of a corpus have been seen before. A word costs one look-up in a dictionary then; the rest
is arithmetic on whole arrays. On Wikipedia a core is 2.2 times as fast as with the tokenizer in the first 8 MB, where
many words are new, and 2.8 times later, sentence splitting included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.tokenizer.wordpiece import Vocabulary, unquote

#: words kept, about 60 MB; the frequent ones come early, so a full cache just stops growing
CACHED_WORDS = 400_000
#: new words that a text for the tokenizer is made of: enough to amortise its call, more would gain nothing
WORDS_IN_TEXT = 64

#: a word that ends a text; it has number 0 and no ids
_END = "\0"
#: the splitter makes a word of each punctuation mark; splitting these off first leaves half as many distinct words
_PUNCTUATION = ',.()"'
#: control characters that `str.split` takes for white space, and the one above, become another control character:
#: the normaliser deletes them all
_CONTROL = dict.fromkeys(map(ord, "\x0b\x0c\x1c\x1d\x1e\x1f\x85" + _END), "\x01")


class Encoded(NamedTuple):
    """Ids of N texts."""

    ids: NDArray[Any]
    """[T] one text after the other, of the vocabulary's `id_dtype`"""
    lengths: NDArray[np.int32]
    """[N] ids of each text"""


class WordCache:
    """Encodes as `Vocabulary.encode_batch` does, remembering words."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._punctuation = [mark for mark in _PUNCTUATION if not any(mark in name for name in vocabulary.added_tokens)]
        # A word that is looked up for the first time gets the next number; it is tokenized afterwards, with others.
        self._numbers: defaultdict[str, int] = defaultdict(None, {_END: 0})
        self._numbers.default_factory = self._numbers.__len__
        self._pieces = np.empty(0, vocabulary.id_dtype)
        self._starts, self._counts = np.zeros(1, np.int64), np.zeros(1, np.int64)

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Ids of texts, without special tokens around them."""
        if not texts or not self.vocabulary.splits_at_spaces:
            return _flat(self.vocabulary.encode_batch(texts), self.vocabulary)
        words = self._words(texts)
        numbers = np.fromiter(map(self._numbers.__getitem__, words), np.int64, len(words))
        self._learn()
        counts = self._counts[numbers]
        ends = np.cumsum(counts)
        shift = self._starts[numbers] - (ends - counts)
        ids = self._pieces[np.repeat(shift, counts) + np.arange(ends[-1])]
        self._forget()
        return Encoded(ids, np.diff(ends[numbers == 0], prepend=0).astype(np.int32))

    def _words(self, texts: Sequence[str]) -> list[str]:
        """The words of all texts, each text's followed by `_END`."""
        joined = f" {_END} ".join((*texts, ""))
        # Looking for characters in one long text is far cheaper than in many short ones.
        if joined.count(_END) > len(texts) or any(chr(code) in joined for code in _CONTROL if code):
            joined = f" {_END} ".join((*(text.translate(_CONTROL) for text in texts), ""))
        for mark in self._punctuation:
            joined = joined.replace(mark, f" {mark} ")
        return joined.split()

    def _learn(self) -> None:
        """Tokenize the words that have a number but no token ids yet."""
        unknown = len(self._numbers) - len(self._counts)
        if not unknown:
            return
        pieces, counts = _encode_words(list(islice(reversed(self._numbers), unknown))[::-1], self.vocabulary)
        starts = len(self._pieces) + np.cumsum(counts) - counts
        self._pieces = np.concatenate((self._pieces, pieces))
        self._starts = np.concatenate((self._starts, starts))
        self._counts = np.concatenate((self._counts, counts))

    def _forget(self) -> None:
        """Keep the first `CACHED_WORDS` words."""
        if len(self._numbers) <= CACHED_WORDS:
            return
        while len(self._numbers) > CACHED_WORDS:
            self._numbers.popitem()
        self._pieces = self._pieces[: self._starts[CACHED_WORDS]]
        self._starts, self._counts = self._starts[:CACHED_WORDS], self._counts[:CACHED_WORDS]


def _encode_words(words: Sequence[str], vocabulary: Vocabulary) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Token ids of words that hold no white space, one word after the other, and the number of ids of each.

    A call of the tokenizer costs more than a word does, so it gets many words in a text, each followed by [SEP].
    Special tokens are found before the text is normalised and none holds a space, so no [SEP] is lost; should a word
    hold one too, there are more of them than words.
    """
    ended = [f"{word} [SEP] " for word in unquote(words)]
    texts = ["".join(ended[start : start + WORDS_IN_TEXT]) for start in range(0, len(ended), WORDS_IN_TEXT)]
    ids = _flat(vocabulary.encode_with_special(texts), vocabulary).ids
    is_end = ids == vocabulary.sep_id
    ends = np.flatnonzero(is_end)
    if len(ends) != len(words):
        pieces = _flat(vocabulary.encode_batch(words), vocabulary)
        return pieces.ids, pieces.lengths.astype(np.int64)
    return ids[~is_end], np.diff(ends, prepend=-1) - 1


def _flat(rows: Sequence[Sequence[int]], vocabulary: Vocabulary) -> Encoded:
    lengths = np.fromiter(map(len, rows), np.int32, len(rows))
    ids: Iterable[int] = chain.from_iterable(rows)
    return Encoded(np.fromiter(ids, vocabulary.id_dtype, int(lengths.sum())), lengths)
