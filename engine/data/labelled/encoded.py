"""Encoded texts as a `SampleSource`: packed batches of their tokens, in an order of each epoch's own.

Shapes: N examples, B examples of a batch, T tokens of a batch (packed end to end, no padding).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor

from engine.data.loading.lengths import grouped_order
from engine.data.loading.source import Indices
from engine.data.tokenizer.wordpiece import Vocabulary

ENCODING_CHUNK = 10_000
#: first word of the seeds of the epochs' orders
ORDER_STREAM = 2
_CACHED_ORDERS = 2


@dataclass(frozen=True)
class EncodedTexts:
    """Token ids of N texts or pairs end to end: text i is `tokens[offsets[i]:offsets[i + 1]]`."""

    tokens: NDArray[np.int32]
    offsets: Indices
    """int64 [N + 1]"""
    first_lengths: NDArray[np.int32]
    """tokens of the first segment, [CLS] and its [SEP] included, [N]"""
    full_lengths: NDArray[np.int32]
    """tokens before truncation, special tokens included, [N]"""


def encode(vocabulary: Vocabulary, texts: list[str], pairs: list[str] | None, max_length: int) -> EncodedTexts:
    """Token ids of `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`, at most `max_length` of them.

    Longer inputs are truncated at the end. Of a pair, one token at a time is taken off the text that is longer then
    (`longest_first` in the tokenizers library).
    """
    tokenizer, untruncated = truncating(vocabulary, max_length), framed(vocabulary)
    inputs = texts if pairs is None else list(zip(texts, pairs, strict=True))
    tokens: list[NDArray[np.int32]] = []
    first_lengths: list[int] = []
    full_lengths: list[int] = []
    for start in range(0, len(inputs), ENCODING_CHUNK):
        chunk = inputs[start : start + ENCODING_CHUNK]
        encodings = tokenizer.encode_batch(chunk)
        tokens += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        first_lengths += [encoding.type_ids.count(0) for encoding in encodings]
        full_lengths += _full_lengths(untruncated, chunk, [len(encoding.ids) for encoding in encodings], max_length)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens], dtype=np.int64)])
    first, full = (np.array(lengths, dtype=np.int32) for lengths in (first_lengths, full_lengths))
    return EncodedTexts(np.concatenate(tokens), offsets, first, full)


def framed(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer with its special tokens around a text or pair, without padding or truncation."""
    tokenizer = plain(vocabulary)
    if vocabulary.is_wordpiece:
        tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary.sep_id), ("[CLS]", vocabulary.cls_id))
    return tokenizer


def truncating(vocabulary: Vocabulary, length: int) -> Tokenizer:
    """The tokenizer of `framed`, which cuts texts and pairs at `length` tokens."""
    tokenizer = framed(vocabulary)
    tokenizer.enable_truncation(length, strategy="longest_first")
    return tokenizer


def plain(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer without padding or truncation: a copy, because what is set on it would stay on the vocabulary's."""
    tokenizer = Tokenizer.from_str(vocabulary.backend.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _full_lengths(
    tokenizer: Tokenizer, inputs: Sequence[str] | Sequence[tuple[str, str]], lengths: list[int], max_length: int
) -> list[int]:
    """Lengths before truncation: inputs that reach `max_length` are encoded again without it."""
    longest = [index for index, length in enumerate(lengths) if length == max_length]
    full = lengths.copy()
    for index, encoding in zip(longest, tokenizer.encode_batch_fast([inputs[index] for index in longest]), strict=True):
        full[index] = len(encoding.ids)
    return full


class EncodedSource:
    """Encoded examples as a `SampleSource`; what is learned of them is a subclass's `targets`.

    An epoch is a permutation keyed by (seed, epoch); with `group`, the global batch, it brings examples of similar
    length into the same global batch, whose composition is then less random. With `fixed` every epoch keeps the file's
    order, and each batch also carries `index` [B], the examples' indices in the file, by which an evaluation puts what
    it gathers from all ranks in order; it is not an argument of the model.
    """

    def __init__(self, encoded: EncodedTexts, seed: int, fixed: bool = False, group: int | None = None) -> None:
        self.encoded = encoded
        self.seed = seed
        self.fixed = fixed
        self.group = group
        self._orders: dict[int, Indices] = {}

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Token ids of all examples, end to end."""
        return self.encoded.tokens

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the token ids, segments and targets of all examples, in order."""
        digest = hashlib.sha256()
        encoded = (self.encoded.tokens, self.encoded.offsets, self.encoded.first_lengths)
        for array in (*encoded, *self.targets(np.arange(self.count)).values()):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @property
    def count(self) -> int:
        """Examples."""
        return len(self.encoded.offsets) - 1

    @cached_property
    def sizes(self) -> Indices:
        """Tokens of each example, int64 [N]."""
        return np.diff(self.encoded.offsets)

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """What is learned of these examples [B]: tensors of the batch by name, beside those of their tokens."""
        raise NotImplementedError

    def epoch_size(self, epoch: int) -> int:
        return self.count

    def describe(self, epoch: int, indices: Indices) -> Indices:
        """Indices of the examples in the file, int64 [B]."""
        return self._places(epoch, indices)

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        """Length in tokens of each of these examples, int64 [B]."""
        return self.sizes[self._places(epoch, indices)]

    def _places(self, epoch: int, indices: Indices) -> Indices:
        return indices if self.fixed else self._epoch_order(epoch)[indices]

    def join(self, descriptions: list[Indices]) -> Indices:
        return np.concatenate(descriptions)

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return {"sequences": float(len(indices))}

    def collate(self, description: Indices) -> dict[str, Tensor]:
        """Packed int64 tensors: input_ids, token_type_ids, position_ids [T]; lengths (and index) [B]; the targets."""
        arrays = self.packed(self.sequences(description))
        if self.fixed:
            arrays["index"] = description
        integers = {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}
        return integers | {name: torch.from_numpy(array) for name, array in self.targets(description).items()}

    def sequences(self, examples: Indices) -> Indices:
        """Which encoded texts are these examples [B]: here one each, of the same number."""
        return examples

    def packed(self, texts: Indices) -> dict[str, NDArray[Any]]:
        """The model's arguments for these encoded texts, end to end."""
        starts, lengths = self.encoded.offsets[texts], self.encoded.offsets[texts + 1] - self.encoded.offsets[texts]
        positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return {
            "input_ids": self.encoded.tokens[np.repeat(starts, lengths) + positions],
            "token_type_ids": positions >= np.repeat(self.encoded.first_lengths[texts], lengths),
            "position_ids": positions,
            "lengths": lengths,
        }

    def _epoch_order(self, epoch: int) -> Indices:
        """The epoch's permutation; the two latest are cached, because a global batch may span two epochs."""
        if epoch not in self._orders:
            if len(self._orders) == _CACHED_ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> Indices:
        count = self.count
        generator = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
        order: Indices = generator.permutation(count)
        if self.group is None:
            return order
        begun = -epoch * count % self.group
        return grouped_order(order, self.sizes, self.group, begun, generator)


class LabelledSource(EncodedSource):
    """Encoded examples with a label each."""

    def __init__(
        self,
        encoded: EncodedTexts,
        labels: NDArray[Any],
        seed: int,
        fixed: bool = False,
        group: int | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            labels: [N] class ids, or numbers, or [N, L] of several labels.
            weights: what each example counts in a weighted mean, [N]; their sum is then among the totals.
        """
        super().__init__(encoded, seed, fixed, group)
        assert len(labels) == self.count
        self.labels, self.weights = labels, weights

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        """sequences and, where examples have weights, weights."""
        counted = super().totals(epoch, indices)
        if self.weights is None:
            return counted
        return counted | {"weights": float(self.weights[self._places(epoch, indices)].sum(dtype=np.float64))}

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """labels [B]."""
        return {"labels": self.labels[examples]}
