"""Token classification: fine-tune a pre-trained encoder to find entities, whose words carry BIO tags.

Shapes: B windows of a micro-batch, R tokens whose tags are learned or scored, C tags, W words of a split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import RunConfig
from engine.data.augment.eda import KEEPING
from engine.data.augment.source import AugmentedTags
from engine.data.labelled.tagged.encoded import FRAME, TaggedSource, encode_tagged, inside
from engine.data.labelled.tagged.files import (
    read_tagged,
    split_validation,
    tag_ids,
    tag_names,
    tags_by_type,
)
from engine.data.labelled.tagged.summary import describe
from engine.data.labelled.weights import class_weights
from engine.data.loading.source import MicroBatch
from engine.data.tokenizer.check import check_examples, check_vocabulary, open_with_transformers, sample
from engine.errors import UserError
from engine.tasks.distilled.losses import soft_classes
from engine.tasks.finetune import FineTuning, model_inputs, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.losses import class_divergence, class_loss
from engine.tasks.task import Evaluation
from engine.tasks.tokens import report


class TokenClassification(FineTuning):
    """The task of a run that fine-tunes a token classifier.

    Reads and tokenises all its data at once, so that a mistake in it shows before anything is trained.

    Raises:
        UserError: labelled data, a model folder, a length or class weights that cannot be used.
    """

    head = "token_classification"
    operations = KEEPING
    names: tuple[str, ...]
    sources: dict[str, TaggedSource]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labelled = config.labelled
        self.splits = read_splits(
            labelled,
            lambda path: read_tagged(path, labelled.text, labelled.label),
            lambda training: split_validation(training, labelled, config.seed),
        )
        self.names = tag_names(self.splits["train"])
        self.model_config = self.build_config(self.names)
        self.truth = {name: tag_ids(texts, self.names) for name, texts in self.splits.items()}
        self.sources = {name: self._source(number, name) for number, name in enumerate(self.splits)}
        for name, source in self.sources.items():
            if not source.count:
                raise UserError(f"{self.splits[name].path}: the tokenizer leaves nothing of its texts; give others")
        self._check_ids()
        self.check_unknown()

    def _source(self, number: int, name: str) -> TaggedSource:
        labelled, texts, fixed = self.config.labelled, self.splits[name], name != "train"
        windows = encode_tagged(
            self.vocabulary,
            texts.texts,
            texts.words,
            self.truth[name],
            labelled.max_length,
            labelled.overlap,
            every_piece=labelled.label_pieces == "all" and not fixed,
        )
        weights = None
        if labelled.class_weights is not None and not fixed:
            weights = class_weights(labelled.class_weights, self.names, windows.labels, tags_by_type(self.names))
            self.class_weights = torch.from_numpy(weights)
        source = TaggedSource(windows, self.config.seed, fixed, self.group(fixed), number, weights)
        if fixed or self.augmentation is None:
            return source
        given = (texts, self.truth[name], self.augmentation, self.vocabulary, labelled.max_length)
        return AugmentedTags(source, *given)

    def _check_ids(self) -> None:
        """Compare the ids of the first training texts with those that a user of the exported model will get."""
        theirs = open_with_transformers(self.tokenizer)
        if theirs is None:
            return
        check_vocabulary(self.vocabulary, theirs, self.tokenizer)
        texts, length = sample(self.splits["train"].texts), self.config.labelled.max_length
        ids = self.vocabulary.encode_with_special(texts)
        rows = [[self.vocabulary.cls_id, *row[: length - FRAME], self.vocabulary.sep_id] for row in ids]
        check_examples(self.vocabulary, theirs, self.tokenizer, texts, None, rows, length)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and what `engine.data.labelled.tagged.summary.describe` tells."""
        lines = describe(self.splits, self.sources, self.config.labelled.max_length)
        return [*growth_lines(self.config.model.init_from, self.vocabulary), *lines]

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """Share of the mean cross-entropy (nats), weighted by the tags, of the global batch's labelled tokens."""
        weights, smoothing = self.weights_on(logits.device), self.config.labelled.label_smoothing
        loss = class_loss(logits, batch.inputs["labels"], weights=weights, smoothing=smoothing)
        return loss / batch.totals.get("weights", batch.totals["tokens"])

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Share of their accuracy."""
        return {"accuracy": (logits.argmax(dim=-1) == batch.inputs["labels"]).sum() / batch.totals["tokens"]}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        return class_divergence(first, second).sum() / batch.totals["tokens"]

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        return soft_classes(student, teacher, temperature).sum() / batch.totals["tokens"]

    def flops(self, batch: MicroBatch) -> float:
        return self.token_flops(batch)

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Index, split and tag id [R] of each word's first piece, and its logits [R, C]."""
        inputs = batch.inputs
        kept = {"index": inputs["index"], "split": inputs["split"], "truth": inputs["labels"]}
        return {**kept, "logits": model(**model_inputs(batch))}

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """Scores of entities and of tokens.

        A word without a piece of its own is O, or goes on with the entity of the word that it shares a piece with.
        """
        split = list(self.sources)[int(rows["split"][0])]
        windows, truth = self.sources[split].windows, np.concatenate(self.truth[split])
        predicted = np.zeros_like(truth)
        predicted[windows.words[rows["index"]]] = rows["logits"].argmax(axis=1)
        for word in windows.joined.tolist():
            predicted[word] = inside(predicted[word - 1])
        found = report.TaggedPredictions(self.names, self.splits[split], truth, predicted)
        micro = found.counts().scores()
        log_probabilities = torch.from_numpy(rows["logits"]).double().log_softmax(dim=1)
        loss = -log_probabilities.gather(1, torch.from_numpy(rows["truth"])[:, None]).mean()
        scores = {name: micro[name] for name in ("f1", "precision", "recall")}
        accuracy = float((truth == predicted).mean())
        return Evaluation({"loss": float(loss), **scores, "accuracy": accuracy}, records={"predictions": found})

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.tokens.report.report`."""
        return report.report(evaluation, folder, self.config.monitor.texts)
