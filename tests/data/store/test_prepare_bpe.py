"""Preparation with byte-level BPE, learned or given: the same bytes from any workers, resumed, no text lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.data.store.blocks import split_of
from engine.data.store.executor import open_executor
from engine.data.store.prepare import prepare
from engine.data.store.store import open_store
from engine.data.text.sentences import split_sentences
from engine.errors import UserError
from tests.data.store.corpora import TEXTS, config, content, write_corpus
from tests.data.store.test_prepare_again import KilledExecutor
from tests.data.tokenizer.folders import modernbert, roberta, xlm_roberta

BPE = {"vocabulary": "bpe"}


@pytest.mark.usefixtures("small_shards")
def test_the_bytes_do_not_depend_on_workers_or_a_kill(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "inline", **BPE))
    with open_executor(2) as opened:
        assert opened is not None
        prepare(config(corpus, tmp_path / "pool", **BPE), *opened)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(corpus, tmp_path / "killed", **BPE), KilledExecutor(2))
    with pytest.raises(UserError, match=r"^vocabulary: .* was prepared with 'bpe', not 'wordpiece'; pass --overwrite"):
        prepare(config(corpus, tmp_path / "killed"))
    prepare(config(corpus, tmp_path / "killed", **BPE))
    assert len(list((tmp_path / "inline").glob("train-*.arrow"))) > 3
    assert content(tmp_path / "inline") == content(tmp_path / "pool") == content(tmp_path / "killed")


@pytest.mark.parametrize("make", [None, roberta, modernbert, xlm_roberta])
def test_documents_read_as_their_sentences(corpus: Path, tmp_path: Path, make: Any) -> None:
    if make is None:
        options = BPE
    else:
        make(tmp_path / "theirs")
        options = {"tokenizer": str(tmp_path / "theirs"), "vocab_size": None, "max_unknown_share": 1.0}
    prepare(config(corpus, tmp_path / "store", **options))
    store = open_store(tmp_path / "store", verify=True)
    words, train = store.tokenizer, store.split("train")
    first = next(text for ordinal, text in enumerate(TEXTS) if split_of(ordinal, 0.01, 1) == "train")
    ids = train.tokens(0, int(train.sentence_lengths[: train.document_starts[1]].sum())).tolist()
    sentences = [" ".join(sentence.split("\n")) for sentence in split_sentences(first)]
    (whole,) = words.encode_batch([" ".join(sentences)])
    assert ids == whole
    if make is not xlm_roberta:  # which has no pieces for most of it
        assert words.decode(ids) == " ".join(sentences)
        assert words.unk_id not in ids


def test_a_finished_store_of_another_kind_is_refused(corpus: Path, tmp_path: Path) -> None:
    prepare(config(corpus, tmp_path / "store"))
    assert prepare(config(corpus, tmp_path / "store", vocabulary="wordpiece")) == prepare(
        config(corpus, tmp_path / "store")
    )
    with pytest.raises(UserError, match=r"^vocabulary: .* was prepared with 'wordpiece', not 'bpe'; pass --overwrite"):
        prepare(config(corpus, tmp_path / "store", **BPE))
    prepare(config(corpus, tmp_path / "store", overwrite=True, lowercase=False, **BPE))
    assert open_store(tmp_path / "store").manifest.settings["vocabulary"] == "bpe"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"vocabulary": "unigram"}, r"^vocabulary: 'unigram' is not allowed; choose wordpiece or bpe$"),
        (
            BPE | {"lowercase": True},
            r"^lowercase: True is not allowed; byte-level BPE keeps case: leave the option out",
        ),
        (BPE | {"vocab_size": 260}, r"^vocab_size: 260 is too small for 256 bytes and 5 special tokens"),
        (BPE | {"special_tokens": ["two words"]}, r"^special_tokens: 'two words' is not allowed"),
        (BPE | {"tokenizer": "THEIRS", "vocab_size": None}, r"^vocabulary: 'bpe' is not allowed beside tokenizer"),
        ({"tokenizer": "THEIRS", "vocab_size": None, "lowercase": True}, r"^lowercase: True .* keeps case"),
    ],
)
def test_a_contradiction_is_refused(corpus: Path, tmp_path: Path, options: dict[str, Any], said: str) -> None:
    roberta(tmp_path / "theirs")
    given = {name: str(tmp_path / "theirs") if value == "THEIRS" else value for name, value in options.items()}
    with pytest.raises(UserError, match=said) as raised:
        prepare(config(corpus, tmp_path / "store", **given))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "store").exists()


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    for text in ("", " \n "):
        corpus = write_corpus(tmp_path / "corpus.jsonl", [text] * 9)
        with pytest.raises(UserError, match=r"^source: .*corpus\.jsonl"):
            prepare(config(corpus, tmp_path / "store", **BPE))
        assert not (tmp_path / "store").exists()
