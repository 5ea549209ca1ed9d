"""Answers in a text: fine-tune a pre-trained encoder to find the span of a context that answers a question.

Shapes: B windows of a micro-batch, W of a split, K spans that are kept of each, N questions.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import RunConfig
from engine.data.labelled.answers.encoded import encode_questions
from engine.data.labelled.answers.files import Question, read_questions
from engine.data.labelled.answers.source import AnswerSource, hold_out_contexts
from engine.data.labelled.encoded import framed
from engine.data.loading.source import MicroBatch
from engine.data.tokenizer.check import check_examples, check_vocabulary, open_with_transformers, sample
from engine.errors import UserError
from engine.model.folder import TUNED, read_origin
from engine.model.pretrained import check_segments, load_config
from engine.tasks.answers import report
from engine.tasks.answers.nbest import ANSWERS, THRESHOLD, candidates
from engine.tasks.answers.spans import best_spans, span_divergence, span_losses, spans_apart
from engine.tasks.finetune import FineTuning, model_inputs, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.task import Evaluation

#: beginnings of the heads' parameters in the architectures
HEADS = ("qa_outputs.", "classifier.")


class QuestionAnswering(FineTuning):
    """The task of a run that learns to answer questions from their contexts.

    A head in the folder that was trained for answers is trained on; another one starts fresh.

    Raises:
        UserError: labelled data, a model folder or a length that cannot be used.
    """

    head = "question_answering"
    names = None
    sources: dict[str, AnswerSource]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.model_config = self.build_config()
        self.model_config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # two logits a token, which are no classes
        self.model_config.label2id = {"LABEL_0": 0, "LABEL_1": 1}
        self.fresh = () if self._continues() else HEADS
        check_segments(self.model_config, config.model.init_from, "a question before its context")
        labelled = config.labelled
        splits = read_splits(
            labelled, read_questions, lambda training: hold_out_contexts(training, labelled, config.seed)
        )
        if not any(question.answers for question in splits["train"]):
            raise UserError(f"{labelled.train}: no question to learn from has an answer; give some that have one")
        self.sources = {split: self._source(split, number, splits[split]) for number, split in enumerate(splits)}
        self.null_threshold: float | None = None
        if any(source.unanswerable for source in self.sources.values()):
            self.null_threshold = 0.0
        self._check_ids()
        self.check_unknown()

    def _continues(self) -> bool:
        """Whether the folder's head was trained for answers."""
        found = load_config(self.tokenizer)
        return bool(found.architectures == [self.export_class(self.model_config)])

    def _source(self, split: str, number: int, questions: list[Question]) -> AnswerSource:
        labelled, fixed = self.config.labelled, split != "train"
        windows = encode_questions(framed(self.vocabulary), questions, labelled.max_length, labelled.overlap)
        group = self.group(fixed)
        return AnswerSource(questions, windows, self.config.seed, fixed, group, number)

    def _check_ids(self) -> None:
        """Compare the first windows that show a whole context with what a user of the exported model will get."""
        theirs = open_with_transformers(self.tokenizer)
        if theirs is None:
            return
        check_vocabulary(self.vocabulary, theirs, self.tokenizer)
        source = self.sources["train"]
        whole = np.flatnonzero(np.bincount(source.windows.question) == 1)
        whole = whole[: len(sample(source.questions[number].context for number in whole.tolist()))]
        first = np.searchsorted(source.windows.question, whole).tolist()
        bounds = list(pairwise(source.encoded.offsets.tolist()))
        rows = [source.tokens[slice(*bounds[window])].tolist() for window in first]
        asked = [source.questions[number] for number in whole.tolist()]
        texts, contexts = [question.text for question in asked], [question.context for question in asked]
        limit = self.config.labelled.max_length
        check_examples(self.vocabulary, theirs, self.tokenizer, texts, contexts, rows, limit)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and the questions, contexts and windows of each split."""
        grown = growth_lines(self.config.model.init_from, self.vocabulary)
        return [*grown, *(source.describe_data(split) for split, source in self.sources.items())]

    def load_export(self, folder: Path) -> nn.Module:
        """The encoder and the head of an exported folder; from here on its threshold decides on a test split."""
        if self.null_threshold is not None:
            self.null_threshold = (read_origin(folder) or {}).get(TUNED, {}).get(THRESHOLD, 0.0)
        return super().load_export(folder)

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Share of the mean cross-entropy (nats) of the global batch's windows; see `span_losses`."""
        losses = span_losses(logits, batch.inputs["lengths"], batch.inputs["labels"])
        return losses.sum() / batch.totals["sequences"]

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        return {}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        return span_divergence(first, second, batch.inputs["lengths"]).sum() / batch.totals["sequences"]

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        softened = (student / temperature, teacher / temperature)
        apart = spans_apart(*softened, batch.inputs["lengths"]).sum() * temperature**2
        return apart / batch.totals["sequences"]

    def flops(self, batch: MicroBatch) -> float:
        return self.token_flops(batch)

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index, split and loss [B] of each window, its best spans, their logits [B, K], those of no answer [B, 2]."""
        inputs, logits = batch.inputs, model(**model_inputs(batch))
        lengths = inputs["lengths"]
        spans = best_spans(logits, lengths, inputs["context"], ANSWERS, self.config.labelled.max_answer_length)
        return {
            "index": inputs["index"],
            "split": inputs["split"],
            "loss": span_losses(logits, lengths, inputs["labels"]),
            "null": logits[lengths.cumsum(0) - lengths],
            **vars(spans),
        }

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """SQuAD's scores; of validation questions without answer the threshold is the one that gives the highest F1."""
        split = list(self.sources)[int(rows["split"][0])]
        source = self.sources[split]
        found = candidates(source.questions, source.windows, rows)
        chosen = self.sources["validation"].unanswerable > 0
        reason = "chosen on the validation questions" if chosen else "for each validation question has an answer"
        answers = report.Answers.of(source.questions, found, self.null_threshold, reason)
        if split == "validation" and source.unanswerable:
            answers = answers.tuned()
        tuned = {} if answers.threshold is None else {THRESHOLD: answers.threshold}
        loss = float(rows["loss"].astype(np.float64).mean())
        return Evaluation({"loss": loss, **answers.scores()}, records={"answers": answers}, tuned=tuned)

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.answers.report.report`."""
        return report.report(evaluation, folder, self.config.monitor.texts)
