"""What `benchmarks.tasks` trains on, and how both sides' predictions are scored: by seqeval, SQuAD's rules and scipy.

Nothing here is the engine's, so neither side is measured by its own ruler.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.finetune_peer import read

Row = dict[str, Any]
#: every so many-th document of WikiGold is for the test
WIKIGOLD_PART = 5


@dataclass(frozen=True)
class Trial:
    """A task on one data set.

    Attributes:
        task: as `launch/train.py` calls it.
        recipe: file in launch/recipes.
        rows: training and test rows in a folder of data sets.
        scores: of the test rows and predictions, shares of 1.
        predictions: what a report of zerobert's predicts.
        train_limit, test_limit: rows taken, evenly spread; 0: all.
    """

    task: str
    recipe: str
    rows: Callable[[Path], tuple[list[Row], list[Row]]]
    scores: Callable[[Sequence[Row], Any], dict[str, float]]
    predictions: Callable[[Path], Any]
    max_length: int
    epochs: float
    learning_rate: float
    stride: int = 0
    options: tuple[str, ...] = ()
    train_limit: int = 0
    test_limit: int = 0

    def sample(self, data: Path) -> tuple[list[Row], list[Row]]:
        """Training and test rows, within the limits."""
        train, test = self.rows(data)
        return spread_out(train, self.train_limit), spread_out(test, self.test_limit)


def spread_out(rows: list[Row], limit: int) -> list[Row]:
    """So many rows, evenly spread, or all of them if the limit is 0 or above their number."""
    if not 0 < limit < len(rows):
        return rows
    return [rows[number * len(rows) // limit] for number in range(limit)]


def of_files(train: str, test: str) -> Callable[[Path], tuple[list[Row], list[Row]]]:
    """The rows of two files."""
    return lambda data: (read(str(data / train)), read(str(data / test)))


def wikigold(data: Path) -> tuple[list[Row], list[Row]]:
    """WikiGold, which has no split of its own, split by documents."""
    rows = read(str(data / "wikigold" / "all.jsonl.gz"))
    train = [row for row in rows if row["doc"] % WIKIGOLD_PART]
    return train, [row for row in rows if row["doc"] % WIKIGOLD_PART == 0]


def entities(rows: Sequence[Row], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Micro F1 of entities by seqeval's strict mode, IOB2 (Nakayama 2018)."""
    from seqeval.metrics import f1_score
    from seqeval.scheme import IOB2

    truth = [row["ner_tags"] for row in rows]
    return {"entity F1": float(f1_score(truth, list(map(list, predicted)), mode="strict", scheme=IOB2))}


def correlations(rows: Sequence[Row], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's."""
    from scipy.stats import pearsonr, spearmanr

    truth = [float(row["score"]) for row in rows]
    return {
        "Pearson": float(pearsonr(truth, predicted).statistic),
        "Spearman": float(spearmanr(truth, predicted).statistic),
    }


def answers(rows: Sequence[Row], predicted: Mapping[str, str]) -> dict[str, float]:
    """Exact match and F1 of words, best over the true answers (Rajpurkar et al. 2016, section 6.1)."""
    exact, overlap = [], []
    for row in rows:
        guess = normalised(predicted[row["id"]])
        truths = [normalised(text) for text in row["answers"]["text"]]
        exact.append(max(float(guess == truth) for truth in truths))
        overlap.append(max(word_f1(guess, truth) for truth in truths))
    return {"exact match": statistics.mean(exact), "F1": statistics.mean(overlap)}


def normalised(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces."""
    letters = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())


def word_f1(guess: str, truth: str) -> float:
    """F1 of two normalised texts as bags of words."""
    ours, theirs = guess.split(), truth.split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def tags_of(report: Path) -> list[list[str]]:
    """The predicted tags of each text."""
    texts = (report / "predictions.conll").read_text(encoding="utf-8").strip("\n").split("\n\n")
    return [[line.split("\t")[-1] for line in text.split("\n")] for text in texts]


def numbers_of(report: Path) -> list[float]:
    """The predicted number of each text."""
    with (report / "predictions.tsv").open(encoding="utf-8") as file:
        return [float(row["predicted"]) for row in csv.DictReader(file, delimiter="\t")]


def answers_of(report: Path) -> dict[str, str]:
    """The predicted answer of each question, by its id."""
    found: dict[str, str] = json.loads((report / "predictions.json").read_text(encoding="utf-8"))
    return found


PAIRS = ("--labelled.text=sentence1", "--labelled.text_pair=sentence2", "--labelled.label=score")
TRIALS = {
    "STS-B": Trial(
        "regression", "finetune_regression.yaml", of_files("stsb/train.jsonl.gz", "stsb/test.jsonl.gz"),
        correlations, numbers_of, max_length=128, epochs=2, learning_rate=1e-4, options=PAIRS, train_limit=2000,
    ),
    "WNUT-17": Trial(
        "token_classification", "finetune_tokens.yaml", of_files("wnut17/train.jsonl.gz", "wnut17/test.jsonl.gz"),
        entities, tags_of, max_length=256, epochs=2, learning_rate=1e-4, stride=64,
    ),
    "WikiGold": Trial(
        "token_classification", "finetune_tokens.yaml", wikigold, entities, tags_of, max_length=256, epochs=3,
        learning_rate=1e-4, stride=64,
    ),
    "SQuAD": Trial(
        "question_answering", "finetune_answers.yaml",
        of_files("squad_v1_dev/split_train.jsonl.gz", "squad_v1_dev/split_eval.jsonl.gz"),
        answers, answers_of, max_length=256, epochs=2, learning_rate=1e-4, stride=128, train_limit=2000,
        test_limit=400,
    ),
}  # fmt: skip
