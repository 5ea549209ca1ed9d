"""Predictions of a head on spans: the answer to a question in its context.

Contexts are read in the windows of training, and the spans of a question's windows are put together as a run's report
does it. Where the folder has a threshold (`null_threshold` of what the run tuned in zerobert.json, or else of
config.json), a question gets no answer, the empty text, when the odds of no answer are above it; else all get one.

Shapes: W windows, T tokens in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import LabelledConfig
from engine.data.labelled.answers.encoded import AnswerWindows, encode_questions
from engine.data.labelled.answers.files import Question
from engine.data.labelled.encoded import framed
from engine.errors import UserError
from engine.model.folder import ORIGIN_FILE
from engine.model.pretrained import check_segments
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded, Predictor, significant
from engine.predict.rows import Row
from engine.tasks.answers.nbest import ANSWERS, THRESHOLD, Candidates, candidates
from engine.tasks.answers.spans import best_spans

QUESTION, CONTEXT = "question", "context"


class AnswerPredictor(Predictor):
    """The predictor of "question_answering"."""

    on_tokens: ClassVar[bool] = True
    usual: ClassVar[tuple[str, ...]] = (QUESTION,)

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        super().__init__(model, config)
        check_segments(model.config, str(model.folder), "a question before its context")
        self.columns = {"answer": (), "start": (), "end": (), "confidence": ()}
        self.threshold = _threshold(model)
        self._tokenizer = framed(model.vocabulary)
        self._overlap = _overlap(model.run, self.length)
        self._longest = int(model.run.get("max_answer_length") or LabelledConfig.max_answer_length)

    @classmethod
    def run_columns(cls, run: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """A run reads columns of these names, whatever its section labelled says."""
        return None, CONTEXT

    def column_types(self) -> dict[str, Any]:
        return {"answer": str, "start": int, "end": int, "confidence": float}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        questions = [self._question(row) for row in rows]
        remedy = "shorten it, or raise max_length as far as the model has positions"
        windows = encode_questions(self._tokenizer, questions, self.length, self._overlap, remedy, empty=True)
        encoded = windows.encoded
        tokens = np.split(encoded.tokens, encoded.offsets[1:-1])
        return Encoded(tokens, encoded.first_lengths.tolist(), (questions, windows))

    def _question(self, row: Row) -> Question:
        assert self.config.text is not None
        assert self.config.text_pair is not None
        text, context = self.text(row, self.config.text), self.text(row, self.config.text_pair)
        return Question("", text, context, answers=(), place=self._place(row))

    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        questions, windows = encoded.memory
        found = candidates(questions, windows, window_spans(windows, logits, self._longest))
        return [self._row(each) for each in found]

    def _row(self, found: Candidates) -> dict[str, Any]:
        """The columns of a question; no answer is the empty span at 0."""
        given = found.chosen(self.threshold)
        ranked = found.ranked(null=self.threshold is not None or not found.best)
        confidence = next((share for each, share in ranked if each is given), 0.0)
        start, end = given.span
        return {"answer": given.text, "start": start, "end": end, "confidence": significant(confidence)}


def window_spans(
    windows: AnswerWindows, logits: Sequence[NDArray[np.float32]], longest: int
) -> dict[str, NDArray[Any]]:
    """What `candidates` needs of the logits of W windows, [its tokens, 2] each."""
    flat = torch.from_numpy(np.concatenate(logits))
    lengths = torch.tensor([len(each) for each in logits])
    spans = best_spans(flat, lengths, torch.from_numpy(windows.context), ANSWERS, longest)
    rows = {name: tensor.numpy() for name, tensor in vars(spans).items()}
    return rows | {"null": np.stack([each[0] for each in logits])}


def _overlap(run: Mapping[str, Any], length: int) -> int:
    """Pieces that windows share: those of the run; of shorter windows than the run's a third, if that is fewer."""
    stride, third = run.get("stride"), length // 3
    if stride is None:
        return third
    return int(stride) if length >= (run.get("max_length") or 0) else min(int(stride), third)


def _threshold(model: ModelFolder) -> float | None:
    """The odds of no answer above which none is given; None always gives one."""
    tuned = THRESHOLD in model.tuned
    given = model.tuned[THRESHOLD] if tuned else getattr(model.config, THRESHOLD, None)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given != given:
        where = model.folder / (ORIGIN_FILE if tuned else "config.json")
        raise UserError(f"{where}: {THRESHOLD} {given!r:.60} is not a number; correct it")
    return float(given)
