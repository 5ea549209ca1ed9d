"""Blocks: what of their documents goes into which shard."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.data.store import blocks
from engine.data.store.blocks import Block, Document, Tokenization, read_blocks, tokenize_block
from engine.data.store.store import Split
from engine.data.store.workspace import RECORDS
from engine.data.text.embedded import embedded_documents
from engine.data.text.sentences import split_sentences
from engine.data.tokenizer.wordpiece import Vocabulary, train_wordpiece

NOTHING = "\u200b"  # neither white space nor anything that the tokenizer keeps


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Vocabulary]:
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, train_wordpiece(embedded_documents()[:50], folder, 800)


def contents(split: Split) -> list[list[list[int]]]:
    """Documents, their sentences, their ids."""
    ends = np.cumsum(split.sentence_lengths)
    sentences = [
        split.tokens(int(end - n), int(n)).tolist() for end, n in zip(ends, split.sentence_lengths, strict=True)
    ]
    return [sentences[first:last] for first, last in pairwise(split.document_starts.tolist())]


@pytest.mark.parametrize("sentences_at_a_time", [1, 3, 8192])
def test_every_sentence_with_an_id_goes_to_its_split(
    words: tuple[Path, Vocabulary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sentences_at_a_time: int
) -> None:
    monkeypatch.setattr(blocks, "BATCH_SENTENCES", sentences_at_a_time)
    texts = [NOTHING, *embedded_documents()[:6], f"One here.\n\n{NOTHING}\n\nTwo here.", NOTHING]
    splits = ["train", "train", "validation", "train", "validation", "train", "train", "validation", "train"]
    (tmp_path / RECORDS).mkdir()
    how = Tokenization(tmp_path, words[0], words[1].fingerprint, "en")
    shards = tokenize_block(Block(0, [text.encode() for text in texts], splits), how)
    for name, shard in shards.items():
        own = [text for text, split in zip(texts, splits, strict=True) if split == name]
        encoded = [[ids for ids in words[1].encode_batch(split_sentences(text)) if ids] for text in own]
        assert contents(Split(tmp_path, name, [shard])) == [document for document in encoded if document]
    assert set(shards) == {"train", "validation"}
    assert shards["validation"].documents == 3


def test_a_split_without_an_id_has_no_shard(words: tuple[Path, Vocabulary], tmp_path: Path) -> None:
    (tmp_path / RECORDS).mkdir()
    how = Tokenization(tmp_path, words[0], words[1].fingerprint, "en")
    shards = tokenize_block(Block(3, [NOTHING.encode(), b"Some text."], ["train", "validation"]), how)
    assert list(shards) == ["validation"]
    assert [path.name for path in tmp_path.glob("*.arrow")] == ["validation-00003.arrow"]


def test_blocks_are_cut_after_enough_text_whatever_it_holds() -> None:
    texts = ["é" * 600_000, "漢字 alone", "b" * 500_000, "last"]
    documents = [Document(text) for text in texts]
    found = list(read_blocks(documents, 1, 0.0, seed=1))
    assert [list(block.texts()) for block in found] == [texts[:3], texts[3:]]
    assert [block.index for block in found] == [0, 1]
    assert len({block.text_sha256 for block in [*found, *read_blocks(documents, 1, 0.5, seed=1)]}) == 4
