"""Regression: a number for a text or a pair of texts, such as how alike two sentences are.

Shapes: B examples of a micro-batch, N of an evaluation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import dist
from engine.config import RunConfig
from engine.data.labelled.classes import split_any
from engine.data.labelled.files import read_examples
from engine.data.labelled.scores import check_spread, numbers
from engine.data.labelled.summary import told_lengths
from engine.data.loading.source import MicroBatch
from engine.tasks.finetune import model_inputs, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.losses import squared_error
from engine.tasks.reports import regression as reports
from engine.tasks.sequence import OnTexts
from engine.tasks.task import Evaluation


class Regression(OnTexts):
    """The task of a run that fine-tunes a model with one output, in the labels' own unit.

    Raises:
        UserError: labelled data, a model folder or a length that cannot be used.
    """

    names = None

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labelled = config.labelled
        splits = read_splits(
            labelled,
            lambda path: read_examples(path, labelled.text, labelled.text_pair, labelled.label),
            lambda training: split_any(training, labelled, config.seed),
        )
        labels = {split: numbers(examples) for split, examples in splits.items()}
        check_spread(splits["train"], labels["train"])
        self.mean = float(labels["train"].mean(dtype=np.float64))
        self.model_config = self.build_config((labelled.label,))
        self.model_config.problem_type = "regression"
        self.encode(splits, labels)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and numbers and lengths of the examples of each split."""
        lines = growth_lines(self.config.model.init_from, self.vocabulary)
        for split, source in self.sources.items():
            low, high, mean, spread = (float(f(source.labels)) for f in (np.min, np.max, np.mean, np.std))
            told = f"numbers from {low:g} to {high:g}, mean {mean:.4g}, standard deviation {spread:.4g}"
            lengths = told_lengths(source, self.config.labelled.max_length)
            lines.append(f"{split}: {source.count:,} examples: {told}; {lengths}")
        return lines

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Share of the mean squared error of the global batch."""
        return squared_error(logits, batch.inputs["labels"]) / batch.totals["sequences"]

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Share of the mean absolute error."""
        return {"mae": (logits.squeeze(1) - batch.inputs["labels"]).abs().sum() / batch.totals["sequences"]}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        """The squared difference: to a squared error what the divergence of probabilities is to a cross-entropy."""
        return squared_error(first, second.squeeze(1)) / batch.totals["sequences"]

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        return squared_error(student, teacher.squeeze(1)) / batch.totals["sequences"]

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index, true and predicted number [B] of each example."""
        predicted: Tensor = model(**model_inputs(batch))
        return {"index": batch.inputs["index"], "truth": batch.inputs["labels"], "predicted": predicted.squeeze(1)}

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """Correlations and errors, and on rank 0 a scatter of true and predicted numbers as a picture."""
        truth, predicted = rows["truth"].astype(np.float64), rows["predicted"].astype(np.float64)
        predictions = reports.Predictions(self.mean, truth, predicted)
        images = {}
        if self.config.monitor.tensorboard and dist.place()[0] == 0:
            images["scatter"] = reports.scatter_picture(truth, predicted)
        return Evaluation(reports.scores(truth, predicted), images=images, records={"predictions": predictions})

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.reports.regression.report`."""
        return reports.report(evaluation, folder)
