"""Sequence classification: fine-tune a pre-trained encoder on labelled texts or pairs of texts.

Shapes: B examples of a micro-batch, N of an evaluation, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import dist
from engine.config import RunConfig
from engine.data.augment.source import AugmentedSource
from engine.data.labelled.classes import check_order, class_ids, class_names, split_validation
from engine.data.labelled.encoded import LabelledSource, encode
from engine.data.labelled.files import Examples, read_examples
from engine.data.labelled.summary import describe
from engine.data.labelled.transfer import TransferSource, read_texts
from engine.data.labelled.weights import class_weights
from engine.data.loading.source import MicroBatch, SampleSource
from engine.model.pretrained import check_segments
from engine.tasks import report
from engine.tasks.distilled.losses import soft_classes
from engine.tasks.finetune import FineTuning, model_inputs, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.identity import Fact
from engine.tasks.losses import class_divergence, class_loss
from engine.tasks.task import Evaluation


class OnTexts(FineTuning):
    """A task that learns something of each text or pair: its class, a number, several labels.

    Reads and tokenises all its data at once, so that a mistake in it shows before anything is trained.
    """

    head = "sequence_classification"
    sources: dict[str, LabelledSource]

    def encode(
        self,
        splits: Mapping[str, Examples],
        labels: Mapping[str, NDArray[Any]],
        weights: NDArray[np.float32] | None = None,
    ) -> None:
        """Encode and check the examples, once `model_config` is there.

        Args:
            splits: the examples of "train", "validation" and perhaps "test".
            labels: what is learned of the examples of each.
            weights: what each training example counts, see `LabelledSource`.

        Raises:
            UserError: a model or tokenizer that doesn't fit them.
        """
        if self.config.labelled.text_pair:
            check_segments(self.model_config, self.config.model.init_from, "labelled.text_pair")
        self.sources = {
            split: self._source(examples, labels[split], None if split != "train" else weights, fixed=split != "train")
            for split, examples in splits.items()
        }
        self.transfer = self._transfer()
        self.check_ids(splits["train"].texts, splits["train"].pairs)
        self.check_unknown()

    def _transfer(self) -> TransferSource | None:
        """The training examples with the texts without labels of distil.texts; None where there are none."""
        path, labelled = self.config.distil.texts, self.config.labelled
        if path is None:
            return None
        texts = read_texts(path, labelled.text, labelled.text_pair)
        encoded = encode(self.vocabulary, texts.texts, texts.pairs, labelled.max_length)
        return TransferSource(self.sources["train"], encoded)

    def train_source(self) -> SampleSource:
        """The training examples, and the texts of distil.texts."""
        return self.transfer or super().train_source()

    def facts(self) -> list[Fact]:
        """Also the texts that have no labels."""
        told = None if self.transfer is None else self.transfer.texts_fingerprint
        return [*super().facts(), Fact("texts without labels", "distil.texts", told)]

    def describe_model(self) -> list[str]:
        """Also the texts that have no labels."""
        if self.transfer is None:
            return super().describe_model()
        count = int((~self.transfer.known).sum())
        told = f"{self.config.distil.texts}: {count:,} texts without labels beside the training examples"
        return [*super().describe_model(), told]

    def _source(
        self, examples: Examples, labels: NDArray[Any], weights: NDArray[np.float32] | None, fixed: bool
    ) -> LabelledSource:
        encoded = encode(self.vocabulary, examples.texts, examples.pairs, self.config.labelled.max_length)
        source = LabelledSource(encoded, labels, self.config.seed, fixed, self.group(fixed), weights)
        if fixed or self.augmentation is None:
            return source
        return AugmentedSource(source, examples, self.augmentation, self.vocabulary, self.config.labelled.max_length)


class SequenceClassification(OnTexts):
    """The task of a run that fine-tunes a classifier.

    Raises:
        UserError: labelled data, a model folder, a length or class weights that cannot be used.
    """

    names: tuple[str, ...]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labelled = config.labelled
        splits = read_splits(
            labelled,
            lambda path: read_examples(path, labelled.text, labelled.text_pair, labelled.label),
            lambda training: split_validation(training, labelled, config.seed),
        )
        self.names = class_names(splits["train"], drawn=labelled.limit is not None)
        self.ordinal = labelled.loss == "ordinal"
        if self.ordinal:
            check_order(splits["train"], self.names)
        self.model_config = self.build_config(self.names)
        labels = {split: class_ids(examples, self.names) for split, examples in splits.items()}
        self.majority = int(np.bincount(labels["train"]).argmax())
        weights = None
        if labelled.class_weights is not None:
            of_classes = class_weights(labelled.class_weights, self.names, labels["train"])
            self.class_weights, weights = torch.from_numpy(of_classes), of_classes[labels["train"]]
        self.encode(splits, labels, weights)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and what `engine.data.labelled.summary.describe` tells."""
        lines = describe(self.names, self.sources, self.config.labelled.max_length)
        return [*growth_lines(self.config.model.init_from, self.vocabulary), *lines]

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Share of the global batch's mean `class_loss`, weighted by the classes."""
        weights, smoothing = self.weights_on(logits.device), self.config.labelled.label_smoothing
        labels = batch.inputs["labels"]
        loss = class_loss(logits, labels, weights=weights, smoothing=smoothing, ordinal=self.ordinal)
        return loss / batch.totals.get("weights", batch.totals["sequences"])

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Share of the accuracy."""
        return {"accuracy": (logits.argmax(dim=-1) == batch.inputs["labels"]).sum() / batch.totals["sequences"]}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        return class_divergence(first, second).sum() / batch.totals["sequences"]

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        return soft_classes(student, teacher, temperature).sum() / batch.totals["sequences"]

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index and class id [B] of each example, and its logits [B, C]."""
        index, truth = batch.inputs["index"], batch.inputs["labels"]
        return {"index": index, "truth": truth, "logits": model(**model_inputs(batch))}

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """Scores, and on rank 0 the confusion matrix as a picture."""
        log_probabilities = torch.from_numpy(rows["logits"]).double().log_softmax(dim=1).numpy()
        predictions = report.Predictions(self.names, self.majority, rows["truth"], np.exp(log_probabilities))
        images = {}
        if self.config.monitor.tensorboard and dist.place()[0] == 0:  # drawing takes longer than the scores
            images["confusion_matrix"] = report.confusion_picture(predictions.confusion, self.names)
        scalars = scores(predictions.truth, log_probabilities)
        if self.ordinal:
            scalars |= ordinal_scores(predictions.truth, predictions.predicted, len(self.names))
        return Evaluation(
            scalars=scalars,
            images=images,
            records={"predictions": predictions},
        )

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.report.report`."""
        return report.report(evaluation, folder)


def scores(truth: NDArray[np.int64], log_probabilities: NDArray[np.float64]) -> dict[str, float]:
    """Mean cross-entropy (nats), accuracy, macro F1 and Matthews correlation of predictions.

    Args:
        truth: class ids [N].
        log_probabilities: [N, C].
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = log_probabilities.argmax(axis=1)
    return {
        "loss": float(-log_probabilities[np.arange(len(truth)), truth].mean()),
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(truth, predicted)),
    }


def ordinal_scores(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> dict[str, float]:
    """Quadratic weighted kappa (Cohen 1968) and mean absolute error in ranks of classes in order.

    Kappa is 1 where truth and predictions are all of the same class.

    Args:
        truth, predicted: class ids [N].
        classes: number of classes.
    """
    from sklearn.metrics import cohen_kappa_score

    same = len(np.union1d(truth, predicted)) == 1
    kappa = 1.0 if same else cohen_kappa_score(truth, predicted, labels=range(classes), weights="quadratic")
    return {"quadratic_kappa": float(kappa), "rank_error": float(np.abs(truth - predicted).mean())}
