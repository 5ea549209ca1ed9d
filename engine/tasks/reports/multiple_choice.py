"""The final report of multiple choice: accuracy against guessing and against always the same option.

Shapes: N questions, O options of the question that has most.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.tasks.report import accuracy_summary, told_accuracy
from engine.tasks.report_files import table, write
from engine.tasks.task import Evaluation


@dataclass(frozen=True)
class Predictions:
    """What was said of N questions, in the order of their file."""

    frequent: int
    """the option that is right most often among the training questions"""
    truth: NDArray[np.int64]
    """the right option of each question, from 0, [N]"""
    probabilities: NDArray[np.float64]
    """[N, O]; 0 where a question has no such option"""
    counts: NDArray[np.int64]
    """options of each question, [N]"""

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable option of each question, [N]."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)


def report(evaluation: Evaluation, folder: Path) -> str:
    """Write report.txt, report.json and predictions.tsv into `folder`.

    Args:
        evaluation: of `MultipleChoice.evaluate`; its record "predictions" is what the report is made of.
        folder: made where it is missing.

    Returns:
        The text of report.txt.
    """
    predictions: Predictions = evaluation.records["predictions"]
    summary = summarise(predictions) | {"scores": evaluation.scalars}
    confidence = predictions.probabilities.max(axis=1)
    rows = [
        (index, true, guess, f"{confidence[index]:.6f}")
        for index, (true, guess) in enumerate(zip(predictions.truth, predictions.predicted, strict=True))
    ]
    files = {"predictions.tsv": table(("index", "true", "predicted", "confidence"), rows)}
    return write(folder, files, summary, render(summary))


def summarise(predictions: Predictions) -> dict[str, Any]:
    """The report as plain values, ready for JSON."""
    truth = predictions.truth
    return {
        "questions": len(truth),
        **accuracy_summary(truth == predictions.predicted),
        "guessing_baseline": float((1.0 / predictions.counts).mean()),
        "frequent_baseline": {
            "option": predictions.frequent,
            "accuracy": float((truth == predictions.frequent).mean()),
        },
    }


def render(summary: dict[str, Any]) -> str:
    """The report as text."""
    frequent = summary["frequent_baseline"]
    return (
        f"{told_accuracy(summary, 'questions')}"
        f"guessing baseline {summary['guessing_baseline']:.4f}, most frequent baseline {frequent['accuracy']:.4f} "
        f"(always option {frequent['option']}, counted from 0)\n"
    )
