"""The final report of a classifier: scikit-learn's tables, the majority baseline, a confusion matrix as a picture.

Shapes: N examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.tasks.report_files import Files, drawn, table, write
from engine.tasks.task import Evaluation

CONFIDENCE = 0.95
# above this many classes the counts and names of the picture would overlap
READABLE_CLASSES = 25
NAME_LENGTH = 18


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of N examples, in the order of their file."""

    names: tuple[str, ...]
    """class names in the order of their ids"""
    majority: int
    """the most frequent class of the training examples"""
    truth: NDArray[np.int64]
    """class ids [N]"""
    probabilities: NDArray[np.float64]
    """[N, C]"""

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each example, [N]."""
        return np.asarray(self.probabilities.argmax(axis=1), dtype=np.int64)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Counts [C, C]: a row a true class, a column a predicted one."""
        from sklearn.metrics import confusion_matrix

        counts = confusion_matrix(self.truth, self.predicted, labels=range(len(self.names)))
        return np.asarray(counts, dtype=np.int64)


def report(evaluation: Evaluation, folder: Path) -> str:
    """Write report.txt, report.json, confusion_matrix.png and predictions.tsv into `folder`.

    Args:
        evaluation: of `SequenceClassification.evaluate`; its record "predictions" is what the report is made of.
        folder: made where it is missing.

    Returns:
        The text of report.txt.
    """
    predictions: Predictions = evaluation.records["predictions"]
    summary = summarise(predictions) | {"scores": evaluation.scalars}
    text = render(predictions, summary)
    files: Files = {
        "predictions.tsv": _prediction_rows(predictions),
        "confusion_matrix.png": confusion_picture(predictions.confusion, predictions.names),
    }
    return write(folder, files, summary, text)


def accuracy_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of an accuracy of `correct` out of `total` (Wilson 1927)."""
    z = NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2.0)
    share, weight = correct / total, z * z / total
    centre = (share + weight / 2.0) / (1.0 + weight)
    radius = z / (1.0 + weight) * math.sqrt(share * (1.0 - share) / total + weight / (4.0 * total))
    return centre - radius, centre + radius


def accuracy_summary(right: NDArray[np.bool_]) -> dict[str, Any]:
    """The accuracy of N answers, and its interval, as plain values."""
    correct, total = int(right.sum()), len(right)
    return {"accuracy": correct / total, "accuracy_interval_95": list(accuracy_interval(correct, total))}


def told_accuracy(summary: Mapping[str, Any], unit: str) -> str:
    """The line of a summary with `accuracy_summary` and the number of what was answered, under `unit`."""
    low, high = summary["accuracy_interval_95"]
    return f"accuracy {summary['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}) on {summary[unit]} {unit}\n"


def summarise(predictions: Predictions) -> dict[str, Any]:
    """The report as plain values, ready for JSON."""
    truth = predictions.truth
    return {
        "examples": len(truth),
        **accuracy_summary(truth == predictions.predicted),
        "majority_baseline": {
            "label": predictions.names[predictions.majority],
            "accuracy": float((truth == predictions.majority).mean()),
        },
        "labels": list(predictions.names),
        "confusion_matrix": predictions.confusion.tolist(),
        "classification_report": _table(predictions, output_dict=True),
    }


def render(predictions: Predictions, summary: dict[str, Any]) -> str:
    """The report as text; it starts with the accuracy against the majority baseline."""
    baseline = summary["majority_baseline"]
    return (
        f"{told_accuracy(summary, 'examples')}"
        f"majority baseline {baseline['accuracy']:.4f} (always {baseline['label']!r})\n"
        f"{_told_order(summary['scores'])}\n"
        f"{_table(predictions, output_dict=False)}"
    )


def _told_order(scores: Mapping[str, float]) -> str:
    """A line of the scores of classes in order, where there are any."""
    if "quadratic_kappa" not in scores:
        return ""
    return (
        f"quadratic weighted kappa {scores['quadratic_kappa']:.4f}, {scores['rank_error']:.4f} ranks off on average\n"
    )


def _table(predictions: Predictions, output_dict: bool) -> Any:
    """scikit-learn's classification report over the classes that occur among labels or predictions."""
    from sklearn.metrics import classification_report

    truth, predicted = predictions.truth, predictions.predicted
    present = np.union1d(truth, predicted)
    names = [predictions.names[index] for index in present]
    return classification_report(
        truth, predicted, labels=present, target_names=names, digits=4, zero_division=0, output_dict=output_dict
    )


def _prediction_rows(predictions: Predictions) -> str:
    names, confidence = predictions.names, predictions.probabilities.max(axis=1)
    rows = [
        (index, names[true], names[guess], f"{confidence[index]:.6f}")
        for index, (true, guess) in enumerate(zip(predictions.truth, predictions.predicted, strict=True))
    ]
    return table(("index", "true", "predicted", "confidence"), rows)


def confusion_picture(counts: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.uint8]:
    """A confusion matrix [C, C] as a picture [height, width, 3]: colours are shares of the true class."""
    from matplotlib.figure import Figure

    classes = len(names)
    side = min(4.0 + 0.35 * classes, 12.0)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set(xlabel="predicted", ylabel="true")
    if classes <= READABLE_CLASSES:
        # a dollar sign would start matplotlib's formula mode
        shown = [name[:NAME_LENGTH].replace("$", r"\$") for name in names]
        axes.set_xticks(range(classes), shown, rotation=45, ha="right")
        axes.set_yticks(range(classes), shown)
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return drawn(figure)
