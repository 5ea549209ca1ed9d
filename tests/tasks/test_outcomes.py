"""What a report tells of single examples, written, read and added up to scores again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from engine.errors import UserError
from engine.tasks.outcomes import (
    OUTCOMES_FILE,
    PREDICTIONS_FILE,
    interval,
    read_outcomes,
    score_of,
    write_outcomes,
)

TRUTH = ["a\tb", 'quoted "x"', "ü\u2028v", "", "two\nlines\r"]
GENERATOR = np.random.default_rng(1)
SCORES = {
    "exact_match": np.array([1.0, 0.0, 1.0, 1.0, 0.0]),
    "entity_f1": GENERATOR.integers(0, 3, (5, 3)).astype(np.float64),
    "pearson": GENERATOR.random((5, 2)),
}


def test_outcomes_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_outcomes(tmp_path, TRUTH, SCORES)
    header = (tmp_path / OUTCOMES_FILE).read_text().splitlines()[0].split("\t")
    assert header[:3] == ["index", "true", "exact_match"]
    assert header[3:] == ["entity_f1.tp", "entity_f1.fp", "entity_f1.fn", "pearson.true", "pearson.predicted"]
    found = read_outcomes(tmp_path)
    assert list(found.truth) == TRUTH
    assert list(found.scores) == list(SCORES)
    for name, values in SCORES.items():
        assert found.scores[name] == pytest.approx(values.reshape(5, -1), rel=1e-8)


def test_what_is_right_at_length_is_kept_as_a_hash(tmp_path: Path) -> None:
    long = ["O " * 100_000, "O " * 99_999 + "B-LOC "]
    write_outcomes(tmp_path, long, {"accuracy": np.ones(2)})
    found = read_outcomes(tmp_path).truth
    assert len(set(found)) == 2
    assert all(text.startswith("sha256 ") for text in found)


def test_a_mean_is_the_mean_and_micro_f1_is_sklearns() -> None:
    truth, predicted = GENERATOR.integers(0, 2, (2, 40, 6))
    counts = [(truth & predicted).sum(1), (~truth & predicted & 1).sum(1), (truth & ~predicted & 1).sum(1)]
    found = score_of("entity_f1", np.stack(counts, axis=1).astype(np.float64))
    assert found == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert score_of("entity_f1", np.zeros((4, 3))) == 0.0
    assert score_of("exact_match", np.array([[1.0], [0.0], [0.0], [1.0]])) == 0.5


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_are_scipys_also_of_many_resamples(name: str) -> None:
    pairs = GENERATOR.integers(0, 5, (3, 50, 2)).astype(np.float64)
    theirs = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[name]
    assert score_of(name, pairs) == pytest.approx([theirs(*pair.T).statistic for pair in pairs])


def test_predictions_of_a_classifier_tell_its_accuracy(tmp_path: Path) -> None:
    rows = ["index\ttrue\tpredicted\tconfidence", "0\tyes\tyes\t0.9", "1\tno\tyes\t0.6", "2\tno\tno\t0.7"]
    (tmp_path / PREDICTIONS_FILE).write_text("\n".join(rows) + "\n")
    found = read_outcomes(tmp_path)
    assert found.truth == ("yes", "no", "no")
    assert found.scores["accuracy"].tolist() == [[1.0], [0.0], [1.0]]


@pytest.mark.parametrize(
    "content", ["", "index\ttrue\taccuracy\n0\ta\n", "index\ttrue\taccuracy\n0\ta\tx\n", "index\n0\n"]
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / OUTCOMES_FILE).write_text(content)
    with pytest.raises(UserError, match=rf"^{tmp_path / OUTCOMES_FILE}: it is not what a run wrote there"):
        read_outcomes(tmp_path)


def test_predicted_numbers_are_no_classes(tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS_FILE).write_text("index\ttrue\tpredicted\n0\t1.5\t1.25\n")
    with pytest.raises(UserError, match=r"^\S+: it tells nothing of single examples; it holds no outcomes.tsv$"):
        read_outcomes(tmp_path)


def test_a_report_without_examples_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^\S+: it tells nothing of single examples; it holds no outcomes.tsv$"):
        read_outcomes(tmp_path)


def test_the_interval_of_a_mean_is_the_normal_one_of_many_examples() -> None:
    values = np.random.default_rng(2).random((4000, 1))
    low, high = interval("f1", values)
    radius = 1.96 * float(values.std()) / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - radius, values.mean() + radius), abs=0.1 * radius)
    assert interval("f1", values) == (low, high)
    assert interval("f1", np.ones((1, 1))) == (1.0, 1.0)


def test_the_interval_of_micro_f1_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    rates = np.array([2.0, 0.7, 0.4])
    truth = 4.0 / (4.0 + 0.7 + 0.4)
    found = [interval("f1", generator.poisson(rates, (60, 3)).astype(np.float64)) for _ in range(100)]
    assert 85 <= sum(low <= truth <= high for low, high in found) <= 99
