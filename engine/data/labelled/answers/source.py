"""Windows of questions as a `SampleSource`; a share of the contexts that is held out. Shapes: B windows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.config import LabelledConfig
from engine.data.labelled.answers.encoded import AnswerWindows
from engine.data.labelled.answers.files import Question
from engine.data.labelled.classes import held_out
from engine.data.labelled.encoded import EncodedSource
from engine.data.loading.source import Indices


class AnswerSource(EncodedSource):
    """Windows over the contexts of questions."""

    def __init__(
        self,
        questions: Sequence[Question],
        windows: AnswerWindows,
        seed: int,
        fixed: bool = False,
        group: int | None = None,
        split: int = 0,
    ) -> None:
        """Args: split is a number by which an evaluation knows whose questions are scored."""
        super().__init__(windows.encoded, seed, fixed, group)
        self.questions, self.windows, self.split = questions, windows, split

    def targets(self, examples: Indices) -> dict[str, NDArray[Any]]:
        """labels [B, 2], first and last token of the answer; context [B, 2], where the context starts and stops."""
        return {"labels": self.windows.answer[examples], "context": self.windows.context[examples]}

    def collate(self, description: Indices) -> dict[str, Tensor]:
        """As `EncodedSource.collate`, with `split` [B] where it gives `index`."""
        batch = super().collate(description)
        return {**batch, "split": torch.full_like(batch["index"], self.split)} if self.fixed else batch

    @property
    def unanswerable(self) -> int:
        """Questions without an answer in their context."""
        return sum(not question.answers for question in self.questions)

    def describe_data(self, split: str) -> str:
        """A line about the questions, contexts and windows of a split."""
        count, lengths = len(self.questions), np.diff(self.encoded.offsets)
        none = f" ({self.unanswerable:,} without answer)" if self.unanswerable else ""
        contexts = len({question.context for question in self.questions})
        several = int((np.bincount(self.windows.question) > 1).sum())
        lost = count - self.unanswerable - len(np.unique(self.windows.question[self.windows.answer[:, 1] > 0]))
        broken = f", {lost:,} answers whole in none" if lost else ""
        median, most = np.percentile(lengths, [50, 95], method="higher")
        return (
            f"{split}: {count:,} questions{none} about {contexts:,} contexts in {self.count:,} windows; {several:,} of "
            f"more than one{broken}; tokens: median {median:,}, 95 % up to {most:,}, longest {lengths.max():,}"
        )


def hold_out_contexts(
    questions: Sequence[Question], labelled: LabelledConfig, seed: int
) -> tuple[list[Question], list[Question]]:
    """Split questions into (kept, held out), both in file order: those of a tenth of the contexts, or of a fold.

    Raises:
        UserError: too few contexts to hold any out.
    """
    contexts = list(dict.fromkeys(question.context for question in questions))
    kept, held = (
        {contexts[index] for index in part} for part in held_out(labelled, [""] * len(contexts), seed, "contexts")
    )
    return (
        [question for question in questions if question.context in kept],
        [question for question in questions if question.context in held],
    )
