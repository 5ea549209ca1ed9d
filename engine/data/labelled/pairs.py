"""Texts with their positives and negatives, or with a number that tells how alike the two of a pair are.

Shapes: N examples, S sequences of all of them (of each example its text, its positive, then its negatives), U different
texts among these, B and s examples and sequences of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import LabelledConfig
from engine.data.labelled.choices import texts_of
from engine.data.labelled.classes import held_out, select
from engine.data.labelled.encoded import EncodedTexts
from engine.data.labelled.files import Examples, label_of, read_with
from engine.data.labelled.groups import GroupedSource
from engine.data.labelled.tables import Columns, columns_in, of_field
from engine.data.loading.source import Indices
from engine.errors import UserError

#: members of an example, by their place in it; negatives come behind
TEXT, POSITIVE = 0, 1
#: a label of a training example
NOT_READ = "not read"


@dataclass(frozen=True)
class Pairs(Examples):
    """Texts with a positive each; where `pairs` is None, a text is its own. `labels` are empty where there are none."""

    negatives: list[list[str]] = field(default_factory=list)
    """of each example, perhaps none"""

    @property
    def are_labelled(self) -> bool:
        """Whether the file has the column of labels."""
        return bool(self.labels[0])

    def distinct(self) -> tuple[list[str], Indices, list[int]]:
        """The different texts [U] in the order in which they first come, which of them each sequence is [S], and how
        many sequences each example has [N]."""
        numbers: dict[str, int] = {}
        members: list[int] = []
        positives = self.texts if self.pairs is None else self.pairs
        for text, positive, negatives in zip(self.texts, positives, self.negatives, strict=True):
            members += [numbers.setdefault(one, len(numbers)) for one in (text, positive, *negatives)]
        counts = [2 + len(negatives) for negatives in self.negatives]
        return list(numbers), np.array(members, dtype=np.int64), counts


@dataclass(frozen=True)
class PairColumns(Columns):
    """Columns of which some are read where they are there."""

    optional: tuple[str, ...] = ()

    def kept(self, available: Sequence[str]) -> Sequence[str]:
        return tuple(dict.fromkeys((*super().kept(available), *(set(self.optional) & set(available)))))


def read_pairs(path: str, labelled: LabelledConfig, *, training: bool) -> Pairs:
    """Read texts with their positives and negatives.

    The column of labels is read where it is there. A file for evaluation may lack the negatives; one for training lacks
    the positives if `labelled.positives` is dropout.

    Args:
        path: as of `read_examples`.
        labelled: the names of the columns. Negatives are a column of lists of texts or of one text each, or several
            columns of one text each, see `columns_in`.
        training: whether it is the file of the training examples.

    Raises:
        UserError: as `read_examples`; a negative that is no text, or is the row's text or positive.
    """
    names = () if labelled.negatives is None else columns_in(labelled.negatives)
    if labelled.negatives is not None and not names:
        raise UserError(
            f"labelled.negatives: {labelled.negatives!r} is not allowed; give a column of texts or lists, or several "
            "as a,b,c"
        )
    pair = None if training and labelled.positives == "dropout" else labelled.text_pair
    label, found, labelled_rows = labelled.label, list[list[str]](), list[bool]()

    def read(record: Mapping[str, Any], where: str, declared: tuple[str, ...] | None) -> str:
        labelled_rows.append(label in record)
        if labelled_rows[0] != labelled_rows[-1]:
            which = ("a", "which the first row lacks") if labelled_rows[-1] else ("no", "which the first row has")
            raise UserError(f"{where}: {which[0]} column {label!r}, {which[1]}; give it in all rows or in none")
        scored = labelled_rows[0] and not training
        here = () if scored or not (training or set(names) <= set(record)) else names
        own = {record[labelled.text], record[pair] if pair else None}
        found.append(_negatives(record, here, own, where))
        if training and labelled.validation is not None:  # a number that nobody reads may be anything
            return NOT_READ if labelled_rows[0] else ""
        return label_of(record[label], label, where, None) if labelled_rows[0] else ""

    more = of_field("labelled.negatives", names)
    PairColumns(labelled.text, pair, label, more).check()
    optional = (label,) if training else (label, *names)
    columns = PairColumns(labelled.text, pair, "", more if training else (), optional)
    read_ = read_with(path, columns, read)
    return Pairs(path, read_.texts, read_.pairs, read_.labels, read_.positions, None, found)


def _negatives(record: Mapping[str, Any], names: Sequence[str], own: set[Any], where: str) -> list[str]:
    """Those of a row.

    Args:
        own: its text and positive.
    """
    given = [record[name] for name in names]
    if len(names) == 1:
        given = given[0] if isinstance(given[0], list) else given
    columns = names if len(names) == len(given) else [f"{names[0]}[{index}]" for index in range(len(given))]
    negatives = texts_of(given, columns, where)
    for negative, column in zip(negatives, columns, strict=True):
        if negative in own:
            raise UserError(f"{where}: column {column!r} holds the row's own text or positive; give another negative")
    return negatives


def split_pairs(training: Pairs, labelled: LabelledConfig, seed: int) -> tuple[Pairs, Pairs]:
    """Training examples and those of them that are held out for validation.

    Raises:
        UserError: too few examples to hold any out.
    """
    kept, held = (_select(training, part) for part in held_out(labelled, [""] * len(training), seed))
    return kept, replace(held, negatives=[[]] * len(held)) if training.are_labelled else held


def _select(pairs: Pairs, indices: Sequence[int]) -> Pairs:
    chosen = select(pairs, indices)
    assert isinstance(chosen, Pairs)
    return replace(chosen, negatives=[pairs.negatives[index] for index in indices])


class PairSource(GroupedSource):
    """Encoded examples: a sample is a text with its positive and negatives, sequences of a batch one after the other.

    A batch also carries, of each sequence [s], `sequence`: its number among those of the whole source, by which the
    examples of all ranks are put in order; `member`: its place in its example, see `TEXT` and `POSITIVE`; and `text`:
    the number of its text, which all sequences with the same tokens share.
    """

    def __init__(
        self,
        encoded: EncodedTexts,
        numbers: Indices,
        members: Indices,
        counts: Sequence[int],
        seed: int,
        fixed: bool = False,
        group: int | None = None,
        labels: NDArray[np.float32] | None = None,
    ) -> None:
        """
        Args:
            encoded: of the different texts, [U].
            numbers: by which they are told apart, see `digests`, [U].
            members: which of them each sequence is, [S].
            counts: sequences of each example, [N].
            labels: how alike text and positive are, [N]; None where that isn't known.
        """
        super().__init__(encoded, counts, seed, fixed, group, members)
        self.texts = numbers[_first_alike(encoded)[members]]
        self.labels = labels

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return super().totals(epoch, indices) | {"pairs": float(len(indices))}

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """sequence, member, text [s]; labels [B] where there are any."""
        places = self.places(examples)
        sequence = np.repeat(self.first[examples], self.counts[examples]) + places
        found = {"sequence": sequence, "member": places, "text": self.texts[sequence]}
        return found if self.labels is None else found | {"labels": self.labels[examples]}


def digests(texts: Sequence[str]) -> Indices:
    """A number of each text's own, from its content alone, int64."""
    found = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts]
    return np.frombuffer(b"".join(found), dtype="<i8").astype(np.int64)


def _first_alike(encoded: EncodedTexts) -> Indices:
    """Of each text the first one with its tokens, [U]."""
    first: dict[bytes, int] = {}
    rows = (encoded.tokens[start:stop].tobytes() for start, stop in pairwise(encoded.offsets.tolist()))
    return np.array([first.setdefault(row, index) for index, row in enumerate(rows)], dtype=np.int64)
