"""Predictions of a head on whole sequences: a class, several labels, or a number.

What the logits mean is what config.json says in problem_type, as in transformers: single_label_classification (also
where it is null and there are several classes), multi_label_classification or regression (also of a single output).
Several labels are those whose probability is at least their threshold: that of the label in the object `thresholds` of
what the run tuned (`tuned` in zerobert.json) or else of config.json, or 0.5.

Shapes: C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engine.data.labelled.encoded import truncating
from engine.errors import UserError
from engine.model.folder import ORIGIN_FILE
from engine.model.pretrained import check_segments
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded, Predictor, significant
from engine.predict.rows import Row

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
#: the field with the least probability of each label, by its name
THRESHOLDS = "thresholds"
THRESHOLD = 0.5


class SequencePredictor(Predictor):
    """The predictor of "sequence_classification"."""

    options: ClassVar = ("probabilities",)

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        super().__init__(model, config)
        if config.text_pair is not None:
            check_segments(model.config, str(model.folder), "text_pair")
        self.names = model.names
        self.problem = _problem(model)
        self.thresholds = _thresholds(model, self.names)
        self.columns = self._columns()
        if self.problem == NUMBER and config.probabilities:
            raise UserError("probabilities: True has no effect: the model predicts numbers; leave it out")
        self._tokenizer = truncating(model.vocabulary, self.length)

    def _columns(self) -> dict[str, tuple[str, ...]]:
        if self.problem == NUMBER:
            return {"score": ()} if len(self.names) == 1 else {"scores": self.names}
        columns: dict[str, tuple[str, ...]] = {"labels": ()} if self.problem == SEVERAL else {"label": ()}
        columns |= {"confidence": ()} if self.problem == SINGLE else {}
        return columns | ({"probabilities": self.names} if self.config.probabilities else {})

    def column_types(self) -> dict[str, Any]:
        name = Literal[self.names]  # type: ignore[valid-type, name-defined]
        types = {"label": name, "labels": list[name], "score": float, "confidence": float}
        return {column: types.get(column, dict[str, float]) for column in self.columns}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        assert self.config.text is not None
        texts = [self.text(row, self.config.text) for row in rows]
        inputs: list[Any] = texts
        if self.config.text_pair is not None:
            inputs = list(zip(texts, (self.text(row, self.config.text_pair) for row in rows), strict=True))
        tokens, first_lengths, cut = sequences(self._tokenizer, inputs, self.length)
        return Encoded(tokens, first_lengths, None, sum(cut))

    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        values = np.stack(logits).astype(np.float64)
        if self.problem == NUMBER:
            return [self._numbers(row) for row in values]
        rows = softmax(values) if self.problem == SINGLE else 1 / (1 + np.exp(-values))
        return [self._classes(row) for row in rows]

    def _numbers(self, values: NDArray[np.float64]) -> dict[str, Any]:
        """[C] as the columns of a regression."""
        scores = [significant(value) for value in values.tolist()]
        return {"score": scores[0]} if len(scores) == 1 else {"scores": dict(zip(self.names, scores, strict=True))}

    def _classes(self, probabilities: NDArray[np.float64]) -> dict[str, Any]:
        """[C] as the columns of a classification."""
        if self.problem == SINGLE:
            best = int(probabilities.argmax())
            row: dict[str, Any] = {"label": self.names[best], "confidence": significant(float(probabilities[best]))}
        else:
            row = {"labels": [self.names[index] for index in np.flatnonzero(probabilities >= self.thresholds)]}
        if self.config.probabilities:
            shown = map(significant, probabilities.tolist())
            row["probabilities"] = dict(zip(self.names, shown, strict=True))
        return row


def sequences(
    tokenizer: Tokenizer, inputs: Sequence[str] | Sequence[tuple[str, str]], length: int
) -> tuple[list[NDArray[np.int32]], list[int], list[bool]]:
    """Of each text or pair its ids, the tokens of its first segment, and whether it was cut."""
    encodings = tokenizer.encode_batch_fast(inputs)
    tokens = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
    cut = [len(encoding) == length and bool(encoding.overflowing) for encoding in encodings]
    return tokens, [encoding.type_ids.count(0) for encoding in encodings], cut


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities of logits [..., C]."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return shares


def _problem(model: ModelFolder) -> str:
    given = model.config.problem_type
    if given is None:
        return NUMBER if len(model.names) == 1 else SINGLE
    if given not in (SINGLE, SEVERAL, NUMBER):
        where = model.folder / "config.json"
        raise UserError(f"{where}: problem_type {given!r} is not known; give {SINGLE}, {SEVERAL} or {NUMBER}")
    return str(given)


def _thresholds(model: ModelFolder, names: Sequence[str]) -> NDArray[np.float64]:
    """[C], what the folder says."""
    tuned = model.tuned.get(THRESHOLDS)
    given = (getattr(model.config, THRESHOLDS, None) or {}) if tuned is None else tuned
    where = f"{model.folder / ('config.json' if tuned is None else ORIGIN_FILE)}: {THRESHOLDS}"
    if not isinstance(given, dict) or not all(isinstance(value, (int, float)) for value in given.values()):
        raise UserError(f"{where} {given!r:.60} is not an object of numbers by label; correct it")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise UserError(f"{where} names {unknown[0]!r}, which is no label of id2label; correct it")
    return np.array([float(given.get(name, THRESHOLD)) for name in names])
