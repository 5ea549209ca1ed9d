"""Multi-label classification: any number of labels for a text or a pair of texts.

Shapes: B examples of a micro-batch, N of an evaluation, L labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import RunConfig
from engine.data.labelled.sets import read_sets, set_matrix, set_names, split_sets
from engine.data.labelled.summary import NAMED_CLASSES, told_lengths
from engine.data.loading.source import MicroBatch
from engine.model.folder import TUNED, read_origin
from engine.tasks.distilled.losses import soft_labels
from engine.tasks.finetune import model_inputs, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.losses import label_divergence, label_loss
from engine.tasks.reports import multi_label as reports
from engine.tasks.sequence import OnTexts
from engine.tasks.task import Evaluation

#: in an export's zerobert.json, under `TUNED`: the probability from which on an example gets a label, by label
THRESHOLDS = "thresholds"


class MultiLabelClassification(OnTexts):
    """The task of a run that fine-tunes a model with a yes or no for each label.

    Raises:
        UserError: labelled data, a model folder or a length that cannot be used.
    """

    names: tuple[str, ...]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labelled = config.labelled
        splits = read_splits(
            labelled,
            lambda path: read_sets(path, labelled.text, labelled.text_pair, labelled.label, labelled.separator),
            lambda training: split_sets(training, labelled, config.seed),
        )
        self.names = set_names(splits["train"])
        self.model_config = self.build_config(self.names)
        self.model_config.problem_type = "multi_label_classification"
        labels = {split: set_matrix(examples, self.names) for split, examples in splits.items()}
        sets, counts = np.unique(labels["train"], axis=0, return_counts=True)
        self.most_frequent: NDArray[np.bool_] = sets[counts.argmax()]
        self.thresholds: NDArray[np.float64] | None = None
        self.encode(splits, labels)

    def load_export(self, folder: Path) -> nn.Module:
        """The encoder and the head of an exported folder, whose thresholds its evaluation uses."""
        tuned = (read_origin(folder) or {}).get(TUNED, {}).get(THRESHOLDS, {})
        self.thresholds = np.array([tuned.get(name, reports.HALF) for name in self.names])
        return super().load_export(folder)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and labels and lengths of the examples of each split."""
        lines = growth_lines(self.config.model.init_from, self.vocabulary)
        for split, source in self.sources.items():
            counts = source.labels.sum(axis=0)
            order = np.argsort(-counts, kind="stable")
            named = ", ".join(f"{self.names[index]} {counts[index]:,}" for index in order[:NAMED_CLASSES])
            others = len(self.names) - NAMED_CLASSES
            named += f", {others:,} others" if others > 0 else ""
            none = int((~source.labels.any(axis=1)).sum())
            told = f"{source.labels.sum() / source.count:.2f} labels each, {none:,} without any: {named}"
            lengths = told_lengths(source, self.config.labelled.max_length)
            lines.append(f"{split}: {source.count:,} examples: {told}; {lengths}")
            if split == "train" and not counts.all():
                lines.append(f"note: {int((counts == 0).sum())} of {len(self.names)} labels have no training example")
        return lines

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Share of the mean binary cross-entropy (nats) of the global batch's labels."""
        return label_loss(logits, batch.inputs["labels"]) / self._total(batch)

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Share of the labels that are right."""
        right = ((logits > 0) == batch.inputs["labels"]).sum()
        return {"label_accuracy": right / self._total(batch)}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        return label_divergence(first, second) / self._total(batch)

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        return soft_labels(student, teacher, temperature) / self._total(batch)

    def _total(self, batch: MicroBatch) -> float:
        """Labels of all examples of the global batch."""
        return batch.totals["sequences"] * len(self.names)

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index of each example [B], which labels it has and the logit of each [B, L]."""
        index, truth = batch.inputs["index"], batch.inputs["labels"]
        return {"index": index, "truth": truth, "logits": model(**model_inputs(batch))}

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """Scores at the thresholds of a loaded export, and else at those that give each label its best F1 here."""
        truth, logits = rows["truth"], rows["logits"].astype(np.float64)
        probabilities = reports.sigmoid(logits)
        thresholds = reports.tune(truth, probabilities) if self.thresholds is None else self.thresholds
        predictions = reports.Predictions(self.names, self.most_frequent, truth, probabilities, thresholds)
        scalars = {"loss": reports.loss(truth, logits)} | reports.scores(truth, predictions.predicted)
        tuned = {THRESHOLDS: dict(zip(self.names, thresholds.tolist(), strict=True))}
        return Evaluation(scalars, records={"predictions": predictions}, tuned=tuned)

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.reports.multi_label.report`."""
        labelled = self.config.labelled
        return reports.report(evaluation, folder, labelled.separator, tuned_here=labelled.test is None)
