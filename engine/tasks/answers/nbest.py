"""From the best spans of windows to the best answers of questions. Shapes: W windows, K spans of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.answers.encoded import AnswerWindows
from engine.data.labelled.answers.files import Question

#: in an export's zerobert.json, the score of no answer, less that of the best answer, above which none is given
THRESHOLD = "null_threshold"
#: answers that are kept of a question
ANSWERS = 20
#: odds of no answer where the context has no other
CERTAIN = 1e4


@dataclass(frozen=True)
class Candidate:
    """A span of a context as a possible answer; the empty one is none."""

    text: str
    span: tuple[int, int]
    """characters of the context where it starts and stops"""
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


@dataclass(frozen=True)
class Candidates:
    """What a model said of a question."""

    best: list[Candidate]
    """falling, none of them empty; a context without any token for an answer has none"""
    null: Candidate
    """that there is no answer, in the window where that is least likely"""

    @property
    def odds(self) -> float:
        """The score of no answer, less that of the best answer."""
        return self.null.score - self.best[0].score if self.best else CERTAIN

    def chosen(self, threshold: float | None) -> Candidate:
        """The best answer, or none where the odds are above the threshold."""
        empty = not self.best or (threshold is not None and self.odds > threshold)
        return self.null if empty else self.best[0]

    def answer(self, threshold: float | None) -> str:
        """What it says."""
        return self.chosen(threshold).text

    def ranked(self, null: bool) -> list[tuple[Candidate, float]]:
        """The best, with none among them if `null`, and their probabilities among themselves."""
        both = sorted([*self.best, *([self.null] if null else [])], key=lambda each: -each.score)[:ANSWERS]
        weights = np.exp(np.array([each.score for each in both]) - both[0].score) if both else np.zeros(0)
        return list(zip(both, (weights / weights.sum()).tolist(), strict=True))


def candidates(
    questions: Sequence[Question], windows: AnswerWindows, rows: Mapping[str, NDArray[Any]]
) -> list[Candidates]:
    """Put the windows of each question together; a span that two windows show counts once, with its higher score.

    Args:
        rows: of all windows in order: first, last [W, K] tokens in their window, first_logits, last_logits [W, K] with
            -inf where there is no span, null [W, 2] logits of no answer.
    """
    spans: list[dict[tuple[int, int], tuple[float, float]]] = [{} for _ in questions]
    nulls: list[tuple[float, float]] = [(math.inf, 0.0)] * len(questions)
    shift = windows.first - windows.context[:, 0]
    first, last = (rows[name] + shift[:, None] for name in ("first", "last"))
    kept = np.isfinite(rows["first_logits"])
    for window, number in enumerate(windows.question.tolist()):
        given = kept[window]
        places, pieces = spans[number], windows.spans[number]
        begin, end = pieces[first[window][given], 0], pieces[last[window][given], 1]
        logits = (rows[name][window][given].astype(float).tolist() for name in ("first_logits", "last_logits"))
        for start, stop, *pair in zip(begin.tolist(), end.tolist(), *logits, strict=True):
            if start < stop and sum(pair) > sum(places.get((start, stop), (-math.inf, 0.0))):
                places[start, stop] = (pair[0], pair[1])
        null = rows["null"][window].astype(float).tolist()
        if sum(null) < sum(nulls[number]):
            nulls[number] = (null[0], null[1])
    return [_best(*each) for each in zip(questions, spans, nulls, strict=True)]


def _best(
    question: Question, spans: Mapping[tuple[int, int], tuple[float, float]], null: tuple[float, float]
) -> Candidates:
    order = sorted(spans.items(), key=lambda item: (-sum(item[1]), item[0]))[:ANSWERS]
    best = [Candidate(question.context[span[0] : span[1]], span, *logits) for span, logits in order]
    return Candidates(best, Candidate("", (0, 0), *null))
