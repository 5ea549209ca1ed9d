"""The scores and the final report of answers: predictions in SQuAD's official formats. Shapes: N questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.answers.files import Question
from engine.durable import write_atomically
from engine.tasks.answers.nbest import Candidate, Candidates
from engine.tasks.answers.squad import best_scores, tune_threshold
from engine.tasks.outcomes import interval, write_outcomes
from engine.tasks.report import accuracy_interval
from engine.tasks.task import Evaluation


@dataclass(frozen=True)
class Answers:
    """What a model said of N questions, in the order of their file."""

    questions: Sequence[Question]
    candidates: list[Candidates]
    answered: NDArray[np.float64]
    """exact match and F1 of each question's best answer, [N, 2]"""
    empty: NDArray[np.float64]
    """exact match and F1 of no answer, [N, 2]"""
    threshold: float | None
    """odds of no answer above which none is given; None always gives one"""
    reason: str = ""
    """where the threshold comes from, in a few words"""

    @classmethod
    def of(
        cls, questions: Sequence[Question], found: list[Candidates], threshold: float | None, reason: str = ""
    ) -> Answers:
        """Score the best answer of each question, and none."""
        pairs = list(zip(questions, found, strict=True))
        true = [[answer.text for answer in question.answers] for question in questions]
        answered = [best_scores(each.answer(None), texts) for (_, each), texts in zip(pairs, true, strict=True)]
        empty = [best_scores("", texts) for texts in true]
        return cls(questions, found, np.array(answered), np.array(empty), threshold, reason)

    def tuned(self) -> Answers:
        """The same with the threshold of the highest F1."""
        threshold = tune_threshold(self.odds, self.answered[:, 1], self.empty[:, 1])
        return replace(self, threshold=threshold, reason="chosen on these questions")

    @property
    def odds(self) -> NDArray[np.float64]:
        """Of no answer, [N]."""
        return np.array([each.odds for each in self.candidates])

    @property
    def per_question(self) -> NDArray[np.float64]:
        """Exact match and F1 of what is given, [N, 2]."""
        if self.threshold is None:
            return self.answered
        return np.where((self.odds > self.threshold)[:, None], self.empty, self.answered)

    @property
    def answerable(self) -> NDArray[np.bool_]:
        """Which questions have an answer, [N]."""
        return np.array([bool(question.answers) for question in self.questions])

    def given(self) -> dict[str, Candidate]:
        """The answer that each question gets, by its id; the empty one for none."""
        pairs = zip(self.questions, self.candidates, strict=True)
        return {question.id: each.chosen(self.threshold) for question, each in pairs}

    def scores(self) -> dict[str, float]:
        """Mean exact match and F1, 0 to 1; where there are questions without answer, also of each kind."""
        each, has = self.per_question, self.answerable
        scores = {"f1": float(each[:, 1].mean()), "exact_match": float(each[:, 0].mean())}
        if has.all():
            return scores
        if has.any():
            scores |= {
                "has_answer_f1": float(each[has, 1].mean()),
                "has_answer_exact_match": float(each[has, 0].mean()),
            }
        return scores | {"no_answer_accuracy": float(each[~has, 0].mean())}


def report(evaluation: Evaluation, folder: Path, texts: bool = True) -> str:
    """Write report.txt, report.json, predictions.json, nbest_predictions.json, outcomes.tsv and, with questions without
    answer, null_odds.json into `folder`.

    The official evaluate-v2.0.py takes predictions.json and null_odds.json as they are.

    Args:
        evaluation: of `QuestionAnswering.evaluate`; its record "answers" is what the report is made of.
        folder: made where it is missing.
        texts: whether to write what the answers say; else where they start and stop in their context, in characters.

    Returns:
        The text of report.txt.
    """
    answers: Answers = evaluation.records["answers"]
    summary = summarise(answers) | {"scores": evaluation.scalars}
    text = render(summary)
    folder.mkdir(parents=True, exist_ok=True)
    predictions = {key: each.text if texts else each.span for key, each in answers.given().items()}
    files: dict[str, Any] = {"predictions.json": predictions, "nbest_predictions.json": nbest(answers, texts)}
    if answers.threshold is not None:
        ids = [question.id for question in answers.questions]
        files["null_odds.json"] = dict(zip(ids, answers.odds.tolist(), strict=True))
    for name, content in (files | {"report.json": summary}).items():
        write_atomically(folder / name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_outcomes(folder, *outcomes(answers))
    write_atomically(folder / "report.txt", text)
    return text


def nbest(answers: Answers, texts: bool = True) -> dict[str, list[dict[str, Any]]]:
    """The best answers of each question by its id, falling; the empty text is no answer."""
    null = answers.threshold is not None
    return {
        question.id: [
            {
                **({"text": each.text} if texts else {"span": each.span}),
                "probability": share,
                "start_logit": each.start_logit,
                "end_logit": each.end_logit,
            }
            for each, share in found.ranked(null)
        ]
        for question, found in zip(answers.questions, answers.candidates, strict=True)
    }


def outcomes(answers: Answers) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """Each question with where its true answers are, and its scores; see `engine.tasks.outcomes`."""
    true = [json.dumps([each.id, *(answer.span for answer in each.answers)]) for each in answers.questions]
    exact, f1 = answers.per_question.T
    return true, {"f1": f1, "exact_match": exact}


def summarise(answers: Answers) -> dict[str, Any]:
    """The report as plain values, ready for JSON."""
    total, has = len(answers.questions), answers.answerable
    exact = int(answers.per_question[:, 0].sum())
    summary: dict[str, Any] = {
        "questions": total,
        "exact_match": exact / total,
        "exact_match_interval_95": list(accuracy_interval(exact, total)),
        "f1_interval_95": list(interval("f1", answers.per_question[:, 1:])),
    }
    if answers.threshold is None:
        return summary
    return summary | {
        "with_answer": int(has.sum()),
        "without_answer": int((~has).sum()),
        "null_threshold": answers.threshold,
        "null_threshold_reason": answers.reason,
    }


def render(summary: dict[str, Any]) -> str:
    """The report as text."""
    scores, (low, high) = summary["scores"], summary["exact_match_interval_95"]
    f1_low, f1_high = summary["f1_interval_95"]
    lines = [
        f"exact match {summary['exact_match']:.4f} (95 % interval {low:.4f} to {high:.4f}), F1 {scores['f1']:.4f} "
        f"({f1_low:.4f} to {f1_high:.4f}) on {summary['questions']:,} questions"
    ]
    if "has_answer_f1" in scores and "no_answer_accuracy" in scores:
        lines.append(
            f"{summary['with_answer']:,} with an answer: exact match {scores['has_answer_exact_match']:.4f}, "
            f"F1 {scores['has_answer_f1']:.4f}"
        )
    if "no_answer_accuracy" in scores:
        lines.append(f"{summary['without_answer']:,} without: {scores['no_answer_accuracy']:.4f} got none")
    if "null_threshold" in summary:
        told = f"{summary['null_threshold']:.4f}, {summary['null_threshold_reason']}"
        lines.append(f"no answer where its odds are above {told}")
    return "".join(f"{line}\n" for line in lines)
