"""Entities of BIO tags and their scores: hand-made cases, and seqeval's strict mode where it is installed."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tasks.tokens import entities as module
from engine.tasks.tokens.entities import count_entities, entities

NAMES = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


def found(*texts: str) -> list[tuple[int, int, str]]:
    tags = np.array([NAMES.index(tag) for text in texts for tag in text.split()], dtype=np.int64)
    begins = np.concatenate([np.eye(1, len(text.split()), dtype=np.bool_)[0] for text in texts])
    return [(first, behind, ("LOC", "PER")[kind]) for first, behind, kind in entities(tags, begins).tolist()]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["O O"], []),
        (["B-PER I-PER O B-LOC"], [(0, 2, "PER"), (3, 4, "LOC")]),
        (["B-PER B-PER I-PER"], [(0, 1, "PER"), (1, 3, "PER")]),
        (["O I-PER I-PER"], []),
        (["B-PER I-LOC I-PER"], [(0, 1, "PER")]),
        (["B-PER I-LOC I-LOC B-LOC I-LOC"], [(0, 1, "PER"), (3, 5, "LOC")]),
        (["B-PER", "I-PER"], [(0, 1, "PER")]),
        (["O B-LOC I-LOC", "I-LOC B-LOC"], [(1, 3, "LOC"), (4, 5, "LOC")]),
    ],
)
def test_entities_are_strict(texts: list[str], expected: list[tuple[int, int, str]]) -> None:
    assert found(*texts) == expected


def test_scores_count_exact_spans_of_the_same_type() -> None:
    true = np.array([[0, 2, 0], [3, 4, 1], [5, 8, 1], [9, 10, 0]])
    predicted = np.array([[0, 2, 0], [3, 4, 0], [5, 7, 1]])
    counts = count_entities(true, predicted, 3)
    assert counts.scores() == {"precision": 1 / 3, "recall": 1 / 4, "f1": 2 / 7, "support": 4}
    assert counts.scores(0) == {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "support": 2}
    assert counts.scores(1) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2}
    assert counts.scores(2) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}


TAGS = st.lists(
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1, max_size=12), min_size=1
)


@given(TAGS)
@settings(deadline=None, max_examples=200)
def test_the_scores_are_seqevals(texts: list[list[tuple[str, str]]]) -> None:
    metrics = pytest.importorskip("seqeval.metrics")
    scheme = pytest.importorskip("seqeval.scheme").IOB2
    sides = [[[pair[side] for pair in text] for text in texts] for side in (0, 1)]
    begins = np.concatenate([np.eye(1, len(text), dtype=np.bool_)[0] for text in texts])
    ids = [np.array([NAMES.index(tag) for text in side for tag in text], dtype=np.int64) for side in sides]
    counts = count_entities(*(entities(each, begins) for each in ids), 2)
    theirs = metrics.classification_report(*sides, mode="strict", scheme=scheme, output_dict=True, zero_division=0)
    rows = {"micro avg": counts.scores(), "LOC": counts.scores(0), "PER": counts.scores(1)}
    for name, row in rows.items():
        if name in theirs:  # seqeval lists types that occur
            assert row == pytest.approx({key.replace("-score", ""): value for key, value in theirs[name].items()})


def test_the_examples_hold() -> None:
    assert doctest.testmod(module).failed == 0
