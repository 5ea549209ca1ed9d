"""Pre-training samples: [CLS] A [SEP] B [SEP] with MLM and NSP labels, packed without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.loading.source import Indices
from engine.data.pretraining.masking import MaskingRate, MaskingRules, mask_tokens, masked_count, sample_keys
from engine.data.pretraining.pairs import PairPlan, plan_epoch, plan_version, shown_share
from engine.data.pretraining.plans import EpochPlans

if TYPE_CHECKING:
    from engine.data.tokenizer.vocabulary import Vocabulary

Int64s = NDArray[np.int64]
Flags = NDArray[np.bool_]

_SPECIAL_TOKENS = 3


class TokenisedText(Protocol):
    """One split of the prepared text."""

    @property
    def sentence_lengths(self) -> NDArray[np.int32]:
        """[S] tokens of each sentence."""
        ...

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """[D + 1] first sentence of each document, then S."""
        ...

    def gather(self, starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.unsignedinteger[Any]]:
        """Ids of N segments one after the other: `lengths` [N] of them from positions `starts` [N] in the split.

        Each lies within one document; no special tokens.
        """
        ...


@dataclass(frozen=True)
class TokenFacts:
    """What sample making needs to know of a vocabulary of V tokens."""

    cls_id: int
    sep_id: int
    mask_id: int
    regular_ids: Int64s
    """[R] ids of all but special tokens"""
    continues_word: Flags
    """[V] true for word pieces that continue a word (##…)"""

    @classmethod
    def of(cls, words: Vocabulary) -> TokenFacts:
        """Those of a tokenizer's vocabulary."""
        return cls(words.cls_id, words.sep_id, words.mask_id, words.regular_ids, words.continues_word)


@dataclass(frozen=True)
class PretrainingOptions:
    """How samples are made from text."""

    sequence_length: int
    """tokens of a sequence, special tokens included"""
    short_sequence_probability: float
    """share of pairs with a random shorter target length"""
    mask_probability: float
    """share of text tokens that the MLM predicts"""
    whole_word: bool
    """mask all pieces of a word together"""
    seed: int
    """seed of pairs and masking"""
    mask_probability_end: float | None = None
    """that share at the end of the run, to which it changes linearly; None: it doesn't change"""
    run_epochs: Callable[[int], float] = lambda first_size: 1.0
    """epochs of the run, from the samples of the first one"""
    mask_share: float = 0.8
    """share of predicted tokens that become [MASK]"""
    random_share: float = 0.1
    """share of them that become random tokens"""
    mean_span: float = 1.0
    """mean length of masked spans; see `MaskingRules`"""

    def rules(self, facts: TokenFacts) -> MaskingRules:
        """What they mean for this vocabulary."""
        continues_word = facts.continues_word if self.whole_word else None
        shares = (self.mask_share, self.random_share, self.mean_span)
        return MaskingRules(self.mask_probability, facts.mask_id, facts.regular_ids, continues_word, *shares)

    def rate(self, first_size: Callable[[], int]) -> MaskingRate:
        """The share of predicted tokens over the run.

        Args:
            first_size: the samples of the first epoch, asked for only where the share changes.
        """
        begin, end = self.mask_probability, self.mask_probability_end
        return MaskingRate(begin, begin, 1.0) if end is None else MaskingRate(begin, end, self.run_epochs(first_size()))


class PairRows(NamedTuple):
    """Descriptions of B samples: rows of the pair plans and where they come from; each field is [B]."""

    epoch: Int64s
    sample: Int64s
    """index within the epoch"""
    a_start: Int64s
    a_length: NDArray[np.int32]
    b_start: Int64s
    b_length: NDArray[np.int32]
    is_random: Flags
    probability: NDArray[np.float64]
    """share of tokens that is predicted"""


class PretrainingSource:
    """MLM + NSP samples of a split; with `fixed`, every epoch is epoch 0, for evaluation.

    Raises:
        UserError: from `epoch_size`, `describe`, `summary` and `totals`, when fewer than two documents have text.
    """

    def __init__(
        self, split: TokenisedText, facts: TokenFacts, options: PretrainingOptions, fixed: bool = False
    ) -> None:
        self._split, self._facts, self._options, self._fixed = split, facts, options, fixed
        self._plans = EpochPlans(self._make_plan)
        self._rules = options.rules(facts)

    @cached_property
    def _rate(self) -> MaskingRate:
        return self._options.rate(lambda: self.epoch_size(0))

    @property
    def plan_version(self) -> int:
        """See `engine.data.pretraining.pairs.plan_version`."""
        return plan_version(self._split.sentence_lengths, self._options.sequence_length)

    def summary(self) -> str:
        """A line that tells how much of the text an epoch covers: one whose plan exists already, else the first."""
        plan = self._plans.plan(min(self._plans, default=0))
        shown = shown_share(plan, int(self._split.sentence_lengths.sum(dtype=np.int64)))
        return (
            f"an epoch shows {100 * shown:.1f} % of the text's tokens, in {len(plan):,} sequences of up to "
            f"{self._options.sequence_length}"
        )

    def epoch_size(self, epoch: int) -> int:
        """Number of pairs of an epoch; it varies a little from epoch to epoch."""
        return len(self._plans.plan(self._source_epoch(epoch)))

    def describe(self, epoch: int, indices: Indices) -> PairRows:
        """The plan's rows of these samples.

        Halfway through an epoch the plan of the next one is begun, so that no step waits for it.
        """
        epoch, rate = self._source_epoch(epoch), self._rate
        plan = self._plans.plan(epoch)
        if not self._fixed and indices[-1] >= len(plan) // 2:
            self._plans.begin(epoch + 1)
        return PairRows(
            np.full(len(indices), epoch),
            indices,
            plan.a_start[indices],
            plan.a_length[indices],
            plan.b_start[indices],
            plan.b_length[indices],
            plan.is_random[indices],
            rate.of_samples(epoch, indices, len(plan)),
        )

    def join(self, descriptions: list[PairRows]) -> PairRows:
        """Rows of several epochs one after the other."""
        return PairRows(*(np.concatenate(column) for column in zip(*descriptions, strict=True)))

    def lengths(self, epoch: int, indices: Indices) -> Indices:
        """Length in tokens of each of these samples, int64 [B]. No token is read."""
        plan = self._plans.plan(self._source_epoch(epoch))
        return plan.a_length[indices].astype(np.int64) + plan.b_length[indices] + _SPECIAL_TOKENS

    attended = lengths
    """Tokens of each sequence that attention sees: a pair is one"""

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        """`mlm`: predicted tokens; `sequences`: samples. No token is read."""
        epoch, rate = self._source_epoch(epoch), self._rate
        plan = self._plans.plan(epoch)
        probability = rate.of_samples(epoch, indices, len(plan))
        predicted = masked_count(plan.a_length[indices] + plan.b_length[indices], probability)
        return {"mlm": float(predicted.sum()), "sequences": float(len(indices))}

    def collate(self, description: PairRows) -> dict[str, Tensor]:
        """B samples of T tokens together, M of them predicted, packed one after the other; all int64.

        Returns:
            input_ids, token_type_ids (0: [CLS] A [SEP], 1: B [SEP]), position_ids: [T].
            lengths: [B] tokens of each sequence.
            mlm_positions, mlm_labels: [M] ascending indices into T, and the original ids there.
            nsp_labels: [B] 1 where B is from another document.
        """
        rows = description
        lengths = rows.a_length.astype(np.int64) + rows.b_length + _SPECIAL_TOKENS
        ids, is_text, positions, second = self._pack(rows, lengths)
        keys = sample_keys(self._options.seed, rows.epoch, rows.sample)
        masked = mask_tokens(ids, is_text, lengths, keys, replace(self._rules, probability=rows.probability))
        arrays = {
            "input_ids": masked.ids,
            "token_type_ids": second.astype(np.int64),
            "position_ids": positions,
            "lengths": lengths,
            "mlm_positions": masked.positions,
            "mlm_labels": masked.labels,
            "nsp_labels": rows.is_random.astype(np.int64),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def _pack(self, rows: PairRows, lengths: Int64s) -> tuple[Int64s, Flags, Int64s, Flags]:
        """Token ids, true at tokens of the text, position in the sequence, true in the second segment: all [T]."""
        end = np.cumsum(lengths)
        start = end - lengths
        middle = start + 1 + rows.a_length
        ids = np.empty(end[-1], np.int64)
        is_text = np.ones(end[-1], np.bool_)
        for place, token in ((start, self._facts.cls_id), (middle, self._facts.sep_id), (end - 1, self._facts.sep_id)):
            ids[place] = token
            is_text[place] = False
        ids[is_text] = self._text(rows)
        place = np.arange(end[-1])
        return ids, is_text, place - np.repeat(start, lengths), place > np.repeat(middle, lengths)

    def _text(self, rows: PairRows) -> NDArray[np.unsignedinteger[Any]]:
        """Token ids of A and B of the first sample, of the second, …"""
        starts = np.stack((rows.a_start, rows.b_start), axis=1).ravel()
        lengths = np.stack((rows.a_length, rows.b_length), axis=1).ravel()
        return self._split.gather(starts, lengths)

    def _source_epoch(self, epoch: int) -> int:
        return 0 if self._fixed else epoch

    def _make_plan(self, epoch: int) -> PairPlan:
        return plan_epoch(
            self._split.sentence_lengths,
            self._split.document_starts,
            sequence_length=self._options.sequence_length,
            short_sequence_probability=self._options.short_sequence_probability,
            seed=self._options.seed,
            epoch=epoch,
        )
