"""Vectors of texts, or how alike two texts are: predictions of a model of embeddings.

Pooling, and whether vectors have length 1, are what the folder's files of sentence-transformers say.

Shapes: H width of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.labelled.encoded import truncating
from engine.model.sentence import FIELD
from engine.predict.model import ModelFolder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded, Predictor, significant
from engine.predict.rows import Row
from engine.predict.sequence import sequences


class EmbeddingPredictor(Predictor):
    """The predictor of "embeddings"."""

    def __init__(self, model: ModelFolder, config: PredictConfig) -> None:
        super().__init__(model, config)
        self.columns = {"similarity": ()} if config.text_pair is not None else {"embedding": ()}
        self._normalized: bool = getattr(model.config, FIELD)["normalize"]
        self._tokenizer = truncating(model.vocabulary, self.length)

    @classmethod
    def run_columns(cls, run: Mapping[str, Any]) -> tuple[str | None, str | None]:
        """The text of a run; its positives are there to train: who wants a similarity names the second text."""
        return run.get("text"), None

    def column_types(self) -> dict[str, Any]:
        return {column: {"similarity": float}.get(column, list[float]) for column in self.columns}

    def encode(self, rows: Sequence[Row]) -> Encoded:
        columns = [column for column in (self.config.text, self.config.text_pair) if column is not None]
        texts = [self.text(row, column) for row in rows for column in columns]
        tokens, first_lengths, cut = sequences(self._tokenizer, texts, self.length)
        truncated = sum(any(cut[at : at + len(columns)]) for at in range(0, len(cut), len(columns)))
        return Encoded(tokens, first_lengths, None, truncated)

    def decode(self, encoded: Encoded, logits: list[NDArray[np.float32]]) -> list[dict[str, Any]]:
        vectors = [vector.astype(np.float64) for vector in logits]
        units = [vector / max(float(np.linalg.norm(vector)), 1e-12) for vector in vectors]
        if "similarity" in self.columns:
            pairs = zip(units[::2], units[1::2], strict=True)
            return [{"similarity": significant(float(one @ other))} for one, other in pairs]
        given = units if self._normalized else vectors
        return [{"embedding": [significant(value) for value in vector.tolist()]} for vector in given]
