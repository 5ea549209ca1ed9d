"""What is said of labelled data before it is learned from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.data.labelled.encoded import LabelledSource, encode
from engine.data.labelled.summary import describe
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return load_tokenizer(tmp_path / "vocab.txt")


def source(
    vocabulary: Vocabulary, words: list[int], labels: list[int], pairs: list[str] | None = None
) -> LabelledSource:
    texts = [" ".join("a" * count) for count in words]
    return LabelledSource(encode(vocabulary, texts, pairs, 8), np.array(labels), seed=1, fixed=True)


def test_lengths_are_those_before_truncation(vocabulary: Vocabulary) -> None:
    """[CLS] and [SEP] count; a pair has a second [SEP]. Six words fit exactly into 8 tokens."""
    assert source(vocabulary, [1, 6, 7, 50], [0] * 4).encoded.full_lengths.tolist() == [3, 8, 9, 52]
    paired = source(vocabulary, [2, 3, 9], [0] * 3, ["a b", "a b", "b c"]).encoded
    assert paired.full_lengths.tolist() == [7, 8, 14]
    assert np.diff(paired.offsets).tolist() == [7, 8, 8]


def test_classes_lengths_and_what_is_cut(vocabulary: Vocabulary) -> None:
    sources = {
        "train": source(vocabulary, [1, 2, 3, 4, 6, 7, 20, 30], [0, 1, 1, 1, 1, 1, 1, 0]),
        "validation": source(vocabulary, [1, 2], [1, 1]),
    }
    assert describe(["bad", "good"], sources, 8) == [
        "train: 8 examples: good 6 (75.0 %), bad 2 (25.0 %); tokens: median 8, 95 % up to 32, longest 32; "
        "3 (37.5 %) are truncated at labelled.max_length 8",
        "validation: 2 examples: good 2 (100.0 %), bad 0 (0.0 %); tokens: median 4, 95 % up to 4, longest 4; "
        "none is truncated at labelled.max_length 8",
        "note: validation has no example of 1 of 2 classes: bad",
    ]


def test_many_and_single_classes_are_summed_up(vocabulary: Vocabulary) -> None:
    labels = [label for label in range(14) for _ in range(14 - label)]
    said = describe([f"c{i}" for i in range(14)], {"train": source(vocabulary, [1] * len(labels), labels)}, 8)
    assert "c9 5 (4.8 %), 4 others from 4 down to 1; tokens" in said[0]
    assert said[1] == "note: 1 of 14 classes has one training example"
