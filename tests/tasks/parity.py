"""A task from outside of the package: tell of every token whether its id is odd.

`python -m tests.tasks.parity --task=parity --parity.vocabulary=vocab.txt ...` registers it and trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig

from engine import dist
from engine.config import TASKS, RunConfig, TaskEntry, architecture_of, require
from engine.data.loading.source import Indices, MicroBatch
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.model.bert import BertModel
from engine.model.build import build_config, initialise
from engine.model.flops import training_flops
from engine.model.pretrained import LoadReport, load_pretrained
from engine.tasks.identity import Fact
from engine.tasks.task import Evaluation, StepOutput, Task


@dataclass
class ParityConfig:
    """Sequences of random tokens."""

    vocabulary: str | None = None
    """vocab.txt of the tokens"""
    length: int = 8
    """tokens in a sequence"""

    def validate(self) -> None:
        require(self.length >= 4, "parity.length", self.length, "give at least 4")


@dataclass
class ParitySource:
    """An epoch has 64 sequences, each drawn from its number."""

    length: int
    tokens: int
    seed: int

    def epoch_size(self, epoch: int) -> int:
        return 64

    def describe(self, epoch: int, indices: Indices) -> Indices:
        return indices + 64 * epoch

    def join(self, descriptions: list[Indices]) -> Indices:
        return np.concatenate(descriptions)

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        return {"tokens": float(len(indices) * self.length)}

    def collate(self, description: Indices) -> dict[str, Tensor]:
        drawn = [np.random.default_rng([self.seed, n]).integers(5, self.tokens, self.length) for n in description]
        ids = torch.from_numpy(np.concatenate(drawn))
        positions, lengths = torch.arange(self.length).repeat(len(drawn)), torch.full((len(drawn),), self.length)
        inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "position_ids": positions}
        return {**inputs, "lengths": lengths, "labels": ids % 2}


class TokenClassifier(nn.Module):
    """A linear classifier over every token's state, under transformers' names, which has no pooler here."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config, self.bert = config, BertModel(config)
        self.bert.pooler = nn.Identity()  # type: ignore[assignment]
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        logits = self.classifier(self.bert(**inputs)[0]).float()
        return nn.functional.cross_entropy(logits, labels, reduction="sum"), (logits.argmax(-1) == labels).sum()


class Parity(Task):
    best_metric: str | None = "accuracy"
    higher_is_better = True
    evaluation_samples = 0
    loaded: LoadReport | None = None

    def __init__(self, config: RunConfig) -> None:
        options = config.extra["parity"]
        assert isinstance(options, ParityConfig)
        assert options.vocabulary is not None
        self.length, self.seed = options.length, config.seed
        self.vocabulary = load_tokenizer(options.vocabulary)
        size, padding = self.vocabulary.vocab_size, self.vocabulary.pad_id
        self.model_config = build_config(config.model, size, padding, ("even", "odd"))

    @classmethod
    def export_class(cls, config: BertConfig) -> str:
        return "BertForTokenClassification"

    def facts(self) -> list[Fact]:
        return [Fact("tokenizer's rules and pieces", "parity.vocabulary", self.vocabulary.fingerprint)]

    def describe_data(self) -> list[str]:
        return [f"sequences of {self.length} tokens"]

    def build_model(self) -> nn.Module:
        model = TokenClassifier(self.model_config)
        initialise(model, self.seed)
        return model

    def load_export(self, folder: Path) -> nn.Module:
        model = TokenClassifier(self.model_config)
        load_pretrained(model, folder)
        return model

    def train_source(self) -> ParitySource:
        return ParitySource(self.length, self.vocabulary.vocab_size, self.seed)

    def evaluation_source(self, split: str) -> ParitySource | None:
        held_out = ParitySource(self.length, self.vocabulary.vocab_size, self.seed + 1)
        return held_out if split == "validation" else None

    def step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        loss, correct = model(**batch.inputs, max_length=batch.max_length)
        return StepOutput(loss / batch.totals["tokens"], {"accuracy": correct / batch.totals["tokens"]})

    def flops(self, batch: MicroBatch) -> float:
        shape = replace(architecture_of(self.model_config).shape_of(self.model_config), decoder=False)
        lengths = batch.inputs["lengths"].tolist()
        return training_flops(shape, lengths, sum(lengths))

    def evaluate(self, model: nn.Module, batches: Iterable[MicroBatch]) -> Evaluation:
        steps = [self.step(model, batch) for batch in batches if not batch.dummy]
        shares = torch.stack([torch.stack((step.loss, step.metrics["accuracy"])).double() for step in steps])
        loss, accuracy = dist.sum_over_ranks(shares.sum(0)).tolist()
        return Evaluation({"loss": loss, "accuracy": accuracy})

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.txt").write_text(text := f"accuracy {evaluation.scalars['accuracy']:.6f}")
        return text


ENTRY = TaskEntry(
    about="odd or even",
    section="parity",
    options=ParityConfig,
    implementation=Parity,
    length="length",
    inputs=("vocabulary",),
    required=("vocabulary",),
    read_share=lambda config: 1.0,
    fixed=("length",),
)

if __name__ == "__main__":
    from launch.cli import run_command
    from launch.train import main

    TASKS.register("parity", ENTRY)
    run_command(main)
