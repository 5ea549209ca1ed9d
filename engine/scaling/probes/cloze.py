"""Cloze questions: a word of held-out text, masked in its context.

Words are of letters, of one piece or several, which are all masked; so the number of pieces is told. A word's frequency
is counted in the training split, so that the questions are of the store and the seed alone, the same for every model.

Shapes: T tokens, W words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.pretraining.masking import random_bits
from engine.data.store.store import Split, TokenStore, open_store
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import UserError, require
from engine.scaling.probes.masked import MaskedModel, Question
from engine.scaling.probes.request import Request, Scores, check_positions, scored

#: by band, the least and the most that a word occurs among a million words of the training split
BANDS = {"frequent": (100.0, np.inf), "rare": (0.0, 10.0)}
#: tokens at the beginning of the training split whose words are counted, and of the held-out split that may be asked
COUNTED, HELD_OUT = 20_000_000, 5_000_000
#: questions about one word, at most
PER_WORD = 5
#: tokens that are worked on at once
_CHUNK = 1_000_000


@dataclass(frozen=True)
class _Words:
    """W words of letters in a stretch of documents."""

    start: NDArray[np.int64]
    """[W] first token, counted from the beginning of the split"""
    length: NDArray[np.int64]
    """[W] pieces"""
    key: NDArray[np.uint64]
    """[W] a hash of the pieces"""
    floor: NDArray[np.int64]
    ceiling: NDArray[np.int64]
    """[W] where the document of each begins and ends"""


def cloze(model: MaskedModel, request: Request) -> Scores:
    """How well masked words are found: `cloze_frequent` and `cloze_rare`.

    acc_: the share of words whose pieces are all the most probable ones. prob_: the mean of a word's probability, a
    product over its pieces. logp_: the mean over words of the mean over pieces, nats.

    Raises:
        UserError: no such store, one of another tokenizer than the model's or without words of a band, or a context
            that the model has no positions for.
    """
    assert request.store is not None
    store = open_store(request.store)
    require(
        store.manifest.tokenizer_fingerprint == model.vocabulary.fingerprint,
        "store",
        str(request.store),
        f"its tokenizer is not that of {model.folder}; give the store that the model was trained on",
    )
    check_positions("context", request.context, model.config, model.folder)
    drawn = _questions(
        request.store.absolute(), store.manifest.fingerprint, request.items, request.context, request.seed
    )
    return reduce(or_, (_score(model, f"cloze_{band}", questions) for band, questions in drawn.items()))


def _score(model: MaskedModel, name: str, questions: tuple[Question, ...]) -> Scores:
    answers = model.answer(questions)
    counts = np.diff(np.append(answers.firsts, len(answers.right)))
    sums = np.add.reduceat(answers.log_probabilities, answers.firsts)
    right = np.logical_and.reduceat(answers.right, answers.firsts)
    logp = float((sums / counts).mean())
    return scored(name, len(questions), None, float(right.mean()), prob=float(np.exp(sums).mean()), logp=logp)


@lru_cache(maxsize=4)
def _questions(path: Path, fingerprint: str, items: int, context: int, seed: int) -> dict[str, tuple[Question, ...]]:
    """The questions of each band; kept, for all models of a study are asked the same."""
    store = open_store(path)
    split = store.split("validation")
    held = _join(list(_words(split, store.tokenizer, HELD_OUT)))
    rates = _rates(store, held.key)
    questions = {}
    for band, (least, most) in BANDS.items():
        fitting = (rates > 0) & (rates >= least) & (rates <= most) & (held.length <= context // 2)
        places = _drawn(np.flatnonzero(fitting), held.key, items, seed)
        if not len(places):
            raise UserError(
                f"store: {path} holds out no word that occurs {least:g} to {most:g} times among a million of its "
                "training words; give a larger one"
            )
        questions[band] = tuple(_question(split, store.tokenizer, held, place, context) for place in places.tolist())
    return questions


def _words(split: Split, vocabulary: Vocabulary, limit: int) -> Iterator[_Words]:
    """The words of the documents at the beginning of a split, up to that in which token `limit` is."""
    letters, continues = _letters(vocabulary), vocabulary.continues_word
    ends = np.cumsum(split.sentence_lengths, dtype=np.int64)
    begins = np.concatenate(([0], ends))[split.document_starts]  # of documents, and the end of the last
    first = 0
    while first < len(begins) - 1 and begins[first] < limit:
        stop = max(first + 1, int(np.searchsorted(begins, begins[first] + _CHUNK)))
        stop = min(stop, len(begins) - 1)
        yield _chunk(split, begins[first : stop + 1], ends, letters, continues)
        first = stop


def _chunk(
    split: Split,
    begins: NDArray[np.int64],
    ends: NDArray[np.int64],
    letters: NDArray[np.bool_],
    continues: NDArray[np.bool_],
) -> _Words:
    """The words of the documents between `begins` [D + 1]; `ends` are those of all sentences."""
    origin = begins[0]
    ids = split.gather(begins[:-1], np.diff(begins)).astype(np.int64)
    inside = ends[np.searchsorted(ends, origin, "right") : np.searchsorted(ends, begins[-1])] - origin
    lettered = letters[ids]
    starts = ~continues[ids] | ~lettered
    starts[1:] |= ~lettered[:-1]
    starts[inside] = starts[0] = True
    place = np.flatnonzero(starts)
    length = np.diff(np.append(place, len(ids)))
    behind = np.arange(len(ids)) - np.repeat(place, length)
    key = np.add.reduceat(random_bits(ids, behind), place)
    whole = lettered[place] & ~continues[ids[place]]
    document = np.searchsorted(begins, place + origin, "right") - 1
    found = _Words(place + origin, length, key, begins[document], begins[document + 1])
    return _Words(*(part[whole] for part in vars(found).values()))


def _letters(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """[vocabulary] whether a piece is of letters alone."""
    found = np.zeros(vocabulary.vocab_size, dtype=np.bool_)
    for index in vocabulary.regular_ids.tolist():
        found[index] = vocabulary.text_of(index).removeprefix("##").isalpha()
    return found


def _join(parts: list[_Words]) -> _Words:
    if not parts:
        empty = np.empty(0, np.int64)
        return _Words(empty, empty, empty.astype(np.uint64), empty, empty)
    return _Words(*(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True)))


def _rates(store: TokenStore, keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """How often words [W] occur among a million words of the training split."""
    if not len(keys):
        return np.empty(0)
    known, own = np.unique(keys, return_inverse=True)
    counts, total = np.zeros(len(known), dtype=np.int64), 0
    for part in _words(store.split("train"), store.tokenizer, COUNTED):
        at = np.minimum(np.searchsorted(known, part.key), len(known) - 1)
        counts += np.bincount(at[known[at] == part.key], minlength=len(known))
        total += len(part.key)
    return counts[own] * 1e6 / max(total, 1)


def _drawn(places: NDArray[np.int64], keys: NDArray[np.uint64], items: int, seed: int) -> NDArray[np.int64]:
    """At most `items` of some words, `PER_WORD` of each one, ascending."""
    order = np.random.default_rng(seed).permutation(places)
    by_word = order[np.argsort(keys[order], kind="stable")]
    new = np.append(True, np.diff(keys[by_word]) != 0)[: len(by_word)]
    rank = np.arange(len(by_word)) - np.flatnonzero(new)[np.cumsum(new) - 1]
    allowed = np.isin(order, by_word[rank < PER_WORD], assume_unique=True)
    return np.sort(order[allowed][:items])


def _question(split: Split, vocabulary: Vocabulary, words: _Words, place: int, context: int) -> Question:
    """A word in the middle of its context, or where its document begins or ends."""
    start, length = int(words.start[place]), int(words.length[place])
    floor, ceiling, room = int(words.floor[place]), int(words.ceiling[place]), context - 2
    first = max(floor, min(start + length // 2 - room // 2, ceiling - room))
    text = split.tokens(first, min(room, ceiling - first)).astype(np.int32)
    ids = np.concatenate(([vocabulary.cls_id], text, [vocabulary.sep_id])).astype(np.int32)
    places = np.arange(start - first + 1, start - first + 1 + length)
    answers = ids[places]
    ids[places] = vocabulary.mask_id
    return Question(ids, places, answers)
