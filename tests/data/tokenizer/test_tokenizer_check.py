"""The comparison with transformers: what is sampled, and what a difference says."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from engine.data.text.embedded import embedded_documents
from engine.data.tokenizer.check import (
    SAMPLE_CHARACTERS,
    SAMPLE_TEXTS,
    check_examples,
    check_texts,
    check_vocabulary,
    open_with_transformers,
    sample,
)
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer, train_wordpiece
from engine.errors import UserError

TEXTS = ["nothing of note here", "some plain words and then a naïve Word or two", "[MASK] is quoted"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_wordpiece(embedded_documents()[:60], folder, 900)
    return folder


def test_the_sample_is_bounded_in_texts_and_characters() -> None:
    assert sample("a" for _ in range(1000)) == ["a"] * SAMPLE_TEXTS
    assert sum(map(len, sample(["b" * 150_000] * 9))) == SAMPLE_CHARACTERS
    assert sample([]) == []


def test_equal_tokenizers_agree(folder: Path) -> None:
    ours, theirs = load_tokenizer(folder), open_with_transformers(folder)
    check_vocabulary(ours, theirs, folder)
    texts = [*TEXTS, *embedded_documents()[:50]]
    check_texts(ours, theirs, folder, texts)
    rows = [ours.backend.encode(text).ids[:12] for text in TEXTS]
    cut = [row if row[-1] == ours.sep_id else [*row[:11], ours.sep_id] for row in rows]
    check_examples(ours, theirs, folder, TEXTS, None, cut, max_length=12)
    check_examples(ours, theirs, folder, ["one"], ["two"], [ours.backend.encode("one", "two").ids], max_length=12)


def test_a_difference_shows_the_text_and_both_ways_of_cutting_it(folder: Path) -> None:
    backend = Tokenizer.from_str(load_tokenizer(folder).backend.to_str())
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    message = r"^tokenizer: .*: the text '.*then a naïve .*' is '.* n ##a.*' for transformers' .* and '.*UNK.*' here, "
    with pytest.raises(UserError, match=message):
        check_texts(Vocabulary(backend), open_with_transformers(folder), folder, TEXTS)


def test_another_vocabulary_shows_without_a_text(folder: Path) -> None:
    ours = load_tokenizer(folder)
    theirs = open_with_transformers(folder)
    with pytest.raises(UserError, match=r"token '\[DEID\]' is None for transformers' AutoTokenizer and 900 here"):
        check_vocabulary(ours.with_special_tokens(["[DEID]"]), theirs, folder)
    assert theirs is not None
    theirs.add_tokens([AddedToken("[DEID]", special=True)])
    check_vocabulary(ours.with_special_tokens(["[DEID]"]), theirs, folder)
    with pytest.raises(UserError, match=r"token '\[DEID\]' is 900 for transformers' AutoTokenizer and None here"):
        check_vocabulary(ours, theirs, folder)


def test_a_folder_that_transformers_cannot_open_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_with_transformers(tmp_path) is None
    assert "transformers can't open this tokenizer (" in caplog.text
