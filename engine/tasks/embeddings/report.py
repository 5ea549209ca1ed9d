"""The final report of embeddings: correlations of cosines and labels, or retrieval against guessing.

Shapes: N pairs, T different texts, P pairs of a text and a positive of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.tasks.embeddings.retrieval import DEPTH, Ranks
from engine.tasks.outcomes import write_outcomes
from engine.tasks.report_files import Files, table, write
from engine.tasks.reports.regression import correlation_interval, scatter_picture
from engine.tasks.task import Evaluation


@dataclass(frozen=True)
class Similarities:
    """How alike N pairs are, in the order of their file."""

    truth: NDArray[np.float64]
    """labels, [N]"""
    predicted: NDArray[np.float64]
    """cosines, [N]"""


def report(evaluation: Evaluation, folder: Path) -> str:
    """Write report.txt, report.json, outcomes.tsv, and scatter.png and predictions.tsv or ranks.tsv into `folder`.

    Args:
        evaluation: of `Embeddings.evaluate`.
        folder: made where it is missing.

    Returns:
        The text of report.txt.
    """
    similarities: Similarities | None = evaluation.records.get("similarities")
    if similarities is None:
        return _of_ranks(evaluation.records["ranks"], evaluation.scalars, folder)
    return _of_similarities(similarities, evaluation.scalars, folder)


def _of_similarities(found: Similarities, scalars: dict[str, float], folder: Path) -> str:
    count = len(found.truth)
    low, high = correlation_interval(scalars["pearson"], count)
    rows = [
        (index, f"{true:.9g}", f"{cosine:.9g}")
        for index, (true, cosine) in enumerate(zip(found.truth, found.predicted, strict=True))
    ]
    files: Files = {
        "predictions.tsv": table(("index", "true", "predicted"), rows),
        "scatter.png": scatter_picture(found.truth, found.predicted),
    }
    both = np.stack((found.truth, found.predicted), axis=1)
    write_outcomes(folder, [true for _, true, _ in rows], {"spearman": both, "pearson": both})
    text = (
        f"spearman {scalars['spearman']:.4f}, pearson {scalars['pearson']:.4f} "
        f"(95 % interval {low:.4f} to {high:.4f}) of cosines and labels on {count} pairs\n"
    )
    summary = {"pairs": count, **scalars, "pearson_interval_95": [low, high], "scores": scalars}
    return write(folder, files, summary, text)


def _of_ranks(found: Ranks, scalars: dict[str, float], folder: Path) -> str:
    of_texts = found.scores()
    guessing = {f"recall_at_{depth}": min(1.0, depth / found.candidates) for depth in (1, DEPTH)}
    rows = zip(found.text.tolist(), found.rank.tolist(), strict=True)
    # two runs that are compared know by the texts' digests that they were asked the same
    write_outcomes(folder, [f"{number & (2**64 - 1):016x}" for number in found.numbers.tolist()], of_texts)
    text = (
        f"MRR@{DEPTH} {scalars['mrr_at_10']:.4f}, nDCG@{DEPTH} {scalars['ndcg_at_10']:.4f}, "
        f"recall@1 {scalars['recall_at_1']:.4f}, recall@{DEPTH} {scalars['recall_at_10']:.4f} "
        f"on {len(found.numbers)} texts among {found.candidates} candidates\n"
        f"guessing baseline: recall@1 {guessing['recall_at_1']:.4f}, recall@{DEPTH} {guessing['recall_at_10']:.4f}\n"
    )
    summary: dict[str, Any] = {"texts": len(found.numbers), "candidates": found.candidates, **scalars}
    summary |= {"guessing_baseline": guessing, "scores": scalars}
    return write(folder, {"ranks.tsv": table(("text", "rank"), rows)}, summary, text)
