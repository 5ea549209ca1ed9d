"""Samples for MLM alone: full sequences of pieces of documents, without padding."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.loading.source import Indices
from engine.data.pretraining import sequences
from engine.data.pretraining.masking import mask_tokens, masked_count, sample_keys
from engine.data.pretraining.plans import EpochPlans
from engine.data.pretraining.sequences import SPECIAL_TOKENS, Documents, Pieces, SequencePlan
from engine.data.pretraining.source import PretrainingOptions, TokenFacts, TokenisedText

Int64s = NDArray[np.int64]
Flags = NDArray[np.bool_]

#: of the sequences that the same options make of a text
PLAN_VERSION = 1


class SequenceRows(NamedTuple):
    """Descriptions of B samples."""

    epoch: Int64s
    """[B]"""
    sample: Int64s
    """[B] index within the epoch"""
    probability: NDArray[np.float64]
    """[B] share of tokens that is predicted"""
    pieces: Pieces


class FullSequenceSource:
    """MLM samples of a split, each of exactly the wanted length; with `fixed`, one pass over the text, for evaluation.

    Raises:
        UserError: when it is made, if the text doesn't fill a sequence.
    """

    def __init__(
        self, split: TokenisedText, facts: TokenFacts, options: PretrainingOptions, fixed: bool = False
    ) -> None:
        self._split, self._facts, self._options, self._fixed = split, facts, options, fixed
        self._documents = Documents.of_sentences(split.sentence_lengths, split.document_starts)
        if not fixed:
            sequences.check_fills(self._documents, options.sequence_length)
        self._plans = EpochPlans(self._make_plan)
        self._rules = options.rules(facts)
        self._rate = options.rate(lambda: self.epoch_size(0))

    @property
    def plan_version(self) -> int:
        return PLAN_VERSION

    def summary(self) -> str:
        """A line that tells how much of the text an epoch covers, and what its sequences are made of."""
        length, tokens = self._options.sequence_length, self._documents.tokens
        share = tokens / self._documents.stream * (length - SPECIAL_TOKENS) / length
        return (
            f"an epoch shows each of the text's {tokens:,} tokens once, in {self.epoch_size(0):,} sequences of "
            f"{length}, {100 * (1 - share):.1f} % of them [CLS] and [SEP]"
        )

    def epoch_size(self, epoch: int) -> int:
        """Number of sequences that begin in an epoch; it varies by one."""
        return len(self._plan(epoch).begin)

    def describe(self, epoch: int, indices: Indices) -> SequenceRows:
        """The pieces of these samples.

        Halfway through an epoch the plan of the next one is begun, so that no step waits for it.
        """
        if not self._fixed and indices[-1] >= self.epoch_size(epoch) // 2:
            self._plans.begin(epoch + 1)
        epochs = np.full(len(indices), 0 if self._fixed else epoch)
        return SequenceRows(epochs, indices, self._probability(epoch, indices), self._pieces(epoch, indices))

    def join(self, descriptions: list[SequenceRows]) -> SequenceRows:
        """Rows of several epochs one after the other."""
        epochs, samples, probabilities, parts = zip(*descriptions, strict=True)
        epoch, sample, probability = map(np.concatenate, (epochs, samples, probabilities))
        return SequenceRows(epoch, sample, probability, sequences.joined(list(parts)))

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        """Length in tokens of each of these samples, int64 [B]: the same but for the last of one pass."""
        begin = self._plan(epoch).begin[indices]
        return SPECIAL_TOKENS + self._end(begin) - begin

    def attended(self, epoch: int, indices: Indices) -> Indices:
        """Tokens of each sequence that attention sees in these samples, which are their pieces, int64."""
        parts = self._pieces(epoch, indices)
        return np.asarray(parts.opening + parts.length + parts.closing, dtype=np.int64)

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        """`mlm`: predicted tokens; `sequences`: samples. No token is read."""
        parts = self._pieces(epoch, indices)
        predicted = masked_count(_sums(parts.length, parts.number), self._probability(epoch, indices))
        return {"mlm": float(predicted.sum()), "sequences": float(len(indices))}

    def collate(self, description: SequenceRows) -> dict[str, Tensor]:
        """B samples of P pieces and T tokens together, M of them predicted, packed one after the other; all int64.

        Returns:
            input_ids, token_type_ids (0), position_ids (a token's place in its piece): [T].
            lengths: [P] tokens of each piece: for attention each is a sequence.
            mlm_positions, mlm_labels: [M] ascending indices into T, and the original ids there.
        """
        parts = description.pieces
        lengths = parts.opening + parts.length + parts.closing
        ids, is_text, positions = self._pack(parts, lengths)
        keys = sample_keys(self._options.seed, description.epoch, description.sample)
        rules = replace(self._rules, probability=description.probability)
        masked = mask_tokens(ids, is_text, _sums(lengths, parts.number), keys, rules)
        arrays = {
            "input_ids": masked.ids,
            "token_type_ids": np.zeros_like(positions),
            "position_ids": positions,
            "lengths": lengths,
            "mlm_positions": masked.positions,
            "mlm_labels": masked.labels,
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _pack(self, parts: Pieces, lengths: Int64s) -> tuple[Int64s, Flags, Int64s]:
        """Token ids, true at tokens of the text, position in the piece: all [T]."""
        place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        opens = place < np.repeat(parts.opening, lengths)
        is_text = ~opens & (place < np.repeat(parts.opening + parts.length, lengths))
        ids = np.where(opens, self._facts.cls_id, self._facts.sep_id)
        told = parts.length > 0
        ids[is_text] = self._split.gather(parts.start[told], parts.length[told])
        return ids, is_text, place

    def _probability(self, epoch: int, indices: Indices) -> NDArray[np.float64]:
        return self._rate.of_samples(epoch, indices, self.epoch_size(epoch))

    def _pieces(self, epoch: int, indices: Indices) -> Pieces:
        """The pieces of these samples; the last of an epoch goes on in the next one."""
        plan, inner = self._plan(epoch), self._documents.stream
        begin = plan.begin[indices]
        end = self._end(begin)
        own = sequences.pieces(plan, begin, np.minimum(end, inner))
        over = np.flatnonzero(end > inner)
        if len(over):
            tails = sequences.pieces(self._plan(epoch + 1), np.zeros(len(over), np.int64), end[over] - inner)
            own = sequences.continued(own, tails, over)
        return sequences.closed(own)

    def _end(self, begin: Int64s) -> Int64s:
        """Where the parts of the stream end that begin there."""
        end = begin + self._options.sequence_length - SPECIAL_TOKENS
        return np.minimum(end, self._documents.stream - 1) if self._fixed else end

    def _plan(self, epoch: int) -> SequencePlan:
        return self._plans.plan(0 if self._fixed else epoch)

    def _make_plan(self, epoch: int) -> SequencePlan:
        common = {"sequence_length": self._options.sequence_length, "seed": self._options.seed}
        if self._fixed:
            return sequences.plan_once(self._documents, **common)
        return sequences.plan_epoch(self._documents, **common, epoch=epoch)


def _sums(values: Int64s, count: Int64s) -> Int64s:
    """Sums [B] over the pieces of each sequence."""
    return np.add.reduceat(values, np.cumsum(count) - count)
