"""Labelled data of sequence classification: class ids, a held-out share, and packed batches of token ids.

Shapes: N examples, B examples of a batch, T tokens of a batch (packed end to end, no padding).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.processors import BertProcessing
from torch import Tensor

from engine.data.labelled.files import Examples
from engine.data.loading.lengths import grouped_order
from engine.data.loading.source import Indices
from engine.data.tokenizer.wordpiece import Vocabulary
from engine.errors import UserError

HELD_OUT_SHARE = 0.1
ENCODING_CHUNK = 10_000
#: fewer training examples are a trial, in which a class with a single example is no mistake
FEW_EXAMPLES = 20
# first words of the seeds, so that the choice of held-out examples and the epochs' orders are independent
HOLD_OUT_STREAM, ORDER_STREAM = 1, 2
_CACHED_ORDERS = 2

T = TypeVar("T")


def class_names(training: Examples) -> tuple[str, ...]:
    """Names of the classes, in the order of their ids.

    The order is the one that the data set declares, else numeric where every name is a number, else alphabetic:
    the same for every order of the examples.

    Raises:
        UserError: all examples have the same label, or most labels occur only once.
    """
    present = set(training.labels)
    if len(present) < 2:
        only = next(iter(present))
        raise UserError(f"{training.path}: every label is {only!r}; give at least two classes, or set labelled.label")
    _refuse_ids(training)
    if training.names is not None:
        return training.names
    try:
        return tuple(sorted(present, key=lambda name: (float(name), name)))
    except ValueError:
        return tuple(sorted(present))


def _refuse_ids(training: Examples) -> None:
    """Raise if the labels look like identifiers of examples instead of classes: most occur only once."""
    single = sum(count == 1 for count in Counter(training.labels).values())
    if len(training) >= FEW_EXAMPLES and single > len(training) / 2:
        raise UserError(
            f"{training.path}: {single:,} of {len(training):,} examples have a label of their own; "
            "set labelled.label to the column of the class"
        )


def class_ids(examples: Examples, names: Sequence[str]) -> Indices:
    """Class id of every example, int64 [N].

    Raises:
        UserError: a label that is not among `names`.
    """
    ids = {name: number for number, name in enumerate(names)}
    for index, label in enumerate(examples.labels):
        if label not in ids:
            known = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(
                f"{examples.place(index)}: label {label!r} is not among the training examples ({known}); "
                "correct it or add training examples of it"
            )
    return np.array([ids[label] for label in examples.labels], dtype=np.int64)


def hold_out(labels: Sequence[str], seed: int, share: float = HELD_OUT_SHARE) -> tuple[list[int], list[int]]:
    """Split examples into (kept, held out), both in file order, with `share` of every class held out.

    Every class keeps at least one example; a class too small to spare one has none held out.
    """
    generator = np.random.default_rng([HOLD_OUT_STREAM, seed])
    array = np.asarray(labels)
    held: list[int] = []
    for name in np.unique(array):
        members = np.flatnonzero(array == name)
        count = min(round(share * len(members)), len(members) - 1)
        held += generator.permutation(members)[:count].tolist()
    chosen = set(held)
    return [index for index in range(len(array)) if index not in chosen], sorted(held)


def split_validation(training: Examples, seed: int) -> tuple[Examples, Examples]:
    """Training examples and the tenth of them that is held out for validation.

    Raises:
        UserError: too few examples to hold any out, or most labels occur only once.
    """
    _refuse_ids(training)
    kept, held = hold_out(training.labels, seed)
    if not held:
        count = len(training)
        raise UserError(f"{training.path}: {count} examples are too few to hold some out; set labelled.validation")
    return select(training, kept), select(training, held)


def select(examples: Examples, indices: Sequence[int]) -> Examples:
    """The examples at `indices`."""

    def pick(values: list[T]) -> list[T]:
        return [values[index] for index in indices]

    return replace(
        examples,
        texts=pick(examples.texts),
        pairs=None if examples.pairs is None else pick(examples.pairs),
        labels=pick(examples.labels),
        positions=pick(examples.positions),
    )


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
    # A copy: post-processor and truncation would otherwise stay on the vocabulary's own tokenizer.
    tokenizer = Tokenizer.from_str(vocabulary.backend.to_str())
    if vocabulary.is_wordpiece:
        tokenizer.post_processor = BertProcessing(("[SEP]", vocabulary.sep_id), ("[CLS]", vocabulary.cls_id))
    tokenizer.no_padding()
    untruncated = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.enable_truncation(max_length, strategy="longest_first")
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


def _full_lengths(
    tokenizer: Tokenizer, inputs: Sequence[str] | Sequence[tuple[str, str]], lengths: list[int], max_length: int
) -> list[int]:
    """Lengths before truncation: inputs that reach `max_length` are encoded again without it."""
    longest = [index for index, length in enumerate(lengths) if length == max_length]
    full = lengths.copy()
    for index, encoding in zip(longest, tokenizer.encode_batch_fast([inputs[index] for index in longest]), strict=True):
        full[index] = len(encoding.ids)
    return full


class LabelledSource:
    """Labelled examples as a `SampleSource`.

    An epoch is a permutation keyed by (seed, epoch); with `group`, the global batch, it brings examples of similar
    length into the same global batch, whose composition is then less random. With `fixed` every epoch keeps the file's
    order, and each batch also carries `index` [B], the examples' indices in the file, by which an evaluation puts what
    it gathers from all ranks in order; it is not an argument of the model.
    """

    def __init__(
        self, encoded: EncodedTexts, labels: Indices, seed: int, fixed: bool = False, group: int | None = None
    ) -> None:
        assert len(encoded.offsets) == len(labels) + 1
        self.encoded = encoded
        self.labels = labels
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
        """sha256 of the token ids, segments and class ids of all examples, in order."""
        digest = hashlib.sha256()
        for array in (self.encoded.tokens, self.encoded.offsets, self.encoded.first_lengths, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def epoch_size(self, epoch: int) -> int:
        return len(self.labels)

    def describe(self, epoch: int, indices: Indices) -> Indices:
        """Indices of the examples in the file, int64 [B]."""
        return self._places(epoch, indices)

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        """Length in tokens of each of these examples, int64 [B]."""
        places = self._places(epoch, indices)
        return self.encoded.offsets[places + 1] - self.encoded.offsets[places]

    def _places(self, epoch: int, indices: Indices) -> Indices:
        return indices if self.fixed else self._epoch_order(epoch)[indices]

    def join(self, descriptions: list[Indices]) -> Indices:
        return np.concatenate(descriptions)

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return {"sequences": float(len(indices))}

    def collate(self, description: Indices) -> dict[str, Tensor]:
        """Packed int64 tensors: input_ids, token_type_ids, position_ids [T]; lengths, labels (and index) [B]."""
        starts = self.encoded.offsets[description]
        lengths = self.encoded.offsets[description + 1] - starts
        positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        arrays = {
            "input_ids": self.encoded.tokens[np.repeat(starts, lengths) + positions],
            "token_type_ids": positions >= np.repeat(self.encoded.first_lengths[description], lengths),
            "position_ids": positions,
            "lengths": lengths,
            "labels": self.labels[description],
        }
        if self.fixed:
            arrays["index"] = description
        return {name: torch.from_numpy(array.astype(np.int64)) for name, array in arrays.items()}

    def _epoch_order(self, epoch: int) -> Indices:
        """The epoch's permutation; the two latest are cached, because a global batch may span two epochs."""
        if epoch not in self._orders:
            if len(self._orders) == _CACHED_ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> Indices:
        count = len(self.labels)
        generator = np.random.default_rng([ORDER_STREAM, self.seed, epoch])
        order: Indices = generator.permutation(count)
        if self.group is None:
            return order
        begun = -epoch * count % self.group
        return grouped_order(order, np.diff(self.encoded.offsets), self.group, begun, generator)
