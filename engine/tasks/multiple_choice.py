"""Multiple choice: which of a question's options is right.

Shapes: Q questions of a micro-batch, N of an evaluation, S sequences (a question with an option each), O options of the
question that has most. Questions may have different numbers of options: nothing is padded but the grid of logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import RunConfig
from engine.data.labelled.choices import ChoiceSource, Questions, read_questions, split_questions
from engine.data.labelled.encoded import encode
from engine.data.labelled.summary import told_lengths
from engine.data.loading.source import MicroBatch
from engine.model.pretrained import check_segments
from engine.tasks.distilled.losses import soft_classes
from engine.tasks.finetune import FineTuning, model_inputs, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.losses import choice_grid, class_divergence
from engine.tasks.reports import multiple_choice as reports
from engine.tasks.task import Evaluation


class MultipleChoice(FineTuning):
    """The task of a run that fine-tunes a model with one logit an option.

    Reads and tokenises all its data at once, so that a mistake in it shows before anything is trained.

    Raises:
        UserError: labelled data, a model folder or a length that cannot be used.
    """

    head = "multiple_choice"
    names = None
    sources: dict[str, ChoiceSource]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labelled = config.labelled
        splits = read_splits(
            labelled,
            lambda path: read_questions(path, labelled.text, labelled.text_pair, labelled.options, labelled.label),
            lambda training: split_questions(training, labelled, config.seed),
        )
        self.model_config = self.build_config()
        check_segments(self.model_config, config.model.init_from, "task multiple_choice")
        self.sources = {split: self._source(questions, split) for split, questions in splits.items()}
        self.sequences_per_sample = max(int(source.counts.max()) for source in self.sources.values())
        self.frequent = int(np.bincount(self.sources["train"].labels).argmax())
        self.check_ids(*splits["train"].sequences())
        self.check_unknown()

    def _source(self, questions: Questions, split: str) -> ChoiceSource:
        labelled, fixed = self.config.labelled, split != "train"
        encoded = encode(self.vocabulary, *questions.sequences(), labelled.max_length)
        counts = [len(options) for options in questions.options]
        group = self.group(fixed)
        return ChoiceSource(encoded, counts, questions.right, self.config.seed, fixed, group)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and options and lengths of the questions of each split."""
        lines = growth_lines(self.config.model.init_from, self.vocabulary)
        for split, source in self.sources.items():
            least, most = int(source.counts.min()), int(source.counts.max())
            options = f"{least} options each" if least == most else f"{least} to {most} options"
            lengths = told_lengths(source, self.config.labelled.max_length)
            lines.append(f"{split}: {source.count:,} questions: {options}; of a question with an option, {lengths}")
        return lines

    def _grid(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """The logits [S, 1] as those of each question's options, [Q, O]; -inf where it has no such option."""
        inputs = batch.inputs
        places = (inputs["question"], inputs["option"], len(inputs["labels"]))
        return choice_grid(logits, *places, self.sequences_per_sample)

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Share of the mean cross-entropy (nats) of the global batch's questions."""
        loss = nn.functional.cross_entropy(self._grid(logits, batch), batch.inputs["labels"], reduction="sum")
        return loss / batch.totals["questions"]

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Share of their accuracy."""
        correct = (self._grid(logits, batch).argmax(dim=-1) == batch.inputs["labels"]).sum()
        return {"accuracy": correct / batch.totals["questions"]}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        apart = class_divergence(self._grid(first, batch), self._grid(second, batch))
        return apart.sum() / batch.totals["questions"]

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        own, told = (self._grid(logits, batch) for logits in (student, teacher))
        return soft_classes(own, told, temperature).sum() / batch.totals["questions"]

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index and right option [Q] of each question, and the logits of its options [Q, O]."""
        return {
            "index": batch.inputs["index"],
            "truth": batch.inputs["labels"],
            "logits": self._grid(model(**model_inputs(batch)), batch),
        }

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """Accuracy and mean cross-entropy (nats)."""
        log_probabilities = torch.from_numpy(rows["logits"]).double().log_softmax(dim=1).numpy()
        counts = np.isfinite(rows["logits"]).sum(axis=1)
        predictions = reports.Predictions(self.frequent, rows["truth"], np.exp(log_probabilities), counts)
        loss = -log_probabilities[np.arange(len(predictions.truth)), predictions.truth].mean()
        accuracy = (predictions.predicted == predictions.truth).mean()
        return Evaluation({"loss": float(loss), "accuracy": float(accuracy)}, records={"predictions": predictions})

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.reports.multiple_choice.report`."""
        return reports.report(evaluation, folder)
