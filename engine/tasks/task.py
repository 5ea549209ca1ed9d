"""The protocol between the training loop and what is trained.

The loop knows `Task` and never a task's name: a new task is a class that inherits it and an entry in
`engine.config.tasks.TASKS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.config import RunConfig, Shape, architecture_of
from engine.data.loading.source import MicroBatch, SampleSource
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.model.adapters.adapt import Adaptation
from engine.model.adapters.flops import step_flops
from engine.model.adapters.trained import Trained
from engine.model.pretrained import LoadReport
from engine.tasks.identity import Fact


@dataclass
class StepOutput:
    """What one micro-batch of one rank adds to the global batch.

    Every value is a *share*: added over micro-batches and ranks, shares give the value of the global batch
    (a sum of losses over the batch's masked tokens is divided by the global number of masked tokens).
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    """shares of further curves, detached; the loop writes each as train/<name>"""


@dataclass
class Evaluation:
    """The result of an evaluation, the same on every rank."""

    scalars: dict[str, float]
    """curves; the loop writes each as eval/<name>"""
    texts: dict[str, str] = field(default_factory=dict)
    """Markdown for TensorBoard"""
    images: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    """pictures [height, width, 3] for TensorBoard"""
    records: dict[str, Any] = field(default_factory=dict)
    """what the final report is made of"""
    tuned: dict[str, Any] = field(default_factory=dict)
    """what was chosen on these examples and predictions need, such as a threshold, as JSON; an export has that of its
    weights in zerobert.json"""


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run so far, whose weights are its export."""

    value: float
    """of the task's best_metric"""
    step: int | None
    """None where an earlier version saved the value alone"""


class Task(Protocol):
    """A data set, a model, a loss and its metrics."""

    model_config: Any
    """the transformers configuration of the model"""
    vocabulary: Vocabulary
    """the tokenizer that the data was made with; exported beside the weights"""
    best_metric: str | None
    """the scalar of `evaluate` that chooses the best checkpoint; None keeps the last"""
    higher_is_better: bool
    evaluation_samples: int
    """samples of a held-out evaluation; 0 takes all"""

    sequences_per_sample: int = 1
    """the most that a sample of its sources has: what a micro-batch holds is so many times its samples"""
    loaded: LoadReport | None
    """what `build_model` took from model.init_from; None before, and where weights are drawn"""

    @property
    def passes(self) -> int:
        """Forward and backward passes of a micro-batch; `ahead` yields it for each of them."""
        return 1

    @property
    def adaptation(self) -> Adaptation | None:
        """Which parts of the model are trained, where the task lets a run choose."""
        return None

    @classmethod
    def export_class(cls, config: Any) -> str:
        """The name of the transformers class that opens an export of a model with this configuration.

        It has parameters of the same names as the model.
        """
        ...

    @classmethod
    def with_own_data(cls, config: RunConfig, is_main: bool) -> RunConfig:
        """The configuration with data that the run makes itself where it names none; the main rank does the work."""
        return config

    def facts(self) -> list[Fact]:
        """What the weights and scores mean nothing without; reads the base weights."""
        ...

    def describe_data(self) -> list[str]:
        """Lines for the start of a run about what it learns from."""
        ...

    def describe_model(self) -> list[str]:
        """Lines about what else it learns from, once the model is built; here none."""
        return []

    def build_model(self) -> nn.Module:
        """The model with its initial weights, in fp32 on the CPU; equal on every rank."""
        ...

    def load_export(self, folder: Path) -> nn.Module:
        """The model with the weights of an export of this task, in fp32 on the CPU."""
        ...

    def train_source(self) -> SampleSource: ...

    def evaluation_source(self, split: str) -> SampleSource | None:
        """The source of split "validation" or "test"; None where the task has none."""
        ...

    def ahead(self, model: nn.Module, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of this rank in an optimizer step, just before the first `step`; may be collective.

        A task whose loss is no sum over micro-batches looks at all of them here and gives each `step` what it needs to
        know of the others. Here they are passed on one by one.
        """
        return batches

    def step(self, model: nn.Module, batch: MicroBatch) -> StepOutput:
        """Forward pass and loss shares of one micro-batch (tensors already on the model's device); no collective."""
        ...

    def flops(self, batch: MicroBatch) -> float:
        """FLOPs that the forward and backward pass of a micro-batch need.

        Here those of a classifier on the pooled vector; see `engine.model.flops`.
        """
        shape = replace(architecture_of(self.model_config).shape_of(self.model_config), decoder=False)
        return self.step_flops(shape, batch.inputs["lengths"].tolist(), 0)

    def step_flops(self, shape: Shape, lengths: Sequence[int], rows: float, *, to_words: bool = False) -> float:
        """See `engine.model.adapters.flops.step_flops`: of what the run trains."""
        chosen, trained = self.adaptation, None
        if chosen is not None and chosen.is_partial:
            trained = Trained(shape, chosen.adapter, chosen.freeze, architecture_of(self.model_config))
        return step_flops(shape, lengths, rows, trained, to_words=to_words)

    def evaluate(self, model: nn.Module, batches: Iterable[MicroBatch]) -> Evaluation:
        """Run the model over this rank's batches and combine the results of all ranks."""
        ...

    def report(self, evaluation: Evaluation, folder: Path) -> str:
        """Write the final report's files into `folder` (rank 0 only) and return its text."""
        ...
