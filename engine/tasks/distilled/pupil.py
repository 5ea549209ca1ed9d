"""A fine-tuning task whose loss is learned from labels and from teachers, for the passes that `regularise` makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from engine.data.loading.source import MicroBatch
from engine.tasks.distilled.distillation import Distillation, Lesson
from engine.tasks.regularised import objective as regularised
from engine.tasks.regularised.learner import Learner
from engine.tasks.task import StepOutput


class Taught(Learner, Protocol):
    """A task that tells how far its predictions are from a teacher's."""

    def soft(self, student: Tensor, teacher: Tensor, batch: MicroBatch, temperature: float) -> Tensor:
        """Share of the divergence of the student's logits from the teacher's, both [R, C]; see `DistilConfig.soft`."""
        ...

    def sequences_in(self, batch: MicroBatch) -> float:
        """Of the global batch."""
        ...


class Pupil:
    """A micro-batch's task with a teacher's lesson, as a `Learner`: labelled rows' own loss, and that of all rows."""

    def __init__(self, task: Taught, lesson: Lesson) -> None:
        self.config, self.model_config = task.config, task.model_config
        self._task, self._lesson = task, lesson

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        options = self.config.distil
        own = options.hard * self._task.loss(*labelled(logits, batch)) if options.hard else 0.0 * logits.sum()
        return own if self._lesson.logits is None else own + options.soft * self._soft(logits, batch)

    def _soft(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        assert self._lesson.logits is not None
        return self._task.soft(logits, self._lesson.logits, batch, self.config.distil.temperature)

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Those of the labelled rows, and the losses apart."""
        found = self._task.metrics(*labelled(logits, batch))
        if self._lesson.logits is not None:
            found |= {"soft_loss": self._soft(logits, batch)}
        return found | {"hard_loss": self._task.loss(*labelled(logits, batch))}

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        return self._task.divergence(first, second, batch)


def labelled(logits: Tensor, batch: MicroBatch) -> tuple[Tensor, MicroBatch]:
    """The rows that have a label, where texts without are among them, and the totals of those."""
    if "known" not in batch.inputs:
        return logits, batch
    known = batch.inputs["known"]
    # a global batch may have none
    totals = {name: max(1.0, total) if name == "weights" else total for name, total in batch.totals.items()}
    totals["sequences"] = max(1.0, batch.totals["known"])
    return logits[known], replace(batch, inputs={"labels": batch.inputs["labels"][known]}, totals=totals)


def step(
    task: Taught, distillation: Distillation, model: nn.Module, batch: MicroBatch, inputs: Mapping[str, Any]
) -> StepOutput:
    """Forward passes and loss shares of one micro-batch: the teachers' first, then those of `regularise`."""
    lesson = distillation.teach(inputs)
    with distillation.watching() as seen:
        output = regularised.step(Pupil(task, lesson), model, batch, inputs)
    return with_states(output, distillation, lesson, seen, inputs, task.sequences_in(batch))


def with_states(
    output: StepOutput, distillation: Distillation, lesson: Lesson, seen: Any, inputs: Mapping[str, Any], total: float
) -> StepOutput:
    """The same with the losses of what the models compute on their way."""
    losses = distillation.state_losses(lesson, seen, inputs, total)
    metrics = {name: share.detach() for name, share in losses.items()}
    return StepOutput(output.loss + distillation.weighted(losses), output.metrics | metrics)
