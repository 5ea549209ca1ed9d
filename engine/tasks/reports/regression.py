"""The final report of a regression: correlations and errors against always guessing the mean, a scatter as a picture.

Shapes: N examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.tasks.outcomes import write_outcomes
from engine.tasks.report import CONFIDENCE
from engine.tasks.report_files import Files, drawn, table, write
from engine.tasks.task import Evaluation


@dataclass(frozen=True)
class Predictions:
    """What was said of N examples, in the order of their file."""

    mean: float
    """of the training examples' numbers"""
    truth: NDArray[np.float64]
    """[N]"""
    predicted: NDArray[np.float64]
    """[N]"""


def scores(truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, float]:
    """Pearson's and Spearman's correlation, mean squared and mean absolute error of predictions [N].

    A correlation with numbers that are all the same is 0.
    """
    from scipy.stats import rankdata

    return {
        "pearson": correlation(truth, predicted),
        "spearman": correlation(rankdata(truth), rankdata(predicted)),
        "mse": float(np.square(truth - predicted).mean()),
        "mae": float(np.abs(truth - predicted).mean()),
    }


def correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Pearson's correlation of two rows of numbers [N]; 0 where one of them doesn't vary."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def correlation_interval(value: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a correlation of `count` pairs, by Fisher's z-transformation (Fisher 1921)."""
    if count <= 3 or abs(value) >= 1.0:
        return (-1.0, 1.0) if count <= 3 else (value, value)
    radius = NormalDist().inv_cdf((1.0 + CONFIDENCE) / 2.0) / math.sqrt(count - 3)
    return math.tanh(math.atanh(value) - radius), math.tanh(math.atanh(value) + radius)


def report(evaluation: Evaluation, folder: Path) -> str:
    """Write report.txt, report.json, scatter.png, predictions.tsv and outcomes.tsv into `folder`.

    Args:
        evaluation: of `Regression.evaluate`; its record "predictions" is what the report is made of.
        folder: made where it is missing.

    Returns:
        The text of report.txt.
    """
    predictions: Predictions = evaluation.records["predictions"]
    truth, predicted = predictions.truth, predictions.predicted
    summary = summarise(predictions) | {"scores": evaluation.scalars}
    rows = [
        (index, f"{true:.9g}", f"{guess:.9g}") for index, (true, guess) in enumerate(zip(truth, predicted, strict=True))
    ]
    files: Files = {
        "predictions.tsv": table(("index", "true", "predicted"), rows),
        "scatter.png": scatter_picture(truth, predicted),
    }
    both, errors = np.stack((truth, predicted), axis=1), truth - predicted
    shares = {"pearson": both, "spearman": both, "mse": np.square(errors), "mae": np.abs(errors)}
    write_outcomes(folder, [f"{true:.9g}" for true in truth], shares)
    return write(folder, files, summary, render(summary))


def summarise(predictions: Predictions) -> dict[str, Any]:
    """The report as plain values, ready for JSON."""
    found = scores(predictions.truth, predictions.predicted)
    constant = scores(predictions.truth, np.full_like(predictions.truth, predictions.mean))
    return {
        "examples": len(predictions.truth),
        **found,
        "pearson_interval_95": list(correlation_interval(found["pearson"], len(predictions.truth))),
        "mean_baseline": {"predicted": predictions.mean, "mse": constant["mse"], "mae": constant["mae"]},
    }


def render(summary: dict[str, Any]) -> str:
    """The report as text."""
    low, high = summary["pearson_interval_95"]
    baseline = summary["mean_baseline"]
    return (
        f"pearson {summary['pearson']:.4f} (95 % interval {low:.4f} to {high:.4f}), spearman {summary['spearman']:.4f} "
        f"on {summary['examples']} examples\n"
        f"mean squared error {summary['mse']:.4g}, mean absolute error {summary['mae']:.4g}\n"
        f"mean baseline: mean squared error {baseline['mse']:.4g}, mean absolute error {baseline['mae']:.4g} "
        f"(always {baseline['predicted']:.4g}, the mean of the training examples)\n"
    )


def scatter_picture(truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.uint8]:
    """True and predicted numbers [N] as a picture [height, width, 3], with the line on which both are the same."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 5.0), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(truth, predicted, s=12, alpha=0.4, linewidths=0)
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    axes.plot([low, high], [low, high], color="black", linewidth=0.8)
    axes.set(xlabel="true", ylabel="predicted")
    return drawn(figure)
