"""Preparation with a tokenizer of the user's: taken as it is, refused where it does not fit options or text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from engine.data.store.prepare import prepare
from engine.data.store.store import open_store
from engine.data.tokenizer.given import Given
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, Vocabulary, load_tokenizer, train_wordpiece
from engine.errors import UserError
from tests.data.store.corpora import TEXTS, config, write_corpus


def test_a_given_tokenizer_is_used_and_pinned(corpus: Path, tmp_path: Path) -> None:
    first = prepare(config(corpus, tmp_path / "first"))
    given = {"tokenizer": str(tmp_path / "first" / "tokenizer")}
    second = prepare(config(corpus, tmp_path / "second", **given))
    assert second.fingerprint == first.fingerprint
    assert second.settings["tokenizer"] == first.tokenizer_fingerprint
    with pytest.raises(UserError, match=r"tokenizer: .* was prepared with"):
        prepare(config(corpus, tmp_path / "first", **given))


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A tokenizer of the first half of the texts, 600 tokens, lowercasing."""
    train_wordpiece(TEXTS[:30], tmp_path / "given", 600)
    return tmp_path / "given"


def test_special_tokens_are_added_to_a_given_tokenizer(given: Path, tmp_path: Path) -> None:
    texts = [f"{text} Signed by [NAME] of [DEID]." for text in TEXTS[:20]]
    corpus = write_corpus(tmp_path / "corpus.jsonl", texts)
    options = {"vocab_size": None, "tokenizer": str(given), "special_tokens": ["[DEID]", "[CLS]", "[NAME]"]}
    manifest = prepare(config(corpus, tmp_path / "store", **options))
    store = open_store(tmp_path / "store")
    assert store.tokenizer.tokens == [*load_tokenizer(given).tokens, "[DEID]", "[NAME]"]
    assert manifest.vocab_size == 602
    train = store.split("train")
    tokens = train.tokens(0, int(train.sentence_lengths[: train.document_starts[1]].sum())).tolist()
    assert (tokens.count(600), tokens.count(601)) == (1, 1)
    with pytest.raises(UserError, match=r"tokenizer: .* was prepared with"):
        prepare(config(corpus, tmp_path / "store", **options | {"special_tokens": []}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"vocab_size": 999},
            r"^vocab_size: 999 is not allowed; the tokenizer .* has 600 tokens: leave the option out",
        ),
        ({"lowercase": False}, r"^lowercase: False is not allowed; the tokenizer .* lowercases: leave the option out"),
        ({"sample_mb": 7}, r"^sample_mb: 7 is not allowed beside tokenizer"),
        ({"special_tokens": ["two words"]}, r"^special_tokens: 'two words' is not allowed"),
    ],
)
def test_an_option_that_a_given_tokenizer_contradicts_is_refused(
    corpus: Path, given: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config(corpus, tmp_path / "store", **{"vocab_size": None, "tokenizer": str(given)} | options))
    assert not (tmp_path / "store").exists()


def test_options_that_agree_with_a_given_tokenizer_are_taken(corpus: Path, given: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store", tokenizer=str(given), vocab_size=600, lowercase=True))
    bare = config(corpus, tmp_path / "cased", tokenizer=str(given / "vocab.txt"), lowercase=False, vocab_size=None)
    (given / "tokenizer_config.json").unlink()
    prepare(bare)
    assert not open_store(tmp_path / "cased").tokenizer.lowercase


def test_a_tokenizer_that_transformers_reads_otherwise_is_refused(given: Path) -> None:
    """What no reader of ours explains shows on the user's own text, before anything is written."""
    ours = load_tokenizer(given)
    state = json.loads(ours.backend.to_str())
    state["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    other = Vocabulary(Tokenizer.from_str(json.dumps(state)))
    with pytest.raises(UserError, match=r"^tokenizer: .*: the text 'Say, this' is 's .*' for transformers.* '.*' here"):
        Given(given, other, other, None).compare(["plain words", "Say, this"])
    Given(given, ours, ours, None).compare(["plain words", "Say, this"])


def test_the_share_of_unknown_pieces_is_counted_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    vocab = [*SPECIAL_TOKENS, "one", "two", "."]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab))
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["one two. two xyz.", "one two. one two."] * 4)
    options = {"tokenizer": str(tmp_path / "vocab.txt"), "vocab_size": None}
    caplog.set_level("INFO")
    manifest = prepare(config(corpus, tmp_path / "store", **options))
    assert sum(manifest.counts(split).unknown or 0 for split in manifest.splits) == 4
    assert sum(manifest.counts(split).tokens for split in manifest.splits) == 48
    assert "% [UNK])" in caplog.text
    with pytest.raises(UserError, match=r"^max_unknown_share: 8\.3% of the 48 word pieces of the first documents are"):
        prepare(config(corpus, tmp_path / "other", max_unknown_share=0.08, **options))
    assert not (tmp_path / "other").exists()
    strange = write_corpus(tmp_path / "strange.jsonl", ["alpha beta. gamma."] * 8)
    with pytest.raises(UserError, match=r"more than 20\.0%; give a tokenizer that was made for this text, or raise"):
        prepare(config(strange, tmp_path / "other", **options))
    prepare(config(strange, tmp_path / "other", max_unknown_share=1.0, **options))


def test_unknown_pieces_after_the_first_documents_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.tokenizer.check.SAMPLE_TEXTS", 2)
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in [*SPECIAL_TOKENS, "one", "."]))
    corpus = write_corpus(tmp_path / "corpus.jsonl", ["one one. one."] * 2 + ["alpha beta. gamma."] * 8)
    options = {"tokenizer": str(tmp_path / "vocab.txt"), "vocab_size": None}
    with pytest.raises(UserError, match=r"^max_unknown_share: .*corpus\.jsonl are \[UNK\]"):
        prepare(config(corpus, tmp_path / "store", **options))
    assert not (tmp_path / "store").exists()
