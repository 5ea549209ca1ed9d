"""Fine-tune with transformers' Trainer for entities, answers or a number: the rival of `benchmarks.tasks`.

Does what transformers' example scripts for these tasks do (run_ner.py, run_qa.py, run_glue.py), in a process of its
own, which needs accelerate. Batches are padded to their longest text, which is faster than the scripts' defaults for
numbers and answers. Reads one argument, the JSON of a `Job`. Prints "step N" as `benchmarks.finetune_peer` does, and
writes what it predicts of the test rows as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import finetune_peer

IGNORED = -100
#: first and last tokens of a window that an answer is sought among, as in run_qa.py; and the tokens of the longest one
BEST, LONGEST = 20, 30

Row = dict[str, Any]


@dataclass(frozen=True)
class Job(finetune_peer.Job):
    """One run of the rival; the fields that the two share mean the same for zerobert."""

    task: str = "regression"
    """or token_classification, question_answering"""
    predictions: str = ""
    """the file to write: a list of numbers, a list of lists of tags, or answers by the questions' ids"""
    stride: int = 0
    """tokens that the windows of a long context share"""


def encode_pairs(rows: Sequence[Row], tokenizer: Any, job: Job) -> dict[str, Any]:
    """Columns of sentence pairs; `labels` is the number."""
    first, second = ([row[name] for row in rows] for name in ("sentence1", "sentence2"))
    encoded = tokenizer(first, second, padding=False, truncation=True, max_length=job.max_length)
    return dict(encoded) | {"labels": [float(row["score"]) for row in rows]}


def encode_tags(rows: Sequence[Row], tokenizer: Any, job: Job, names: Sequence[str]) -> dict[str, Any]:
    """Columns of words; `labels` has the tag at the first piece of each word, `IGNORED` elsewhere."""
    words = [row["tokens"] for row in rows]
    encoded = tokenizer(words, is_split_into_words=True, padding=False, truncation=True, max_length=job.max_length)
    labels = [
        [IGNORED if word is None else names.index(row["ner_tags"][word]) for word in firsts(encoded.word_ids(number))]
        for number, row in enumerate(rows)
    ]
    return dict(encoded) | {"labels": labels}


def firsts(words: Iterable[int | None]) -> list[int | None]:
    """The word of each piece that is the first of it, None for other pieces."""
    found: list[int | None] = []
    before = None
    for word in words:
        found.append(word if word != before else None)
        before = word
    return found


def windows(rows: Sequence[Row], tokenizer: Any, job: Job) -> Any:
    """Questions and pieces of their contexts; `overflow_to_sample_mapping` has the row of each window."""
    questions, contexts = ([row[name] for row in rows] for name in ("question", "context"))
    return tokenizer(
        [question.lstrip() for question in questions],
        contexts,
        padding=False,
        truncation="only_second",
        max_length=job.max_length,
        stride=job.stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def encode_answers(rows: Sequence[Row], tokenizer: Any, job: Job) -> dict[str, Any]:
    """Columns of windows; first and last token of the first answer, 0 where a window lacks a part of it."""
    encoded = windows(rows, tokenizer, job)
    spans = []
    for number, source in enumerate(encoded["overflow_to_sample_mapping"]):
        answers = rows[source]["answers"]
        begin = answers["answer_start"][0]
        spans.append(span(context_offsets(encoded, number), begin, begin + len(answers["text"][0])))
    begins, ends = zip(*spans, strict=True)
    return model_inputs(encoded) | {"start_positions": list(begins), "end_positions": list(ends)}


def model_inputs(encoded: Any) -> dict[str, Any]:
    """The columns that the model reads."""
    return {name: encoded[name] for name in ("input_ids", "token_type_ids", "attention_mask")}


def context_offsets(encoded: Any, window: int) -> list[tuple[int, int] | None]:
    """Where each token is in the context; None for tokens of the question and special ones."""
    sides = encoded.sequence_ids(window)
    pairs = zip(encoded["offset_mapping"][window], sides, strict=True)
    return [offset if side == 1 else None for offset, side in pairs]


def span(offsets: Sequence[tuple[int, int] | None], begin: int, end: int) -> tuple[int, int]:
    """First and last token of the characters from `begin` to before `end`; (0, 0) if some are outside."""
    inside = [place for place, offset in enumerate(offsets) if offset and offset[0] < end and offset[1] > begin]
    known = [offset for offset in offsets if offset]
    if not inside or known[0][0] > begin or known[-1][1] < end:
        return 0, 0
    return inside[0], inside[-1]


def best_answer(context: str, found: Iterable[tuple[Sequence[tuple[int, int] | None], Any, Any]]) -> str:
    """The text of the span with the highest sum of two logits.

    Args:
        found: of each window of the question the offsets, and the logits of first and last token, [tokens] each.
    """
    best, text = float("-inf"), ""
    for offsets, begins, ends in found:
        for first in begins.argsort()[::-1][:BEST]:
            for last in ends.argsort()[::-1][:BEST]:
                if not first <= last < min(first + LONGEST, len(offsets)):
                    continue
                start, stop, score = offsets[first], offsets[last], begins[first] + ends[last]
                if start and stop and score > best:
                    best, text = score, context[start[0] : stop[1]]
    return text


def data_set(columns: dict[str, Any]) -> Any:
    """A data set with the length of each row, by which Trainer may group them."""
    from datasets import Dataset

    return Dataset.from_dict(columns | {"length": [len(ids) for ids in columns["input_ids"]]})


class Task(ABC):
    """What Trainer needs of a task.

    Attributes:
        columns: of the training rows, unpadded.
    """

    columns: dict[str, Any]

    @abstractmethod
    def __init__(self, train: Sequence[Row], tokenizer: Any, job: Job) -> None:
        self.tokenizer, self.job = tokenizer, job

    @abstractmethod
    def model(self) -> Any:
        """transformers' class for the task, its head fresh."""

    def collator(self) -> Any:
        """Pads a batch to its longest row."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(self.tokenizer)

    @abstractmethod
    def predict(self, rows: Sequence[Row], logits: Callable[[dict[str, Any]], Any]) -> Any:
        """What `Job.predictions` is to hold; `logits` gives those of columns."""


class Numbers(Task):
    """A number for a pair of sentences: run_glue.py on STS-B."""

    def __init__(self, train: Sequence[Row], tokenizer: Any, job: Job) -> None:
        super().__init__(train, tokenizer, job)
        self.columns = encode_pairs(train, tokenizer, job)

    def model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(self.job.model, num_labels=1)

    def predict(self, rows: Sequence[Row], logits: Callable[[dict[str, Any]], Any]) -> list[float]:
        columns = encode_pairs(rows, self.tokenizer, self.job)
        return [float(value) for value in logits(columns).reshape(-1)]


class Tags(Task):
    """A tag for each word: run_ner.py. A word of which nothing is left after truncation gets none, O."""

    def __init__(self, train: Sequence[Row], tokenizer: Any, job: Job) -> None:
        super().__init__(train, tokenizer, job)
        self.names = sorted({tag for row in train for tag in row["ner_tags"]})
        self.columns = encode_tags(train, tokenizer, job, self.names)

    def model(self) -> Any:
        from transformers import AutoModelForTokenClassification

        return AutoModelForTokenClassification.from_pretrained(self.job.model, num_labels=len(self.names))

    def collator(self) -> Any:
        from transformers import DataCollatorForTokenClassification

        return DataCollatorForTokenClassification(self.tokenizer)

    def predict(self, rows: Sequence[Row], logits: Callable[[dict[str, Any]], Any]) -> list[list[str]]:
        unlabelled = [row | {"ner_tags": [self.names[0]] * len(row["tokens"])} for row in rows]
        columns = encode_tags(unlabelled, self.tokenizer, self.job, self.names)
        best = logits(columns).argmax(-1)
        found = []
        for row, labels, guesses in zip(rows, columns["labels"], best, strict=True):
            tags = [self.names[guess] for label, guess in zip(labels, guesses, strict=False) if label != IGNORED]
            found.append(tags + ["O"] * (len(row["tokens"]) - len(tags)))
        return found


class Answers(Task):
    """An answer out of a context: run_qa.py."""

    def __init__(self, train: Sequence[Row], tokenizer: Any, job: Job) -> None:
        super().__init__(train, tokenizer, job)
        self.columns = encode_answers(train, tokenizer, job)

    def model(self) -> Any:
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering.from_pretrained(self.job.model)

    def predict(self, rows: Sequence[Row], logits: Callable[[dict[str, Any]], Any]) -> dict[str, str]:
        encoded = windows(rows, self.tokenizer, self.job)
        begins, ends = logits(model_inputs(encoded))
        own: list[list[tuple[Any, Any, Any]]] = [[] for _ in rows]
        for number, source in enumerate(encoded["overflow_to_sample_mapping"]):
            own[source].append((context_offsets(encoded, number), begins[number], ends[number]))
        return {row["id"]: best_answer(row["context"], found) for row, found in zip(rows, own, strict=True)}


TASKS: dict[str, type[Task]] = {"regression": Numbers, "token_classification": Tags, "question_answering": Answers}


def run(job: Job) -> None:
    """Train, and write the predictions of the test rows."""
    import torch
    from transformers import AutoTokenizer, Trainer, set_seed

    torch.set_num_threads(job.threads)
    set_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    task = TASKS[job.task](finetune_peer.read(job.train), tokenizer, job)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=task.model(),
            args=finetune_peer.arguments(job, folder),
            train_dataset=data_set(task.columns),
            data_collator=task.collator(),
            callbacks=[finetune_peer.progress()],
        )
        trainer.train()
        if job.evaluated:
            # Trainer groups the rows that it predicts by length too, and gives the predictions in that order.
            trainer.args.train_sampling_strategy = "random"
            predicted = task.predict(
                finetune_peer.read(job.test), lambda columns: trainer.predict(data_set(columns)).predictions
            )
            Path(job.predictions).write_text(json.dumps(predicted))


def command(python: str, job: Job) -> list[str]:
    """The command line of a job under an interpreter, in the root of the project."""
    return [python, "-m", "benchmarks.tasks_peer", json.dumps(asdict(job))]


if __name__ == "__main__":
    run(Job(**json.loads(sys.argv[1])))
