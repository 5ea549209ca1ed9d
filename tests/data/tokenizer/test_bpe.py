"""Learned byte-level BPE: the same from the same text, nothing of a text lost, opened by transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from engine.data.text.embedded import embedded_documents
from engine.data.tokenizer.bpe import train_bpe
from engine.data.tokenizer.check import check_texts, check_vocabulary
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.tokenizer.vocabulary import SPECIAL_TOKENS, Vocabulary
from engine.errors import UserError

TEXTS = embedded_documents()[:40]
PROBES = [
    "Unbelievably, Héllo wörld!",
    "naïve 漢字 mixed-in\ttext 3.14 🦊",
    "[MASK] and [E1] stay whole",
    "",
    "x" * 300,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, folder, 800, ["[E1]"])
    return folder


@pytest.fixture(scope="module")
def words(folder: Path) -> Vocabulary:
    return load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 3])
def test_equal_documents_give_an_equal_vocabulary_with_any_threads(folder: Path, tmp_path: Path, threads: int) -> None:
    code = "import sys, pathlib; from tests.data.tokenizer.test_bpe import TEXTS, train_bpe\n"
    code += "train_bpe(TEXTS, pathlib.Path(sys.argv[1]), 800, ['[E1]'])"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"RAYON_NUM_THREADS": str(threads)},
        check=True,
        cwd=Path(__file__).parents[3],
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_special_tokens_come_first_then_the_bytes(words: Vocabulary) -> None:
    assert words.vocab_size == 800
    assert words.tokens[:6] == [*SPECIAL_TOKENS, "[E1]"]
    assert [words.pad_id, words.unk_id, words.cls_id, words.sep_id, words.mask_id] == [0, 1, 2, 3, 4]
    assert words.regular_ids.tolist() == list(range(6, 800))
    assert all(len(token) == 1 for token in words.tokens[6:262])
    assert not words.lowercase


def test_transformers_opens_it_with_the_same_ids(words: Vocabulary, folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder)
    check_vocabulary(words, theirs, folder)
    check_texts(words, theirs, folder, [*PROBES, *TEXTS[:5]])
    assert theirs("A", "b")["input_ids"] == [2, *words.encode_batch(["A"])[0], 3, *words.encode_batch(["b"])[0], 3]


def test_nothing_of_a_text_is_lost(words: Vocabulary) -> None:
    for text, ids in zip(PROBES, words.encode_batch(PROBES), strict=True):
        assert words.unk_id not in ids
        assert words.decode(ids) == text.replace("[MASK]", "[ MASK ]")


def test_a_mask_takes_the_place_of_a_word_and_its_space(words: Vocabulary) -> None:
    """As training shows it: the piece of a word, which holds the space before it, becomes [MASK]."""
    (ids,) = words.encode_batch(["one of the most"])
    (place,) = words.encode_batch([" of"])
    assert len(place) == 1
    masked = [words.mask_id if index == place[0] else index for index in ids]
    assert words.encode_with_special(["one [MASK] the most"]) == [masked]


def test_lines_are_learned_as_they_are_encoded(tmp_path: Path) -> None:
    wrapped = train_bpe(["some words\n  and more"] * 9, tmp_path / "wrapped", 300)
    assert wrapped.tokens == train_bpe(["some words and more"] * 9, tmp_path / "single", 300).tokens
    assert wrapped.joined(["a\n b", "c"]) == ["a b", " c"]


@pytest.mark.parametrize(
    ("size", "special", "said"),
    [
        (260, [], r"^vocab_size: 260 is too small for 256 bytes and 5 special tokens; give at least 261$"),
        (261, ["[E1]"], r"^vocab_size: 261 is too small for 256 bytes and 6 special tokens; give at least 262$"),
        (300, ["two words"], r"^special_tokens: 'two words' is not allowed"),
    ],
)
def test_a_bad_option_is_a_user_error(tmp_path: Path, size: int, special: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train_bpe(TEXTS, tmp_path, size, special)
    train_bpe(TEXTS[:1], tmp_path, 261)
