"""Facts about the final report of a classifier."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from scipy.stats import binomtest

from engine.tasks.report import Predictions, accuracy_interval, confusion_picture, report, summarise
from engine.tasks.task import Evaluation


@pytest.fixture
def predictions() -> Predictions:
    truth = np.array([0, 0, 1, 1, 1, 1])
    confidence = np.array([[0.9, 0.1, 0], [0.4, 0.6, 0], [0.2, 0.8, 0], [0.3, 0.7, 0], [0.8, 0.2, 0], [0, 1.0, 0]])
    return Predictions(("bad", "good\tvery", "unseen"), 1, truth, confidence)


def test_the_text_starts_with_accuracy_and_majority_baseline(predictions: Predictions, tmp_path: Path) -> None:
    text = report(Evaluation({}, records={"predictions": predictions}), tmp_path)
    first, second = text.splitlines()[:2]
    assert first.startswith("accuracy 0.6667 (95 % interval 0.3000 to 0.9032) on 6 examples")
    assert second.startswith("majority baseline 0.6667 (always 'good")
    assert "macro avg     0.6250    0.6250    0.6250         6" in text


def test_the_baseline_always_answers_the_training_majority(predictions: Predictions) -> None:
    other = Predictions(predictions.names, 0, predictions.truth, predictions.probabilities)
    assert summarise(other)["majority_baseline"] == {"label": "bad", "accuracy": pytest.approx(2 / 6)}


@pytest.fixture
def lopsided() -> Predictions:
    """7 examples of which truth and prediction differ in every total: true 4, 2, 1 of a class, predicted 2, 4, 1."""
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    guesses = np.array([0, 1, 1, 1, 1, 2, 0])
    return Predictions(("bad", "fair", "good"), 0, truth, np.eye(3)[guesses])


def test_rows_are_true_classes_and_columns_predicted_ones(lopsided: Predictions, tmp_path: Path) -> None:
    report(Evaluation({}, records={"predictions": lopsided}), tmp_path)
    summary = json.loads((tmp_path / "report.json").read_text())
    assert summary["labels"] == ["bad", "fair", "good"]
    assert summary["confusion_matrix"] == [[1, 3, 0], [0, 1, 1], [1, 0, 0]]
    table = summary["classification_report"]
    assert (table["bad"]["precision"], table["bad"]["recall"], table["bad"]["support"]) == (1 / 2, 1 / 4, 4)
    assert (table["fair"]["precision"], table["fair"]["recall"], table["fair"]["support"]) == (1 / 4, 1 / 2, 2)
    with (tmp_path / "predictions.tsv").open(newline="") as file:
        rows = [(row["true"], row["predicted"]) for row in csv.DictReader(file, delimiter="\t")]
    assert rows[1] == ("bad", "fair")
    assert rows[6] == ("good", "bad")


def test_the_baseline_is_counted_among_the_true_classes(lopsided: Predictions) -> None:
    summary = summarise(lopsided)
    assert summary["majority_baseline"] == {"label": "bad", "accuracy": pytest.approx(4 / 7)}
    assert summary["accuracy"] == pytest.approx(2 / 7)


def test_the_files_agree_with_the_predictions(predictions: Predictions, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    text = report(Evaluation({"loss": 0.5}, records={"predictions": predictions}), folder)
    assert {file.name for file in folder.iterdir()} == {
        "report.txt",
        "report.json",
        "confusion_matrix.png",
        "predictions.tsv",
    }
    assert (folder / "report.txt").read_text() == text
    summary = json.loads((folder / "report.json").read_text())
    assert summary["confusion_matrix"] == [[1, 1, 0], [1, 3, 0], [0, 0, 0]]
    assert summary["scores"] == {"loss": 0.5}
    assert summary["classification_report"]["bad"]["support"] == 2
    with (folder / "predictions.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert rows[1] == {"index": "1", "true": "bad", "predicted": "good\tvery", "confidence": "0.600000"}
    assert len(rows) == 6
    pixels = matplotlib.image.imread(folder / "confusion_matrix.png")
    assert pixels.shape == (*confusion_picture(predictions.confusion, predictions.names).shape[:2], 4)


@pytest.mark.parametrize(("correct", "total"), [(0, 10), (10, 10), (1607, 1821), (1, 3)])
def test_the_interval_is_wilsons(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    assert accuracy_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_picture_shows_the_diagonal_darker_and_copes_with_many_classes() -> None:
    good = confusion_picture(np.eye(2, dtype=np.int64) * 5, ["$a", "b_{"])
    assert good.dtype == np.uint8
    assert good.shape[2] == 3
    height, width, _ = good.shape
    top_left, top_right = good[height // 4, width // 4], good[height // 4, 3 * width // 4]
    assert int(top_left.sum()) < int(top_right.sum()) - 200
    many = confusion_picture(np.ones((200, 200), dtype=np.int64), [str(i) for i in range(200)])
    assert max(many.shape) <= 1200


def test_a_row_of_the_picture_is_a_true_class_and_its_colours_are_shares_of_it() -> None:
    picture = confusion_picture(np.array([[1, 9], [0, 1]]), ["a", "b"]).astype(int).sum(axis=2)
    height, width = picture.shape
    (top_left, top_right), (bottom_left, bottom_right) = [
        [int(picture[row, column]) for column in (width // 4, 5 * width // 8)] for row in (height // 4, 5 * height // 8)
    ]
    assert max(top_right, bottom_right) < min(top_left, bottom_left) - 200
