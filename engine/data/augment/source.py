"""Labelled examples that are changed anew in every epoch, as a `SampleSource`.

What an example becomes is a function of the seed, the epoch and the example, made by the process that collates it: no
rank, resume or loader process changes it. Examples keep the number of losses that they count in, so that every rank
knows the totals of a global batch without making it, and are dealt to ranks by the lengths that they had: an operation
changes these by a few words, which is balance, not correctness.

Shapes: N examples or windows, B of a batch, W words of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.data.augment.draws import Draws, draws_for
from engine.data.augment.method import Method
from engine.data.augment.words import Words, of_spans, split_text
from engine.data.labelled.encoded import EncodedTexts, LabelledSource, plain, truncating
from engine.data.labelled.files import Examples
from engine.data.labelled.tagged.encoded import FRAME, TaggedSource, TaggedWindows, encode_tagged
from engine.data.labelled.tagged.files import TaggedTexts
from engine.data.loading.source import Indices
from engine.data.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True)
class Augmentation:
    """Which examples of an epoch are changed, and how."""

    method: Method
    share: float
    """probability that an example is changed"""
    seed: int

    def drawn(self, description: Indices) -> list[tuple[int, Draws]]:
        """The places in a batch of the examples that are changed, and the draws of each."""
        epochs, examples = description.T
        found = draws_for(self.seed, epochs, examples)
        return [(place, draws) for place, draws in enumerate(found) if draws.uniform() < self.share]


def described(epoch: int, examples: Indices) -> Indices:
    """Epoch and number of each example, [B, 2]."""
    return np.stack([np.full_like(examples, epoch), examples], axis=1)


class AugmentedSource(LabelledSource):
    """Texts or pairs with a label each."""

    def __init__(
        self,
        source: LabelledSource,
        examples: Examples,
        augmentation: Augmentation,
        vocabulary: Vocabulary,
        max_length: int,
    ) -> None:
        """Args: source has the examples as they are, and vocabulary and max_length are what they were encoded by."""
        super().__init__(source.encoded, source.labels, source.seed, group=source.group, weights=source.weights)
        self._examples, self._augmentation = examples, augmentation
        self._tokenizer = truncating(vocabulary, max_length)

    def describe(self, epoch: int, indices: Indices) -> Indices:
        """See `described`."""
        return described(epoch, super().describe(epoch, indices))

    def collate(self, description: Indices) -> dict[str, Tensor]:
        """As `EncodedSource.collate`, of the epoch's texts."""
        examples, encoded = description[:, 1], self.encoded
        rows = [encoded.tokens[encoded.offsets[index] : encoded.offsets[index + 1]] for index in examples]
        first_lengths = encoded.first_lengths[examples]
        drawn = self._augmentation.drawn(description)
        new = self._new([int(examples[place]) for place, _ in drawn], [draws for _, draws in drawn])
        for (place, _), encoding in zip(drawn, self._tokenizer.encode_batch(new) if new else (), strict=True):
            rows[place] = np.array(encoding.ids, dtype=np.int32)
            first_lengths[place] = encoding.type_ids.count(0)
        own = LabelledSource(_end_to_end(rows, first_lengths), self.labels[examples], self.seed)
        return own.collate(np.arange(len(examples)))

    def _new(self, examples: Sequence[int], draws: Sequence[Draws]) -> list[str] | list[tuple[str, str]]:
        """New texts, or pairs, of these examples."""
        method, pairs = self._augmentation.method, self._examples.pairs
        texts = [words.text for words in method([split_text(self._examples.texts[index]) for index in examples], draws)]
        if pairs is None:
            return texts
        seconds = [words.text for words in method([split_text(pairs[index]) for index in examples], draws)]
        return list(zip(texts, seconds, strict=True))


class AugmentedTags(TaggedSource):
    """Texts with tagged words; those that are more than one window stay as they are.

    The method keeps the number of words. A text whose words no longer have a piece each, or which no longer fits into a
    window, stays as it is in that epoch.
    """

    def __init__(
        self,
        source: TaggedSource,
        texts: TaggedTexts,
        tags: Sequence[Indices],
        augmentation: Augmentation,
        vocabulary: Vocabulary,
        max_length: int,
    ) -> None:
        """
        Args:
            source: the windows as they are, in which the first piece of each word is learned.
            texts, tags: what they were encoded from, by this vocabulary and max_length.
        """
        super().__init__(source.windows, source.seed, group=source.group)
        self.weights = source.weights
        self._texts, self._tags, self._augmentation = texts, tags, augmentation
        self._vocabulary, self._max_length, self._tokenizer = vocabulary, max_length, plain(vocabulary)
        stops = np.cumsum([len(words) for words in texts.words])
        first = source.windows.words[source.windows.offsets[:-1]]
        #: the text that each window is of, [N]
        self._owners = np.searchsorted(stops, first, side="right")

    def describe(self, epoch: int, indices: Indices) -> Indices:
        """See `described`."""
        return described(epoch, super().describe(epoch, indices))

    def collate(self, description: Indices) -> dict[str, Tensor]:
        """As `EncodedSource.collate`, of the epoch's texts."""
        examples, windows = description[:, 1], self.windows
        parts = [_window(windows, int(index)) for index in examples]
        for place, draws in self._augmentation.drawn(description):
            text = int(self._owners[examples[place]])
            if windows.pieces[text] + FRAME <= self._max_length:
                new = self._encoded(text, draws)
                kept = len(new.offsets) == 2 and np.array_equal(new.labels, parts[place].labels)
                parts[place] = new if kept else parts[place]
        own = TaggedSource(_joined(parts), self.seed)
        return own.collate(np.arange(len(examples)))

    def _encoded(self, text: int, draws: Draws) -> TaggedWindows:
        """A new text in the place of one."""
        new = self._augmentation.method([self._words(text)], [draws])[0]
        spans = np.array(new.spans, dtype=np.int64).reshape(-1, 2)
        room = (self._max_length, 0, False)
        return encode_tagged(self._vocabulary, [new.text], [spans], [self._tags[text]], *room, self._tokenizer)

    def _words(self, text: int) -> Words:
        spans = [(start, stop) for start, stop in self._texts.words[text].tolist()]
        return of_spans(self._texts.texts[text], spans, self._texts.tags[text])


def _end_to_end(rows: Sequence[NDArray[np.int32]], first_lengths: NDArray[np.int32]) -> EncodedTexts:
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return EncodedTexts(np.concatenate(rows), offsets, first_lengths, lengths)


def _window(windows: TaggedWindows, index: int) -> TaggedWindows:
    """One of some windows."""
    encoded = windows.encoded
    tokens = encoded.tokens[encoded.offsets[index] : encoded.offsets[index + 1]]
    learned = slice(windows.offsets[index], windows.offsets[index + 1])
    places, labels, words = windows.places[learned], windows.labels[learned], windows.words[learned]
    own = _end_to_end([tokens], np.array([len(tokens)], dtype=np.int32))
    nothing = np.empty(0, np.int64)
    return TaggedWindows(own, np.array([0, len(places)]), places, labels, words, nothing, nothing)


def _joined(parts: Sequence[TaggedWindows]) -> TaggedWindows:
    """Windows of one each as several; what nobody reads of a batch is left out."""
    rows = [part.encoded.tokens for part in parts]
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(part.places) for part in parts], dtype=np.int64)])
    places, labels, words = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("places", "labels", "words")
    )
    nothing = np.empty(0, np.int64)
    return TaggedWindows(_end_to_end(rows, lengths), offsets, places, labels, words, nothing, nothing)
