"""The loss of a masked language model on held-out text, with its standard error; the same masks for every model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.pretraining.full import FullSequenceSource
from engine.data.pretraining.source import PretrainingOptions, TokenFacts
from engine.data.store.store import Split, TokenStore, open_store
from engine.errors import require
from engine.scaling.probes.masked import MaskedModel, Question

#: share of tokens that is predicted, whatever a run learns with; curves of other shares can't be compared
MASK_PROBABILITY = 0.15
#: of the choice of masks
SEED = 0
#: sequences, spread evenly over the text
SEQUENCES = 1000


@dataclass(frozen=True)
class HeldOutLoss:
    """A mean over predicted tokens."""

    loss: float
    """nats per predicted token"""
    error: float
    """its standard error; sequences are taken as independent"""
    tokens: int
    """predicted ones"""


def held_out_loss(model: MaskedModel, path: Path, length: int, sequences: int = SEQUENCES) -> HeldOutLoss:
    """The loss on a prepared store: on its held-out split, or on all of a store that holds out nothing.

    Args:
        length: tokens of a sequence.
        sequences: at most.

    Raises:
        UserError: no store, one of another tokenizer than the model's, or of too little text.
    """
    store = open_store(path)
    require(
        store.manifest.tokenizer_fingerprint == model.vocabulary.fingerprint,
        "held_out",
        str(path),
        f"its tokenizer is not that of {model.folder}; prepare it with --tokenizer {model.folder}",
    )
    source = _source(store, length)
    size = source.epoch_size(0)
    chosen = np.unique(np.linspace(0, size - 1, min(sequences, size)).round().astype(np.int64))
    owners, questions = _questions(source, chosen)
    answers = model.answer(questions)
    counts = np.array([len(question.places) for question in questions])
    losses = -np.add.reduceat(answers.log_probabilities, answers.firsts)
    sums, numbers = (np.bincount(owners, weights=each, minlength=len(chosen)) for each in (losses, counts))
    return _mean(sums.astype(np.float64), numbers.astype(np.float64))


def _mean(losses: NDArray[np.float64], counts: NDArray[np.float64]) -> HeldOutLoss:
    """The ratio of two sums over sequences, and its standard error by linearisation (Cochran 1977, section 2.11)."""
    total, number = counts.sum(), len(counts)
    loss = losses.sum() / total
    spread = ((losses - loss * counts) ** 2).sum() * number / max(1, number - 1)
    return HeldOutLoss(float(loss), math.sqrt(spread) / float(total), int(total))


def _source(store: TokenStore, length: int) -> FullSequenceSource:
    options = PretrainingOptions(
        sequence_length=length,
        short_sequence_probability=0.0,
        mask_probability=MASK_PROBABILITY,
        whole_word=False,
        seed=SEED,
    )
    return FullSequenceSource(_split(store), TokenFacts.of(store.tokenizer), options, fixed=True)


def _split(store: TokenStore) -> Split:
    return store.split("validation" if store.manifest.splits["validation"] else "train")


def _questions(source: FullSequenceSource, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[Question]]:
    """Each piece with a mask as a question, and the number of the sequence that it is of."""
    owners, questions = [], []
    for number, index in enumerate(chosen):
        batch = {name: each.numpy() for name, each in source.collate(source.describe(0, index[None])).items()}
        ends = np.cumsum(batch["lengths"])
        piece = np.searchsorted(ends, batch["mlm_positions"], side="right")
        for which in np.unique(piece):
            begin, own = int(ends[which] - batch["lengths"][which]), piece == which
            ids = batch["input_ids"][begin : ends[which]].astype(np.int32)
            places, answers = batch["mlm_positions"][own] - begin, batch["mlm_labels"][own].astype(np.int32)
            questions.append(Question(ids, places, answers))
            owners.append(number)
    return np.array(owners), questions
