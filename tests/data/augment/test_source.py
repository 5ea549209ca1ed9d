"""Training examples that change in every epoch: functions of seed, epoch and example, whoever makes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.data.augment.characters import Characters
from engine.data.augment.draws import Draws
from engine.data.augment.eda import KEEPING, OPERATIONS, Eda
from engine.data.augment.method import Method
from engine.data.augment.source import Augmentation, AugmentedSource, AugmentedTags
from engine.data.augment.words import Words
from engine.data.labelled.encoded import LabelledSource, encode
from engine.data.labelled.files import Examples
from engine.data.labelled.tagged.encoded import TaggedSource, encode_tagged
from engine.data.labelled.tagged.files import read_tagged, tag_ids, tag_names
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer
from tests.data.augment.synonyms import Thesaurus
from tests.predict.models import some_texts, write_tokenizer
from tests.tasks.tokens.folders import VOCABULARY, write_conll

COUNT = 24


class Places:
    fingerprint = "places"

    def __call__(self, lemmas: object) -> dict[str, list[str]]:
        return {"lives": ["saw", "smiths"], "in": ["the"]}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("words")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def texts(
    vocabulary: Vocabulary, share: float = 0.5, pairs: bool = False, method: Method | None = None
) -> AugmentedSource:
    given = [text for text in some_texts(COUNT + 9) if text.split()][:COUNT]
    second = given[::-1] if pairs else None
    examples = Examples("x", given, second, ["a"] * COUNT, list(range(COUNT)))
    encoded = encode(vocabulary, given, second, 30)
    source = LabelledSource(encoded, np.arange(COUNT), 3, group=8, weights=np.linspace(1, 2, COUNT, dtype=np.float32))
    augmentation = Augmentation(method or Characters(0.3), share, 3)
    return AugmentedSource(source, examples, augmentation, vocabulary, 30)


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> AugmentedTags:
    folder = tmp_path_factory.mktemp("tags")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
    words = load_tokenizer(folder / "vocab.txt")
    read = read_tagged(write_conll(folder / "train.conll", COUNT, seed=1, most=5), "sentence", "label")
    names = tag_names(read)
    ids = tag_ids(read, names)
    windows = encode_tagged(words, read.texts, read.words, ids, 20, 4, every_piece=False)
    weights = np.linspace(1, 2, len(names), dtype=np.float32)
    source = TaggedSource(windows, 3, weights=weights)
    augmentation = Augmentation(Eda(0.3, Places(), KEEPING), 0.5, 3)
    return AugmentedTags(source, read, ids, augmentation, words, 20)


def rows(batch: dict[str, Tensor], name: str = "input_ids") -> list[list[int]]:
    """The tokens of each sequence."""
    return [part.tolist() for part in batch[name].split(batch["lengths"].tolist())]


def epoch_of(source: AugmentedSource, epoch: int) -> dict[int, list[int]]:
    """The tokens of each example in an epoch, by its label."""
    batch = source.collate(source.describe(epoch, np.arange(COUNT)))
    return dict(zip(batch["labels"].tolist(), rows(batch), strict=True))


@pytest.mark.parametrize("pairs", [False, True])
def test_an_example_of_an_epoch_is_the_same_in_every_batch(vocabulary: Vocabulary, pairs: bool) -> None:
    source = texts(vocabulary, pairs=pairs)
    whole = epoch_of(source, 1)
    assert whole != epoch_of(source, 2)
    again = texts(vocabulary, pairs=pairs)
    for index in reversed(range(COUNT)):
        batch = again.collate(again.describe(1, np.array([index])))
        assert whole[int(batch["labels"][0])] == rows(batch)[0]
    joined = source.collate(source.join([source.describe(1, np.array([4, 5])), source.describe(2, np.array([0]))]))
    parts = [
        rows(source.collate(source.describe(epoch, np.array([index])))) for epoch, index in ((1, 4), (1, 5), (2, 0))
    ]
    assert rows(joined) == [part[0] for part in parts]


def test_the_share_is_changed_and_the_rest_is_as_it_was(vocabulary: Vocabulary) -> None:
    source = texts(vocabulary)
    plain = [
        source.tokens[a:b].tolist() for a, b in zip(source.encoded.offsets, source.encoded.offsets[1:], strict=False)
    ]
    drawn, changed = 0, 0
    for epoch in range(40):
        description = source.describe(epoch, np.arange(COUNT))
        chosen = {int(description[place, 1]) for place, _ in source._augmentation.drawn(description)}
        found = epoch_of(source, epoch)
        assert all(found[index] == plain[index] for index in range(COUNT) if index not in chosen)
        drawn += len(chosen)
        changed += sum(found[index] != plain[index] for index in range(COUNT))
    assert abs(drawn / (40 * COUNT) - 0.5) < 0.05
    assert changed > 0.8 * drawn
    always = texts(vocabulary, share=1.0)
    assert len(always._augmentation.drawn(always.describe(0, np.arange(COUNT)))) == COUNT


def test_pairs_have_their_segments_and_their_length(vocabulary: Vocabulary) -> None:
    source = texts(vocabulary, share=1.0, pairs=True, method=Eda(0.5, Thesaurus(), OPERATIONS))
    batch = source.collate(source.describe(0, np.arange(COUNT)))
    sep = vocabulary.sep_id
    for ids, segments in zip(rows(batch), rows(batch, "token_type_ids"), strict=True):
        assert len(ids) <= 30
        first = ids.index(sep) + 1
        assert segments == [0] * first + [1] * (len(ids) - first)
        assert ids.count(sep) == 2


def test_totals_lengths_and_labels_are_those_of_the_examples(vocabulary: Vocabulary) -> None:
    source = texts(vocabulary)
    plain = LabelledSource(source.encoded, source.labels, 3, group=8, weights=source.weights)
    indices = np.arange(COUNT)
    assert source.totals(1, indices) == plain.totals(1, indices)
    assert source.lengths(1, indices).tolist() == plain.lengths(1, indices).tolist()
    assert source.fingerprint == plain.fingerprint
    found, expected = (each.collate(each.describe(1, indices))["labels"] for each in (source, plain))
    assert torch.equal(found, expected)


def seen(batches: list[MicroBatch]) -> list[tuple[int, ...]]:
    return sorted(tuple(row) for batch in batches for row in rows(batch.inputs))


def test_neither_ranks_nor_a_resume_nor_processes_change_what_is_seen(vocabulary: Vocabulary) -> None:
    source = texts(vocabulary)

    def taken(layout: BatchLayout, cursor: Cursor, steps: int, workers: int = 0) -> list[MicroBatch]:
        batches = training_batches(source, layout, cursor, workers)
        found = [next(batches) for _ in range(steps * layout.accumulation)]
        batches.close()
        return found

    alone = taken(BatchLayout(10, 10), Cursor(), 6)
    for step in range(6):  # the second and the fourth global batch span two epochs
        before = alone[step - 1].cursor if step else Cursor()
        ranks = [taken(BatchLayout(10, 5, rank, 2), before, 1) for rank in range(2)]
        assert seen([batch for own in ranks for batch in own]) == seen([alone[step]])
    assert [seen([batch]) for batch in taken(BatchLayout(10, 10), Cursor(), 6, workers=1)] == [seen([b]) for b in alone]


def test_tags_and_their_number_stay_and_words_change(tagged: AugmentedTags) -> None:
    plain = TaggedSource(tagged.windows, 3)
    indices = np.arange(plain.count)
    assert len(np.unique(tagged._owners)) < plain.count  # some texts are several windows
    changed = 0
    for epoch in range(6):
        description = tagged.describe(epoch, indices)
        new, old = tagged.collate(description), plain.collate(plain.describe(epoch, indices))
        assert torch.equal(new["labels"], old["labels"])
        assert tagged.totals(epoch, indices)["tokens"] == len(new["labels"])
        entities = new["labels"] > 0
        assert torch.equal(new["input_ids"][new["read"]][entities], old["input_ids"][old["read"]][entities])
        drawn = {place for place, _ in tagged._augmentation.drawn(description)}
        different = {place for place, pair in enumerate(zip(rows(new), rows(old), strict=True)) if pair[0] != pair[1]}
        assert different <= drawn
        assert all(tagged.windows.pieces[tagged._owners[description[place, 1]]] <= 18 for place in different)
        changed += len(different)
    assert changed > 20


def test_tags_of_an_epoch_are_the_same_in_every_batch(tagged: AugmentedTags) -> None:
    whole = tagged.collate(tagged.describe(2, np.arange(tagged.count)))
    parts = [tagged.collate(tagged.describe(2, np.array([index]))) for index in range(tagged.count)]
    assert rows(whole) == [rows(part)[0] for part in parts]
    assert torch.equal(whole["labels"], torch.cat([part["labels"] for part in parts]))


def test_a_text_that_loses_a_word_s_piece_stays(tagged: AugmentedTags, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deleting:
        fingerprint = "deleting"

        def __call__(self, examples: Sequence[Words], draws: Sequence[Draws]) -> list[Words]:
            return [each.with_words(["\u200b", *each.words[1:]]) for each in examples]

    monkeypatch.setattr(tagged, "_augmentation", Augmentation(Deleting(), 1.0, 3))
    new = tagged.collate(tagged.describe(0, np.arange(tagged.count)))
    plain = TaggedSource(tagged.windows, 3)
    assert rows(new) == rows(plain.collate(plain.describe(0, np.arange(plain.count))))
