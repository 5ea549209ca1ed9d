"""Full sequences: every token of the text once, nothing padded, samples pure functions of seed, epoch and index."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.data.loading.loader import BatchLayout, evaluation_batches, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.data.pretraining.full import FullSequenceSource
from engine.data.pretraining.sequences import Documents
from engine.data.pretraining.source import PretrainingSource
from engine.errors import UserError
from tests.data.pretraining.test_pretraining import CLS, FACTS, FIRST_REGULAR, MASK, OPTIONS, SEP, Text, unmasked

KEYS = {"input_ids", "token_type_ids", "position_ids", "lengths", "mlm_positions", "mlm_labels"}


def numbered(documents: list[list[int]]) -> Text:
    """A text whose tokens all differ, so that each can be counted."""
    text = Text(documents)
    text.ids = np.arange(FIRST_REGULAR, FIRST_REGULAR + len(text.ids), dtype=np.int64)
    return text


def source_of(text: Text, length: int = 16, fixed: bool = False) -> FullSequenceSource:
    return FullSequenceSource(text, FACTS, replace(OPTIONS, sequence_length=length), fixed)


def epoch(source: FullSequenceSource, number: int) -> dict[str, Tensor]:
    return source.collate(source.describe(number, np.arange(source.epoch_size(number))))


def pieces(batch: dict[str, Tensor]) -> list[list[int]]:
    """The original tokens of each piece."""
    return [part.tolist() for part in torch.from_numpy(unmasked(batch)).split(batch["lengths"].tolist())]


@pytest.fixture(scope="module")
def text() -> Text:
    """As many short documents and as few long ones as an encyclopaedia has."""
    rng = np.random.default_rng(2)
    return numbered([rng.integers(1, 40, max(1, int(rng.lognormal(1.5, 1.2)))).tolist() for _ in range(120)])


documents = st.lists(st.lists(st.integers(0, 30), max_size=4), min_size=1, max_size=12)


@given(documents, st.integers(8, 20), st.integers(0, 3))
@settings(max_examples=150)
def test_every_token_is_shown_once_an_epoch_and_every_sequence_is_full(
    lengths: list[list[int]], length: int, seed: int
) -> None:
    text = numbered(lengths)
    options = replace(OPTIONS, sequence_length=length, seed=seed)
    if Documents.of_sentences(text.sentence_lengths, text.document_starts).stream < length - 2:
        with pytest.raises(UserError, match=rf"^data\.sequence_length: {length} is more than the \d+ tokens"):
            FullSequenceSource(text, FACTS, options)
        return
    source = FullSequenceSource(text, FACTS, options)
    shown: Counter[int] = Counter()
    for number in range(4):
        size = source.epoch_size(number)
        assert source.lengths(number, np.arange(size)).tolist() == [length] * size
        batch = epoch(source, number)
        assert len(batch["input_ids"]) == size * length == int(batch["lengths"].sum())
        shown.update(token for piece in pieces(batch) for token in piece if token >= FIRST_REGULAR)
        # what the next epoch begins with was shown already, and is no more than a sequence
        ahead = sum(count - number - 1 for count in shown.values())
        assert set(shown) == set(text.ids.tolist())
        assert set(shown.values()) <= {number + 1, number + 2}
        assert ahead < length - 2


@given(documents, st.integers(8, 20))
@settings(max_examples=100)
def test_one_pass_for_evaluation_shows_every_token_exactly_once(lengths: list[list[int]], length: int) -> None:
    text = numbered(lengths)
    if not len(text.ids):
        return
    source = source_of(text, length, fixed=True)
    batch = epoch(source, 3)
    shown = Counter(token for piece in pieces(batch) for token in piece if token >= FIRST_REGULAR)
    assert shown == Counter(text.ids.tolist())
    size = source.epoch_size(0)
    assert source.lengths(0, np.arange(size)).tolist()[:-1] == [length] * (size - 1)
    assert int(source.lengths(0, np.arange(size)).sum()) == len(batch["input_ids"])


def test_a_piece_is_neighbouring_tokens_of_one_document_between_cls_and_sep(text: Text) -> None:
    batch = epoch(source_of(text), 0)
    assert set(batch) == KEYS
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert not batch["token_type_ids"].any()
    assert batch["position_ids"].tolist() == [i for n in batch["lengths"].tolist() for i in range(n)]
    ends = text.document_ends + FIRST_REGULAR
    for piece in pieces(batch):
        told = [token for token in piece if token >= FIRST_REGULAR]
        opening, closing = (
            piece[: piece.index(told[0]) if told else 1],
            piece[len(piece) - piece[::-1].index(SEP) - 1 :],
        )
        assert opening in ([CLS], [CLS, CLS])
        assert closing == [SEP]
        assert piece.count(CLS) == len(opening)
        assert piece.count(SEP) <= 2
        assert told == list(range(told[0], told[0] + len(told))) if told else piece == [CLS, SEP]
        assert not told or np.searchsorted(ends, told[0], "right") == np.searchsorted(ends, told[-1], "right")


def test_known_documents_make_known_sequences() -> None:
    """Documents of 5 and 3 tokens: 12 of the stream, [CLS] and [SEP] included, of which a sequence holds 6."""
    source = source_of(numbered([[2, 3], [3]]), 8)
    a, b = [5, 6, 7, 8, 9], [10, 11, 12]
    for number, order, expected in (
        (0, [5, 0], [[[CLS, *b, SEP], [CLS, *a[:1], SEP]], [[CLS, *a[1:], SEP], [CLS, SEP]]]),
        (1, [0, 5], [[[CLS, *a, SEP, SEP]], [[CLS, CLS, *b, SEP], [CLS, SEP]]]),  # cut between [SEP] and [CLS]
    ):
        assert source._plan(number).start.tolist() == order
        samples = [pieces(source.collate(source.describe(number, np.array([i])))) for i in range(2)]
        assert samples == expected  # the last [CLS] is the next epoch's first


def test_a_single_document_suffices_and_is_cut_elsewhere_in_every_epoch() -> None:
    text = numbered([[9] * 11])
    source = source_of(text)
    starts = [{piece[1] for piece in pieces(epoch(source, number))} for number in range(3)]
    assert starts[0] != starts[1] != starts[2]
    assert source.epoch_size(0) == 8
    assert source.summary() == "an epoch shows each of the text's 99 tokens once, in 8 sequences of 16, " + (
        "14.2 % of them [CLS] and [SEP]"
    )


def test_totals_foretell_what_collate_masks(text: Text) -> None:
    for number in range(2):
        source = source_of(text, 24)
        indices = np.arange(source.epoch_size(number))
        batch = epoch(source, number)
        assert source.totals(number, indices) == {"mlm": len(batch["mlm_positions"]), "sequences": len(indices)}
        assert batch["mlm_labels"].min() >= FIRST_REGULAR, "special tokens are never predicted"
        assert MASK in batch["input_ids"]


def test_samples_depend_on_seed_epoch_and_index_alone(text: Text) -> None:
    source, again = source_of(text), source_of(text)
    together = source.collate(source.describe(1, np.array([4, 9, 30])))
    alone = again.collate(again.describe(1, np.array([9])))
    assert torch.equal(together["input_ids"][16:32], alone["input_ids"])
    other = FullSequenceSource(text, FACTS, replace(OPTIONS, sequence_length=16, seed=4))
    for different in (epoch(source, 0), epoch(other, 1)):
        assert not torch.equal(different["input_ids"][:64], epoch(source, 1)["input_ids"][:64])


def test_batches_that_cross_epochs_are_the_same_at_every_layout(text: Text) -> None:
    def samples(parts: list[dict[str, Tensor]]) -> Counter[tuple[int, ...]]:
        return Counter(tuple(row) for part in parts for row in part["input_ids"].view(-1, 16).tolist())

    source = source_of(text)
    near_end = Cursor(0, source.epoch_size(0) - 5, source.epoch_size(0) - 5)
    whole = next(training_batches(source, BatchLayout(12, 12), near_end, 0))
    parts = []
    for rank in range(2):
        batches = training_batches(source, BatchLayout(12, 3, rank, 2), near_end, 2)
        parts += list(islice(batches, 2))
        batches.close()
    assert samples([part.inputs for part in parts]) == samples([whole.inputs])
    assert {part.totals["mlm"] for part in parts} == {float(len(whole.inputs["mlm_positions"]))}
    assert {part.cursor for part in parts} == {whole.cursor}
    assert whole.cursor.epoch == 1


@pytest.mark.parametrize("kind", [FullSequenceSource, PretrainingSource])
def test_a_resume_goes_on_with_the_same_batches_and_the_masking_rate(
    text: Text, kind: type[FullSequenceSource | PretrainingSource]
) -> None:
    changing = {"mask_probability": 0.4, "mask_probability_end": 0.1, "run_epochs": lambda size: 40 * 64 / size}
    options = replace(OPTIONS, sequence_length=48, mean_span=3.0, **changing)

    def batches(start: Cursor, micro_batch: int = 64) -> list[MicroBatch]:
        layout = BatchLayout(64, micro_batch)
        return list(islice(training_batches(kind(text, FACTS, options), layout, start, 0), 40 * layout.accumulation))

    run = batches(Cursor())
    assert run[-1].cursor.epoch >= 2
    for before, after in zip(run[20:], batches(run[19].cursor), strict=False):
        assert before.cursor == after.cursor
        assert before.totals == after.totals
        assert all(torch.equal(before.inputs[name], after.inputs[name]) for name in before.inputs)
    assert [b.totals["mlm"] for b in batches(Cursor(), 8)[::8]] == [b.totals["mlm"] for b in run]
    assert all(len(batch.inputs["mlm_positions"]) == batch.totals["mlm"] for batch in run)
    special = [sum(int((batch.inputs["input_ids"] == token).sum()) for token in (CLS, SEP)) for batch in run]
    texts = [len(batch.inputs["input_ids"]) - count for batch, count in zip(run, special, strict=True)]
    shares = np.array([batch.totals["mlm"] / count for batch, count in zip(run, texts, strict=True)])
    assert np.abs(shares - np.linspace(0.4, 0.1, 41)[:40]).max() < 0.015


def test_an_evaluation_counts_every_token_of_the_split_over_any_number_of_ranks(text: Text) -> None:
    source = source_of(text, fixed=True)
    for size in (1, 3):
        batches = [b for rank in range(size) for b in evaluation_batches(source, rank, size, 7, 0) if not b.dummy]
        shown = Counter(t for b in batches for piece in pieces(b.inputs) for t in piece if t >= FIRST_REGULAR)
        assert shown == Counter(text.ids.tolist())
        assert sum(len(b.inputs["mlm_positions"]) for b in batches) == batches[0].totals["mlm"]
