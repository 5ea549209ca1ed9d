"""SQuAD's scores on cases computed by hand from the definitions of the official scripts."""

from __future__ import annotations

import numpy as np
import pytest

from engine.tasks.answers.squad import best_scores, exact_match, f1, normalise, tune_threshold


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The  Apollo-11 mission.", "apollo11 mission"),
        ("an apple, a pear and THE theory", "apple pear and theory"),
        ("a", ""),
        ("U.S.", "us"),
        ("don't", "dont"),
        ("“quoted”", "“quoted”"),  # the official script knows ASCII's punctuation alone
        ("line\none\ttwo", "line one two"),
        ("é", "é"),
    ],
)
def test_normalisation(answer: str, normalised: str) -> None:
    assert normalise(answer) == normalised


@pytest.mark.parametrize(
    ("predicted", "true", "exact", "overlap"),
    [
        ("Denver Broncos", "the Denver Broncos!", 1.0, 1.0),
        ("Denver", "Denver Broncos", 0.0, 2 / 3),  # precision 1, recall 1/2
        ("the big Denver Broncos team", "Denver Broncos", 0.0, 2 / 3),  # precision 2/4, recall 1
        ("Santa Clara", "Denver", 0.0, 0.0),
        ("to be or not to be", "to be", 0.0, 0.5),  # words count as often as they are there: 2 of 6 and of 2
        ("", "", 1.0, 1.0),
        ("", "Denver", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
    ],
)
def test_exact_match_and_f1(predicted: str, true: str, exact: float, overlap: float) -> None:
    assert exact_match(predicted, true) == exact
    assert f1(predicted, true) == pytest.approx(overlap)


def test_the_best_true_answer_counts_for_each_score() -> None:
    assert best_scores("Denver Broncos", ["Broncos", "Denver Broncos", "team"]) == (1.0, 1.0)
    assert best_scores("the Broncos", ["Denver Broncos", "Broncos of Denver in Colorado"]) == pytest.approx(
        (0.0, 2 / 3)
    )
    assert best_scores("", []) == (1.0, 1.0)
    assert best_scores("Denver", []) == (0.0, 0.0)
    assert best_scores("Denver", ["the", "Denver"]) == (1.0, 1.0)
    assert best_scores("", ["the"]) == (1.0, 1.0)


def brute(odds: list[float], answered: list[float], empty: list[float], threshold: float) -> float:
    given = [e if o > threshold else a for o, a, e in zip(odds, answered, empty, strict=True)]
    return float(np.mean(given))


def test_the_threshold_gives_the_highest_score_of_all() -> None:
    generator = np.random.default_rng(5)
    for _ in range(50):
        odds = np.round(generator.normal(size=12), 1)
        has = generator.random(12) < 0.5
        answered, empty = np.where(has, generator.random(12).round(2), 0.0), (~has).astype(float)
        threshold = tune_threshold(odds, answered, empty)
        everywhere = [odds.min() - 1, *odds.tolist(), odds.max() + 1]
        best = max(brute(odds.tolist(), answered.tolist(), empty.tolist(), cut) for cut in everywhere)
        assert brute(odds.tolist(), answered.tolist(), empty.tolist(), threshold) == pytest.approx(best)
        assert threshold not in odds.tolist()


def test_the_threshold_of_questions_that_all_have_or_lack_an_answer() -> None:
    odds = np.array([-3.0, 2.0])
    assert tune_threshold(odds, np.ones(2), np.zeros(2)) == 3.0
    assert tune_threshold(odds, np.zeros(2), np.ones(2)) == -4.0
    assert tune_threshold(odds, np.array([1.0, 0.0]), np.array([0.0, 1.0])) == -0.5
