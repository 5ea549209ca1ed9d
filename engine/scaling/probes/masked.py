"""Log-probabilities that a masked language model gives to what is behind its masks.

Shapes: N questions, P masked places of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.config import architecture_of
from engine.data.augment.mlm import open_masked
from engine.predict.batches import TOKENS, batches, packed
from engine.predict.model import ModelFolder
from engine.predict.predictor import Encoded
from engine.tasks.distilled.states import Watch

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Question:
    """A sequence with masks."""

    ids: Ids
    """with special tokens"""
    places: NDArray[np.int64]
    """of the masks that are asked for, ascending, at least one"""
    answers: Ids
    """what is behind each of them"""


@dataclass(frozen=True)
class Answers:
    """What a model says to P masked places, question by question."""

    log_probabilities: NDArray[np.float64]
    """of the right piece, nats, [P]"""
    right: NDArray[np.bool_]
    """whether it is the most probable one, [P]"""
    firsts: NDArray[np.int64]
    """[N] the first place of each question"""


class MaskedModel:
    """A folder's model with the head that predicts masked pieces."""

    def __init__(self, folder: Path, device: torch.device, tokens: int | None = None) -> None:
        """
        Args:
            tokens: of a batch, at most, unless a single question has more; None: as the device likes.

        Raises:
            UserError: another head, weights that are missing, or a tokenizer of more tokens than the model has.
        """
        self.folder, self.device = folder, device
        self._model, self._head = open_masked(folder, device)
        self.config: Any = self._model.config
        self.vocabulary = ModelFolder(folder, self.config, self._head, {}).vocabulary
        self.positions: int = architecture_of(self.config).positions(self.config)
        self._watch = Watch(self._model, architecture_of(self.config), (), None, True)
        self._tokens = tokens or TOKENS[device.type]

    def answer(self, questions: Sequence[Question]) -> Answers:
        """Answers to N >= 1 questions in their order, whatever batches they share."""
        lengths = np.array([len(question.ids) for question in questions])
        counts = np.array([len(question.places) for question in questions])
        firsts = np.cumsum(counts) - counts
        found, right = np.empty(counts.sum()), np.empty(counts.sum(), dtype=np.bool_)
        encoded = Encoded([question.ids for question in questions], lengths.tolist())
        for chosen in batches(lengths, self._tokens):
            own = [questions[index] for index in chosen]
            places = np.concatenate([np.arange(firsts[index], firsts[index] + counts[index]) for index in chosen])
            found[places], right[places] = self._batch(own, packed(encoded, chosen, self.device))
        return Answers(found, right, firsts)

    @torch.no_grad()
    def _batch(
        self, questions: Sequence[Question], batch: dict[str, Any]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        starts = np.cumsum([0, *(len(question.ids) for question in questions[:-1])])
        places = [question.places + start for question, start in zip(questions, starts, strict=True)]
        read = torch.from_numpy(np.concatenate(places)).to(self.device)
        labels = np.concatenate([question.answers for question in questions]).astype(np.int64)
        batch |= {"mlm_positions": read, "mlm_labels": torch.from_numpy(labels).to(self.device)}
        if self._head == "pretraining":
            batch["nsp_labels"] = torch.zeros_like(batch["lengths"])
        with self._watch.on() as seen:
            hits = self._model(**batch)["predictions"] == batch["mlm_labels"]
        assert seen.logits is not None
        losses = nn.functional.cross_entropy(seen.logits[: len(read)], batch["mlm_labels"], reduction="none")
        return -losses.double().cpu().numpy(), hits.cpu().numpy()
