"""Embeddings: train an encoder whose vectors of texts are near each other where the texts are alike.

Shapes: B examples and s sequences of a micro-batch, S sequences of a global batch or of a split, H width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from engine import dist
from engine.config import TASKS, RunConfig, architecture_of, require
from engine.data.labelled.encoded import encode
from engine.data.labelled.pairs import POSITIVE, TEXT, Pairs, PairSource, digests, read_pairs, split_pairs
from engine.data.labelled.scores import numbers
from engine.data.labelled.summary import told_lengths
from engine.data.loading.source import MicroBatch
from engine.errors import UserError
from engine.model.sentence import SentenceConfig, read_sentence_config
from engine.tasks.distilled import pupil
from engine.tasks.distilled.losses import unlike
from engine.tasks.embeddings import report as reports
from engine.tasks.embeddings.contrast import Found, Places, contrast, known
from engine.tasks.embeddings.retrieval import ranks
from engine.tasks.finetune import PACKED, FineTuning, read_splits
from engine.tasks.grow import growth_lines
from engine.tasks.reports.regression import scatter_picture, scores
from engine.tasks.task import Evaluation, StepOutput

#: scores of pairs with labels; the task's others are of pairs without
OF_LABELLED = ("spearman", "pearson")


@dataclass
class Foreseen(MicroBatch):
    """A micro-batch of which it is known what the other sequences of the global batch make of its vectors."""

    found: Found | None = None
    vectors: Tensor | None = None
    """[s, H], with their graph, where they need not be computed again"""


class Embeddings(FineTuning):
    """The task of a run that trains embeddings by contrast.

    Raises:
        UserError: labelled data, a model folder, a length or a score that cannot be used.
    """

    head = "embeddings"
    names = None
    fresh = ()
    sources: dict[str, PairSource]

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        labelled = config.labelled
        splits = read_splits(
            labelled,
            lambda path: read_pairs(path, labelled, training=False),
            lambda training: split_pairs(training, labelled, config.seed),
            lambda path: read_pairs(path, labelled, training=True),
        )
        self.model_config = self.build_config()
        self._sentence().put_into(self.model_config)
        self._check_dropout()
        self.labelled_training = splits["train"].are_labelled
        self.sources = {split: self._source(pairs, split) for split, pairs in splits.items()}
        self.sequences_per_sample = max(int(source.counts.max()) for source in self.sources.values())
        self._check_count(splits["train"])
        self.best_metric = self._metric(splits["validation"])
        self.check_ids(splits["train"].distinct()[0], None)
        self.check_unknown()

    def _sentence(self) -> SentenceConfig:
        """The pooling that the run names, else that of its start model; vectors of an export have length 1."""
        given = self.config.labelled.pooling
        found = read_sentence_config(self.tokenizer) or SentenceConfig()
        return SentenceConfig(given or found.pooling, True, self.config.labelled.max_length)

    def _check_dropout(self) -> None:
        dropouts = architecture_of(self.model_config).dropouts(self.config.model)[:2]
        by_dropout = self.config.labelled.positives == "dropout"
        remedy = "a text and its positive are then the same (labelled.positives dropout); give it, such as 0.1"
        require(any(dropouts) or not by_dropout, "model.hidden_dropout", dropouts[0], remedy)

    def _source(self, pairs: Pairs, split: str) -> PairSource:
        labelled, fixed = self.config.labelled, split != "train"
        labels = numbers(pairs) if fixed and pairs.are_labelled else None
        texts, members, counts = pairs.distinct()
        encoded = encode(self.vocabulary, texts, None, labelled.max_length)
        return PairSource(encoded, digests(texts), members, counts, self.config.seed, fixed, self.group(fixed), labels)

    def _check_count(self, pairs: Pairs) -> None:
        """A text and its positive alone have no negatives."""
        texts = len(np.unique(self.sources["train"].texts))
        least = 3 if self.config.labelled.positives == "pairs" else 2
        if texts < least:
            raise UserError(
                f"{pairs.path}: {len(pairs)} row(s) of {texts} different texts leave no negatives; give at least "
                f"{least} different texts"
            )

    def _metric(self, validation: Pairs) -> str:
        """The score of the best checkpoint: as the run says, else the first that the validation examples can have."""
        given = self.config.labelled.metric
        metrics = TASKS.get(self.config.task).metrics
        possible = [name for name in metrics if (name in OF_LABELLED) is validation.are_labelled]
        label, has = self.config.labelled.label, "has" if validation.are_labelled else "has no"
        remedy = f"{validation.path} {has} column {label!r} (labelled.label); give one of {', '.join(possible)}"
        require(given is None or given in possible, "labelled.metric", given, remedy)
        return given or possible[0]

    def describe_data(self) -> list[str]:
        """New rows of the word embeddings, the pooling, and examples and lengths of each split."""
        lines = growth_lines(self.config.model.init_from, self.vocabulary)
        pooled = self.model_config.sentence_embedding["pooling"]
        lines.append(f"pooling: {pooled}; negatives: those of the global batch, over all ranks and micro-batches")
        if self.labelled_training:
            label = self.config.labelled.label
            lines.append(f"note: every row of labelled.train is a positive pair; its column {label!r} is not learned")
        for split, source in self.sources.items():
            negatives = int(source.counts.sum()) - 2 * source.count
            told = f"{source.count:,} pairs" + (f" with {negatives:,} negatives" if negatives else "")
            if source.labels is not None:
                told += f", numbers from {source.labels.min():g} to {source.labels.max():g}"
            lines.append(
                f"{split}: {told}; of different texts, {told_lengths(source, self.config.labelled.max_length)}"
            )
        return lines

    def _vectors(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Of each sequence, fp32 [s, H]."""
        vectors: Tensor = model(**{name: batch.inputs[name] for name in PACKED}, max_length=batch.max_length)
        return vectors

    def _contrast(self, vectors: Tensor, places: Tensor) -> Found:
        """Loss and gradient of a global batch; places is int64 [S, 3]."""
        labelled = self.config.labelled
        return contrast(vectors, Places(*places.unbind(1)), labelled.temperature, symmetric=labelled.symmetric)

    def ahead(self, model: nn.Module, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Compute the vectors of the whole global batch, its loss, and the gradient by these vectors; collective.

        A single micro-batch keeps its graph. Several are computed without one, and once more by `step`, from the same
        state of the random generators and so with the same dropout.
        """
        held = list(batches)
        single = len(held) == 1 and not self.config.distil.compares_states
        states, parts = [], []
        with torch.set_grad_enabled(single):
            for batch in held:
                states.append(dist.rng_state())
                parts.append(self._vectors(model, batch))
        own = torch.cat([part.detach() for part in parts])
        vectors = dist.gather_rows(own)
        places = dist.gather_rows(torch.cat([_places(batch) for batch in held]))
        found = self._contrast(torch.cat(vectors), torch.cat(places))
        stop = sum(len(rows) for rows in vectors[: dist.place()[0]])
        for batch, state, part in zip(held, states, parts, strict=True):
            start, stop = stop, stop + len(part)
            if not single:
                dist.set_rng_state(state)
            yield Foreseen(**vars(batch), found=found.part(slice(start, stop)), vectors=part if single else None)

    def step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        """Shares of the mean loss of the global batch's texts, and of the accuracy among its candidates.

        A micro-batch that `ahead` has not seen is a global batch of its own.
        """
        if self.config.distil.folders:
            return self._taught_step(model, batch)
        vectors, found = self._foreseen(model, batch)
        return StepOutput(known(vectors, found), {"in_batch_accuracy": found.hits.sum()})

    def _foreseen(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, Found]:
        """Vectors [s, H] with a graph, and what the global batch makes of them."""
        seen = batch if isinstance(batch, Foreseen) else Foreseen(**vars(batch))
        vectors = self._vectors(model, batch) if seen.vectors is None else seen.vectors
        return vectors, seen.found or self._contrast(vectors, _places(batch))

    def _taught_step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        """The same with what teachers add; their vectors and the student's are compared by cosine."""
        options, distillation = self.config.distil, self.distillation
        inputs = {name: batch.inputs[name] for name in PACKED} | {"max_length": batch.max_length}
        lesson, total = distillation.teach(inputs), batch.totals["sequences"]
        with distillation.watching() as kept:
            vectors, found = self._foreseen(model, batch)
        loss, counted = options.hard * known(vectors, found), {"in_batch_accuracy": found.hits.sum()}
        if lesson.logits is not None:
            soft = unlike(vectors, lesson.logits).sum() / total
            loss, counted["soft_loss"] = loss + options.soft * soft, soft.detach()
        return pupil.with_states(StepOutput(loss, counted), distillation, lesson, kept, inputs, total)

    def flops(self, batch: MicroBatch) -> float:
        """Those of an encoder without a head; that vectors are computed a second time is not counted."""
        architecture = architecture_of(self.model_config)
        shape = replace(architecture.shape_of(self.model_config), decoder=False, pooler=False, classes=0)
        lengths = batch.inputs["lengths"].tolist()
        return self.step_flops(shape, lengths, sum(lengths))

    def rows(self, model: nn.Module, batch: MicroBatch) -> dict[str, Tensor]:
        """Of examples with labels: index, truth and cosine [B]; of others: number, member, text [s] and vector [s, H]
        of each sequence."""
        vectors, inputs = self._vectors(model, batch), batch.inputs
        if "labels" in inputs:
            texts, positives = (vectors[inputs["member"] == member] for member in (TEXT, POSITIVE))
            cosines = functional.cosine_similarity(texts, positives)
            return {"index": inputs["index"], "truth": inputs["labels"], "predicted": cosines}
        return {"index": inputs["sequence"], "member": inputs["member"], "text": inputs["text"], "vector": vectors}

    def score(self, rows: dict[str, NDArray[Any]]) -> Evaluation:
        """Correlations of cosines and labels, with a scatter as a picture; of examples without labels, retrieval."""
        if "truth" not in rows:
            found = ranks(rows["vector"], rows["member"], rows["text"])
            means = {name: float(values.mean()) for name, values in found.scores().items()}
            return Evaluation(means, records={"ranks": found})
        truth, predicted = rows["truth"].astype(np.float64), rows["predicted"].astype(np.float64)
        kept = {name: value for name, value in scores(truth, predicted).items() if name in OF_LABELLED}
        images = {}
        if self.config.monitor.tensorboard and dist.place()[0] == 0:
            images["scatter"] = scatter_picture(truth, predicted)
        return Evaluation(kept, images=images, records={"similarities": reports.Similarities(truth, predicted)})

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """See `engine.tasks.embeddings.report.report`."""
        return reports.report(evaluation, folder)


def _places(batch: MicroBatch) -> Tensor:
    """Number, member and text of each sequence, int64 [s, 3]."""
    return torch.stack([batch.inputs[name] for name in ("sequence", "member", "text")], dim=1)
