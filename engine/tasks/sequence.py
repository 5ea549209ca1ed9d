"""Sequence classification: fine-tune a pre-trained encoder on labelled texts or pairs of texts.

Shapes: B examples of a micro-batch, N of an evaluation, C classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from engine import dist
from engine.config import LabelledConfig, RunConfig, architecture_of, require
from engine.data.labelled.files import Examples, read_examples
from engine.data.labelled.source import LabelledSource, class_ids, class_names, encode, split_validation
from engine.data.labelled.summary import describe
from engine.data.loading.source import MicroBatch
from engine.data.tokenizer.check import check_examples, check_vocabulary, open_with_transformers, sample
from engine.data.tokenizer.unknown import check_unknown, count_unknown, share
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.hub import local_folder
from engine.model.build import build_config, initialise
from engine.model.pretrained import LoadReport, check_segments, load_pretrained
from engine.tasks import report
from engine.tasks.grow import growth_lines
from engine.tasks.identity import Fact, base_weights
from engine.tasks.task import Evaluation, StepOutput, Task


class SequenceClassification(Task):
    """The task of a run that fine-tunes a classifier.

    Reads and tokenises all its data at once, so that a mistake in it shows before anything is trained.

    Raises:
        UserError: labelled data, a model folder or a length that cannot be used.
    """

    head = "sequence_classification"

    def __init__(self, config: RunConfig) -> None:
        assert config.model.init_from is not None
        self.config = config
        self.tokenizer = local_folder(config.model.init_from)
        self.best_metric: str | None = config.labelled.metric
        self.higher_is_better = config.labelled.metric != "loss"
        self.evaluation_samples = 0
        self.vocabulary = load_tokenizer(self.tokenizer)
        self._check_length()
        splits = read_splits(config.labelled, config.seed)
        self.names = class_names(splits["train"])
        self.model_config = self._build_config(self.names)
        self.architecture = architecture_of(self.model_config)
        self.loaded: LoadReport | None = None
        if config.labelled.text_pair:
            check_segments(self.model_config, config.model.init_from, "labelled.text_pair")
        labels = {split: class_ids(examples, self.names) for split, examples in splits.items()}
        self.majority = int(np.bincount(labels["train"]).argmax())
        self.sources = {
            split: self._source(examples, labels[split], fixed=split != "train") for split, examples in splits.items()
        }
        self._check_ids(splits["train"])
        self._check_unknown()

    @classmethod
    def export_class(cls, config: Any) -> str:
        """That of the architecture for a classifier on the pooled vector."""
        return architecture_of(config).class_for(cls.head)

    def _build_config(self, names: tuple[str, ...] | None = None) -> Any:
        words = self.vocabulary
        return build_config(self.config.model, words.vocab_size, words.pad_id, names, words.listed)

    def _check_length(self) -> None:
        config = self._build_config()
        limit = architecture_of(config).positions(config)
        length = self.config.labelled.max_length
        remedy = f"{self.config.model.init_from} has {limit} positions: give at most {limit}"
        require(length <= limit, "labelled.max_length", length, remedy)
        longest = self.vocabulary.max_length
        remedy = f"model_max_length is {longest} in {self.tokenizer}/tokenizer_config.json: give at most that"
        require(longest is None or length <= longest, "labelled.max_length", length, remedy)

    def _check_ids(self, examples: Examples) -> None:
        """Compare the ids of the first training examples with those that a user of the exported model will get."""
        theirs = open_with_transformers(self.tokenizer)
        if theirs is None:
            return
        check_vocabulary(self.vocabulary, theirs, self.tokenizer)
        count = len(sample(examples.texts))
        texts, pairs = examples.texts[:count], None if examples.pairs is None else examples.pairs[:count]
        encoded = self.sources["train"].encoded
        rows = [encoded.tokens[start:stop].tolist() for start, stop in pairwise(encoded.offsets[: count + 1])]
        check_examples(self.vocabulary, theirs, self.tokenizer, texts, pairs, rows, self.config.labelled.max_length)

    def _check_unknown(self) -> None:
        """Say how much of the texts the tokenizer doesn't know, and refuse too much of it."""
        counts = {name: count_unknown(self.vocabulary, source.encoded.tokens) for name, source in self.sources.items()}
        bound = self.config.labelled.max_unknown_share
        check_unknown(*counts["train"], bound, "the training examples", "labelled.max_unknown_share")
        if dist.place()[0] == 0:
            shares = ", ".join(f"{name} {share(*count):.2%}" for name, count in counts.items())
            print(f"[UNK] among word pieces: {shares}", flush=True)

    def _source(self, examples: Examples, labels: NDArray[np.int64], fixed: bool) -> LabelledSource:
        encoded = encode(self.vocabulary, examples.texts, examples.pairs, self.config.labelled.max_length)
        group = self.config.train.global_batch if self.config.labelled.group_by_length and not fixed else None
        return LabelledSource(encoded, labels, self.config.seed, fixed, group)

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, and what `engine.data.labelled.summary.describe` tells."""
        lines = describe(self.names, self.sources, self.config.labelled.max_length)
        return [*growth_lines(self.config.model.init_from, self.vocabulary), *lines]

    def build_model(self) -> nn.Module:
        """The pre-trained encoder under a fresh classifier."""
        model = self._new_model()
        initialise(model, self.config.seed)
        # a classifier in the folder was trained for classes that need not be these, even when there are as many
        self.loaded = load_pretrained(model, self.tokenizer, without=("classifier.",))
        return model

    def load_export(self, folder: Path) -> nn.Module:
        """The encoder and the classifier of an exported folder."""
        model = self._new_model()
        load_pretrained(model, folder)
        return model

    def _new_model(self) -> nn.Module:
        return self.architecture.build(self.head, self.model_config, self.config.model.activation_checkpointing)

    def facts(self) -> list[Fact]:
        """Classes, tokenizer, the encoded examples that are learned and that choose the best, and the base weights."""
        test = self.sources.get("test")
        return [
            Fact("classes", "labelled.train", list(self.names)),
            Fact("tokenizer's rules and pieces", "model.init_from", self.vocabulary.fingerprint),
            Fact("training examples", "labelled.train", self.sources["train"].fingerprint),
            Fact("validation examples", "labelled.validation", self.sources["validation"].fingerprint),
            Fact("test examples", "labelled.test", test.fingerprint if test else None, fixed=False),
            Fact("base weights", "model.init_from", base_weights(self.config.model.init_from)),
        ]

    def train_source(self) -> LabelledSource:
        return self.sources["train"]

    def evaluation_source(self, split: str) -> LabelledSource | None:
        """The examples of "validation" or "test" in the order of their file; None without labelled.test."""
        return self.sources.get(split)

    def step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        """Shares of the mean cross-entropy (nats) and of the accuracy of the global batch."""
        output = model(**model_inputs(batch))
        total = batch.totals["sequences"]
        correct = (output["logits"].detach().argmax(dim=-1) == batch.inputs["labels"]).sum()
        return StepOutput(output["loss_sum"] / total, {"accuracy": correct / total})

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[MicroBatch]) -> Evaluation:
        """Classify this rank's batches, and score the examples of all ranks; collective.

        Dropout is off meanwhile. Scores don't depend on how the examples were spread over ranks and batches.
        """
        training = model.training
        model.eval()
        index, truth, logits = [], [], [np.zeros((0, len(self.names)), dtype=np.float32)]
        for batch in batches:
            output = model(**model_inputs(batch))
            # ranks must run equally many forward passes (ZeRO-3 gathers parameters in each); dummies only fill up
            if not batch.dummy:
                index.append(_array(batch.inputs["index"]))
                truth.append(_array(batch.inputs["labels"]))
                logits.append(_array(output["logits"].float()))
        model.train(training)
        return self._score(*(_gather(parts) for parts in (index, truth, logits)))

    def _score(self, index: NDArray[Any], truth: NDArray[Any], logits: NDArray[Any]) -> Evaluation:
        order = np.argsort(index)
        log_probabilities = torch.from_numpy(logits[order]).double().log_softmax(dim=1).numpy()
        predictions = report.Predictions(self.names, self.majority, truth[order], np.exp(log_probabilities))
        images = {}
        if self.config.monitor.tensorboard and dist.place()[0] == 0:  # drawing takes longer than the scores
            images["confusion_matrix"] = report.confusion_picture(predictions.confusion, self.names)
        return Evaluation(
            scalars=scores(predictions.truth, log_probabilities),
            images=images,
            records={"predictions": predictions},
        )

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.report.report`."""
        return report.report(evaluation, folder)


def read_splits(labelled: LabelledConfig, seed: int) -> dict[str, Examples]:
    """The examples of "train", "validation" (a tenth of the training examples unless given) and, if given, "test"."""

    def read(path: str) -> Examples:
        return read_examples(path, labelled.text, labelled.text_pair, labelled.label)

    assert labelled.train is not None
    training = read(labelled.train)
    if labelled.validation is None:
        training, validation = split_validation(training, seed)
    else:
        validation = read(labelled.validation)
    splits = {"train": training, "validation": validation}
    return splits if labelled.test is None else splits | {"test": read(labelled.test)}


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


def model_inputs(batch: MicroBatch) -> dict[str, Any]:
    """The model's arguments: the batch without `index`, which is for the evaluation."""
    tensors = {name: tensor for name, tensor in batch.inputs.items() if name != "index"}
    return tensors | {"max_length": batch.max_length}


def _array(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


def _gather(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The parts of all ranks, one after the other; a rank may have none."""
    own = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    return np.concatenate(dist.gather_objects(own))
