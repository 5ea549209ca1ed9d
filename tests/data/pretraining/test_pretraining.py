from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.data.pretraining.pairs import PLAN_VERSION, PairPlan, plan_epoch, shown_share
from engine.data.pretraining.source import PretrainingOptions, PretrainingSource, TokenFacts
from engine.errors import UserError

CLS, SEP, MASK, FIRST_REGULAR, VOCABULARY = 2, 3, 4, 5, 500
KEYS = {"input_ids", "token_type_ids", "position_ids", "lengths", "mlm_positions", "mlm_labels", "nsp_labels"}
OPTIONS = PretrainingOptions(
    sequence_length=64, short_sequence_probability=0.1, mask_probability=0.15, whole_word=False, seed=3
)
FACTS = TokenFacts(CLS, SEP, MASK, np.arange(FIRST_REGULAR, VOCABULARY), np.arange(VOCABULARY) % 4 == 0)


class Text:
    """A split in memory whose sentences lie one after the other."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.sentence_lengths = np.array([length for document in documents for length in document], np.int32)
        self.document_starts = np.cumsum([0, *map(len, documents)], dtype=np.int64)
        total = int(self.sentence_lengths.sum())
        self.ids = np.random.default_rng(0).integers(FIRST_REGULAR, VOCABULARY, total).astype(np.uint16)
        self.document_ends = np.cumsum([sum(document) for document in documents])

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        documents = np.searchsorted(self.document_ends, starts, side="right")
        assert starts.min() >= 0
        assert lengths.min() >= 1
        assert (starts + lengths <= self.document_ends[documents]).all()
        return np.concatenate([self.ids[start:][:length] for start, length in zip(starts, lengths, strict=True)])


@pytest.fixture(scope="module")
def text() -> Text:
    rng = np.random.default_rng(5)
    return Text([rng.integers(2, 40, rng.integers(1, 20)).tolist() for _ in range(60)])


@pytest.fixture(scope="module")
def source(text: Text) -> PretrainingSource:
    return PretrainingSource(text, FACTS, OPTIONS)


def collate(source: PretrainingSource, epoch: int, *indices: int) -> dict[str, Tensor]:
    return source.collate(source.describe(epoch, np.array(indices)))


def unmasked(batch: dict[str, Tensor]) -> np.ndarray:
    ids = batch["input_ids"].clone()
    ids[batch["mlm_positions"]] = batch["mlm_labels"]
    return ids.numpy()


def test_samples_are_cls_a_sep_b_sep_of_the_plans_pairs(source: PretrainingSource, text: Text) -> None:
    plan = plan_epoch(
        text.sentence_lengths,
        text.document_starts,
        sequence_length=64,
        short_sequence_probability=0.1,
        seed=3,
        epoch=1,
    )
    indices = np.arange(20, 29)
    batch = collate(source, 1, *indices)
    assert set(batch) == KEYS
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert batch["nsp_labels"].tolist() == plan.is_random[indices].astype(int).tolist()
    ends = batch["lengths"].cumsum(0).tolist()
    ids = unmasked(batch)
    for i, end, length in zip(indices, ends, batch["lengths"].tolist(), strict=True):
        a = text.ids[plan.a_start[i] :][: plan.a_length[i]].tolist()
        b = text.ids[plan.b_start[i] :][: plan.b_length[i]].tolist()
        own = slice(end - length, end)
        assert ids[own].tolist() == [CLS, *a, SEP, *b, SEP]
        assert batch["token_type_ids"][own].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
        assert batch["position_ids"][own].tolist() == list(range(length))


def test_a_pair_of_known_text_makes_a_known_sample() -> None:
    text = Text([[2], [3]])
    text.ids = np.array([11, 12, 21, 22, 23], np.uint16)
    source = PretrainingSource(text, FACTS, OPTIONS)
    batch = collate(source, 0, 0, 1)
    expected = [[CLS, 11, 12, SEP, 21, 22, 23, SEP], [CLS, 21, 22, 23, SEP, 11, 12, SEP]]
    types = [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    first = int(source.describe(0, np.array([0])).a_start[0] > 0)
    assert unmasked(batch).tolist() == expected[first] + expected[1 - first]
    assert batch["token_type_ids"].tolist() == types[first] + types[1 - first]
    assert batch["position_ids"].tolist() == [*range(8), *range(8)]
    assert batch["lengths"].tolist() == [8, 8]
    assert batch["nsp_labels"].tolist() == [1, 1]
    assert len(batch["mlm_positions"]) == 2
    assert source.totals(0, np.array([0, 1])) == {"mlm": 2.0, "sequences": 2.0}


@pytest.mark.parametrize("whole_word", [False, True])
def test_totals_foretell_what_collate_masks(text: Text, whole_word: bool) -> None:
    source = PretrainingSource(text, FACTS, replace(OPTIONS, whole_word=whole_word))
    indices = np.arange(source.epoch_size(0))
    batch = source.collate(source.describe(0, indices))
    assert source.totals(0, indices) == {"mlm": len(batch["mlm_positions"]), "sequences": len(indices)}
    assert batch["mlm_labels"].min() >= FIRST_REGULAR, "special tokens are never predicted"
    assert batch["lengths"].max() <= 64
    masked = (batch["input_ids"][batch["mlm_positions"]] == MASK).float().mean()
    assert 0.75 < masked < 0.85


def test_a_sample_is_the_same_in_every_batch(source: PretrainingSource) -> None:
    together, alone = collate(source, 0, 4, 9, 2), collate(source, 0, 9)
    start = together["lengths"][0]
    assert torch.equal(together["input_ids"][start : start + alone["lengths"][0]], alone["input_ids"])


def test_epochs_mask_and_pair_anew(source: PretrainingSource) -> None:
    first, second = source.describe(0, np.arange(50)), source.describe(1, np.arange(50))
    assert not np.array_equal(first.a_start, second.a_start)
    moved = first._replace(epoch=second.epoch)
    assert not torch.equal(source.collate(first)["mlm_positions"], source.collate(moved)["mlm_positions"])


def test_a_joined_description_makes_the_samples_of_its_parts(source: PretrainingSource) -> None:
    parts = [source.describe(0, np.array([5, 6])), source.describe(1, np.array([0]))]
    joined = source.collate(source.join(parts))
    assert torch.equal(joined["input_ids"], torch.cat([source.collate(part)["input_ids"] for part in parts]))


def test_a_fixed_source_repeats_epoch_zero(text: Text, source: PretrainingSource) -> None:
    fixed = PretrainingSource(text, FACTS, OPTIONS, fixed=True)
    indices = np.arange(30)
    assert fixed.epoch_size(4) == source.epoch_size(0)
    last = np.array([fixed.epoch_size(0) - 1])
    assert fixed.describe(4, last).epoch == 0
    assert list(fixed._plans) == [0]
    assert torch.equal(collate(fixed, 4, *indices)["input_ids"], collate(source, 0, *indices)["input_ids"])
    assert fixed.totals(4, indices) == source.totals(0, indices)


def test_the_next_plan_is_begun_halfway(text: Text, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[int, str]] = []

    def watched(*arguments: Any, epoch: int, **options: Any) -> PairPlan:
        begun.append((epoch, threading.current_thread().name))
        return plan_epoch(*arguments, epoch=epoch, **options)

    monkeypatch.setattr("engine.data.pretraining.source.plan_epoch", watched)
    source = PretrainingSource(text, FACTS, OPTIONS)
    middle = source.epoch_size(0) // 2
    source.describe(0, np.arange(middle))
    assert [epoch for epoch, _ in begun] == [0]
    source.describe(0, np.arange(middle - 3, middle + 1))
    source.describe(0, np.arange(middle, middle + 4))
    fresh = PretrainingSource(text, FACTS, OPTIONS)
    assert np.array_equal(source.describe(1, np.arange(9)).a_start, fresh.describe(1, np.arange(9)).a_start)
    assert begun[:2] == [(0, "epoch plan"), (1, "epoch plan")]
    assert len(begun) == 3, "each source plans an epoch once"


def test_plans_of_other_epochs_are_dropped(text: Text) -> None:
    """A run that goes back after a fault plans its epoch again, once."""
    source = PretrainingSource(text, FACTS, OPTIONS)
    for epoch in (3, 4, 2, 3):
        source.epoch_size(epoch)
    assert sorted(source._plans) == [2, 3]


def test_the_summary_says_what_the_epoch_at_hand_shows_and_plans_no_other() -> None:
    text = Text([[9, 300, 12], [5, 5]] * 50)
    source = PretrainingSource(text, FACTS, OPTIONS)
    assert source.summary().endswith(f" sequences of up to {OPTIONS.sequence_length}")
    assert list(source._plans) == [0]
    size = source.epoch_size(2)
    source.describe(2, np.arange(size))  # begins the plan of epoch 3
    plans = dict(source._plans)
    assert sorted(plans) == [2, 3]
    share = shown_share(plans[2].result(), len(text.ids))
    assert source.summary() == (
        f"an epoch shows {100 * share:.1f} % of the text's tokens, in {size:,} sequences of up to 64"
    )
    assert source._plans == plans


def test_only_over_long_sentences_need_a_new_version_of_plans(text: Text, source: PretrainingSource) -> None:
    assert text.sentence_lengths.max() > (OPTIONS.sequence_length - 3) // 2
    assert source.plan_version == PLAN_VERSION
    assert PretrainingSource(text, FACTS, replace(OPTIONS, sequence_length=128)).plan_version == 1


def sequences(batch: MicroBatch) -> Counter[tuple[int, ...]]:
    """The sequences of a micro-batch, whatever their order."""
    lengths = batch.inputs["lengths"].tolist()
    return Counter(tuple(ids.tolist()) for ids in batch.inputs["input_ids"].split(lengths))


def test_batches_that_cross_epochs_are_the_same_at_every_layout(source: PretrainingSource) -> None:
    near_end = Cursor(0, source.epoch_size(0) - 5, source.epoch_size(0) - 5)
    whole = next(training_batches(source, BatchLayout(12, 12), near_end, 0))
    parts = []
    for rank in range(2):
        batches = training_batches(source, BatchLayout(12, 3, rank, 2), near_end, 2)
        parts += list(islice(batches, 2))
        batches.close()
    assert sum(map(sequences, parts), Counter()) == sequences(whole)
    assert {part.totals["mlm"] for part in parts} == {float(len(whole.inputs["mlm_positions"]))}
    assert {part.cursor for part in parts} == {whole.cursor}
    assert whole.cursor.epoch == 1


def test_one_document_is_an_error_of_the_user() -> None:
    source = PretrainingSource(Text([[5, 6, 7]]), FACTS, OPTIONS)
    for _ in range(2):
        with pytest.raises(UserError, match=r"1 document\(s\) with text"):
            source.epoch_size(0)
