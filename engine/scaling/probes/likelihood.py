"""Minimal pairs by pseudo-log-likelihood: the sentence that is right should be the more probable one.

A sentence's pseudo-log-likelihood is the sum, over its pieces, of the log-probability of each where it is masked
(Salazar et al. 2020). With it those of its word that follow it are masked too: the rest of a word would give a piece
away, and sentences with words of several pieces would look more probable (Kauf and Ivanova 2023, "PLL-word-l2r").

Shapes: N sentences, P pieces of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.encoded import framed
from engine.errors import UserError
from engine.scaling.probes.masked import MaskedModel, Question
from engine.scaling.probes.request import Scores, scored
from engine.scaling.probes.templates import Pair


def pairs_scores(model: MaskedModel, name: str, pairs: Sequence[Pair]) -> Scores:
    """How well a model tells good sentences from bad ones.

    acc_: the share of pairs whose good sentence has the higher pseudo-log-likelihood. prob_: the mean of its share,
    exp(good) / (exp(good) + exp(bad)). logp_: the mean difference a piece, nats. brier_: the mean of 2 (1 - prob)^2.

    Raises:
        UserError: a sentence that is longer than the model reads.
    """
    sums, counts = pseudo_log_likelihoods(model, [text for pair in pairs for text in (pair.good, pair.bad)])
    apart = sums[::2] - sums[1::2]
    each = sums / counts
    other = np.exp(-np.logaddexp(0.0, apart))  # the share of the bad one
    return scored(
        name,
        len(pairs),
        0.5,
        float((apart > 0).mean()),
        prob=float((1.0 - other).mean()),
        logp=float((each[::2] - each[1::2]).mean()),
        brier=float((2.0 * other**2).mean()),
    )


def pseudo_log_likelihoods(
    model: MaskedModel, sentences: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of N sentences the sum, nats, and the number of pieces.

    Raises:
        UserError: a sentence is longer than the model reads, or has no piece.
    """
    questions, counts = [], []
    for text, own in zip(sentences, _asked(model, sentences), strict=True):
        if not own or len(own[0].ids) > model.positions:
            what = f"has more tokens than the {model.positions} positions" if own else "has no token"
            raise UserError(f"pairs: {text!r:.60} {what} of {model.folder}; leave that pair out")
        questions += own
        counts.append(len(own))
    answers = model.answer(questions).log_probabilities
    numbers = np.array(counts)
    return np.add.reduceat(answers, np.cumsum(numbers) - numbers), numbers


def _asked(model: MaskedModel, sentences: Sequence[str]) -> Iterator[list[Question]]:
    """Of each sentence a question about each of its pieces."""
    words = model.vocabulary
    for encoding in framed(words).encode_batch(words.unquote(sentences)):
        ids, word_of = np.array(encoding.ids, dtype=np.int32), encoding.word_ids
        pieces = [place for place, word in enumerate(word_of) if word is not None]
        asked = []
        for place in pieces:
            masked = ids.copy()
            rest = [other for other in pieces if other >= place and word_of[other] == word_of[place]]
            masked[rest] = words.mask_id
            asked.append(Question(masked, np.array([place]), ids[place : place + 1]))
        yield asked
