"""The final report of several labels a text: F1 over and by label, thresholds, the most frequent set as a baseline.

Shapes: N examples, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.tasks.outcomes import write_outcomes
from engine.tasks.report_files import table, write
from engine.tasks.task import Evaluation

#: the threshold that nobody tuned
HALF = 0.5
TUNED_HERE = "the thresholds were tuned on these examples: expect lower scores on others, or give labelled.test\n"


@dataclass(frozen=True)
class Predictions:
    """What was said of N examples, in the order of their file."""

    names: tuple[str, ...]
    """labels in the order of their ids"""
    most_frequent: NDArray[np.bool_]
    """the set of labels that most training examples have, [L]"""
    truth: NDArray[np.bool_]
    """[N, L]"""
    probabilities: NDArray[np.float64]
    """[N, L]"""
    thresholds: NDArray[np.float64]
    """[L]"""

    @property
    def predicted(self) -> NDArray[np.bool_]:
        """Which labels each example gets, [N, L]."""
        chosen: NDArray[np.bool_] = self.probabilities >= self.thresholds
        return chosen


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """The probabilities of logits."""
    return np.exp(-np.logaddexp(0.0, -logits))


def loss(truth: NDArray[np.bool_], logits: NDArray[np.float64]) -> float:
    """Mean binary cross-entropy (nats) over examples and labels, [N, L]."""
    return float(np.logaddexp(0.0, np.where(truth, -logits, logits)).mean())


def scores(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, float]:
    """Micro and macro F1, and the share of examples of which every label is right; of [N, L]."""
    from sklearn.metrics import f1_score

    micro, macro = (f1_score(truth, predicted, average=kind, zero_division=0) for kind in ("micro", "macro"))
    exact = (truth == predicted).all(axis=1).mean()
    return {"micro_f1": float(micro), "macro_f1": float(macro), "exact_match": float(exact)}


def tune(truth: NDArray[np.bool_], probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """The thresholds that give each label its best F1 on these examples (Yang 2001, "SCut"), [L]; of [N, L]."""
    return np.array([tune_one(*columns) for columns in zip(truth.T, probabilities.T, strict=True)])


def tune_one(truth: NDArray[np.bool_], probabilities: NDArray[np.float64]) -> float:
    """The threshold of the best F1 of one label, half-way between two probabilities; of equal ones that nearest to 0.5.

    0.5 where no example has the label.

    >>> tune_one(np.array([True, False, True]), np.array([0.9, 0.2, 0.3]))
    0.25

    Args:
        truth: which examples have it, [N].
        probabilities: [N].
    """
    if not truth.any():
        return HALF
    order = np.argsort(-probabilities, kind="stable")
    ranked = np.append(probabilities[order], 0.0)
    right, given = truth[order].cumsum(), np.arange(1, len(truth) + 1)
    f1 = 2.0 * right / (given + truth.sum())
    middles = (ranked[:-1] + ranked[1:]) / 2.0
    apart = ranked[:-1] > ranked[1:]  # no threshold divides equal probabilities
    best = np.flatnonzero(apart & (f1 == f1[apart].max()))
    return float(middles[best[np.abs(middles[best] - HALF).argmin()]])


def report(evaluation: Evaluation, folder: Path, separator: str, *, tuned_here: bool) -> str:
    """Write report.txt, report.json and predictions.tsv into `folder`.

    Args:
        evaluation: of `MultiLabelClassification.evaluate`; its record "predictions" is what the report is made of.
        folder: made where it is missing.
        separator: between labels in predictions.tsv.
        tuned_here: whether the thresholds come from the examples of the report.

    Returns:
        The text of report.txt.
    """
    predictions: Predictions = evaluation.records["predictions"]
    summary = summarise(predictions) | {"thresholds_tuned_here": tuned_here, "scores": evaluation.scalars}
    names = np.array(predictions.names, dtype=object)
    rows = [
        (index, separator.join(names[true]), separator.join(names[guess]))
        for index, (true, guess) in enumerate(zip(predictions.truth, predictions.predicted, strict=True))
    ]
    files = {"predictions.tsv": table(("index", "true", "predicted"), rows)}
    write_outcomes(folder, [true for _, true, _ in rows], shares(predictions.truth, predictions.predicted))
    return write(folder, files, summary, render(summary, tuned_here))


def shares(truth: NDArray[np.bool_], predicted: NDArray[np.bool_]) -> dict[str, NDArray[np.float64]]:
    """What each example adds to micro F1, [N, 3] of `engine.tasks.outcomes`, and whether all of it is right, [N]."""
    counts = [(truth & predicted).sum(1), (~truth & predicted).sum(1), (truth & ~predicted).sum(1)]
    right = (truth == predicted).all(axis=1)
    return {"micro_f1": np.stack(counts, axis=1).astype(np.float64), "exact_match": right.astype(np.float64)}


def summarise(predictions: Predictions) -> dict[str, Any]:
    """The report as plain values, ready for JSON."""
    from sklearn.metrics import precision_recall_fscore_support

    truth, predicted = predictions.truth, predictions.predicted
    by_label = precision_recall_fscore_support(truth, predicted, average=None, zero_division=0)
    measures = ("precision", "recall", "f1")
    labels = [
        {"label": name, "threshold": float(predictions.thresholds[index])}
        | {measure: float(values[index]) for measure, values in zip(measures, by_label[:3], strict=True)}
        | {"support": int(by_label[3][index])}
        for index, name in enumerate(predictions.names)
    ]
    always = np.broadcast_to(predictions.most_frequent, truth.shape)
    frequent = [name for name, has in zip(predictions.names, predictions.most_frequent, strict=True) if has]
    return {
        "examples": len(truth),
        **scores(truth, predicted),
        "at_threshold_0.5": scores(truth, predictions.probabilities >= HALF),
        "most_frequent_baseline": {"labels": frequent, **scores(truth, always)},
        "labels": labels,
    }


def render(summary: dict[str, Any], tuned_here: bool) -> str:
    """The report as text."""
    half, baseline = summary["at_threshold_0.5"], summary["most_frequent_baseline"]
    width = max(5, *(len(row["label"]) for row in summary["labels"]))
    lines = [
        f"{_told(summary)} on {summary['examples']} examples",
        f"at a threshold of 0.5: {_told(half)}",
        f"most frequent baseline: {_told(baseline)} (always {', '.join(baseline['labels']) or 'no label'})",
        "",
        f"{'label':<{width}}  threshold  precision  recall  f1      support",
    ]
    lines += [
        f"{row['label']:<{width}}  {row['threshold']:<9.4f}  {row['precision']:<9.4f}  {row['recall']:.4f}  "
        f"{row['f1']:.4f}  {row['support']}"
        for row in summary["labels"]
    ]
    return "\n".join(lines) + "\n" + (TUNED_HERE if tuned_here else "")


def _told(found: dict[str, Any]) -> str:
    return f"micro F1 {found['micro_f1']:.4f}, macro F1 {found['macro_f1']:.4f}, exact match {found['exact_match']:.4f}"
