"""What a token classifier's report tells of single texts: counts of entities, which add up to its F1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.data.labelled.tagged.files import TaggedTexts
from engine.tasks.outcomes import read_outcomes, score_of
from engine.tasks.task import Evaluation
from engine.tasks.tokens.report import TaggedPredictions, report

NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def predictions(sizes: list[int], truth: list[int], predicted: list[int]) -> TaggedPredictions:
    words = [np.array([[2 * i, 2 * i + 1] for i in range(size)], dtype=np.int64).reshape(-1, 2) for size in sizes]
    lines = [[1] * max(1, size) for size in sizes]
    texts = TaggedTexts("test.conll", ["x " * size for size in sizes], words, [[] for _ in sizes], lines, "BIO")
    return TaggedPredictions(NAMES, texts, np.array(truth), np.array(predicted))


def test_each_text_has_its_counts_also_beside_one_without_words() -> None:
    """LOC LOC | | PER of two words, of which one is found | a false LOC."""
    found = predictions([3, 0, 2, 1], [1, 0, 1, 3, 4, 0], [1, 0, 0, 3, 0, 1])
    truth, scores = found.outcomes()
    assert truth == ["B-LOC O B-LOC", "", "B-PER I-PER", "O"]
    assert scores["f1"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 0]]


def test_the_counts_add_up_to_the_reports_f1(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    sizes = generator.integers(0, 9, 40).tolist()
    truth, predicted = generator.integers(0, 5, (2, sum(sizes))).tolist()
    found = predictions(sizes, truth, predicted)
    report(Evaluation({}, records={"predictions": found}), tmp_path / "report", texts=False)
    outcomes = read_outcomes(tmp_path / "report")
    assert len(outcomes) == 40
    assert score_of("f1", outcomes.scores["f1"]) == pytest.approx(found.counts().scores()["f1"])
