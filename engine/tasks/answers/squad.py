"""SQuAD's scores: exact match and F1 of answers, and the threshold above which there is none.

Rajpurkar et al. 2016 (section 5) and 2018; as their scripts evaluate-v1.1.py and evaluate-v2.0.py compute them, but
as shares instead of percent.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(answer: str) -> str:
    """An answer in lower case, without punctuation and articles, with single spaces.

    >>> normalise("The  Apollo-11 mission.")
    'apollo11 mission'
    """
    return " ".join(_ARTICLES.sub(" ", answer.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(predicted: str, true: str) -> float:
    """1 where two answers are the same once normalised, else 0."""
    return float(normalise(predicted) == normalise(true))


def f1(predicted: str, true: str) -> float:
    """Harmonic mean of precision and recall of the predicted words; no answer is right where none is true.

    >>> f1("the red house", "a red house here")
    0.8
    """
    ours, theirs = normalise(predicted).split(), normalise(true).split()
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2.0 * same / (len(ours) + len(theirs))


def best_scores(predicted: str, true: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 with the true answer that gives most of each; none, or none but articles: the empty answer."""
    wanted = [answer for answer in true if normalise(answer)] or [""]
    return max(exact_match(predicted, answer) for answer in wanted), max(f1(predicted, answer) for answer in wanted)


def tune_threshold(odds: NDArray[np.float64], answered: NDArray[np.float64], empty: NDArray[np.float64]) -> float:
    """The score of no answer, less that of the best answer, above which a question should get none.

    It gives the highest mean score, the lowest of equal ones, and lies halfway between two questions.

    Args:
        odds: that difference of each question, [N].
        answered: its score when the best answer is given, [N].
        empty: its score when none is given, [N].
    """
    order = np.argsort(odds, kind="stable")
    levels = odds[order]
    # entry i: the i questions of the lowest odds are answered
    gains = np.concatenate([[0.0], np.cumsum((answered - empty)[order])])
    cuts = np.concatenate([[levels[0] - 1.0], (levels[1:] + levels[:-1]) / 2.0, [levels[-1] + 1.0]])
    # questions of equal odds get an answer together or not at all
    possible = np.concatenate([[True], levels[1:] > levels[:-1], [True]])
    return float(cuts[int(np.where(possible, gains, -np.inf).argmax())])
