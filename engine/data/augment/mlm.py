"""Words that a masked language model puts in the place of others, or between them (Kobayashi 2018; Kumar et al. 2020).

Shapes: N texts, M masked places of a text, K whole words of a vocabulary, R masked places of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engine.config import architecture_of
from engine.data.augment.draws import Draws
from engine.data.augment.english import is_negation
from engine.data.augment.method import changed
from engine.data.augment.neighbours import whole_words
from engine.data.augment.words import Words, like
from engine.data.labelled.encoded import plain
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError
from engine.hub import local_folder
from engine.model.pretrained import base_weights, load_config, load_pretrained
from engine.model.roundtrip import Sample, own_logits, packed

OPERATIONS = ("replace", "insert")
HEADS = ("pretraining", "masked_lm")
#: tokens of a forward pass, at least one text
TOKENS = {"cpu": 2048, "cuda": 32768}


@dataclass(frozen=True)
class Plan:
    """A text with masks."""

    words: Words
    places: tuple[int, ...]
    """words of it that are masks, ascending, [M]"""
    written: tuple[str, ...]
    """what was there, [M]; empty where nothing was"""


class MaskedWords:
    """One of two operations, drawn for each text: other words for some of it, or words between its own.

    A masked place is one [MASK], whatever the word that was there, and is filled by a word that is one piece: with its
    exact probability among these, or among the most probable of them. All places of a text are masked at once. Neither
    negations nor words in entities are replaced, and no negation is put anywhere.
    """

    def __init__(self, model: str, share: float, operations: Sequence[str], top: int, device: torch.device) -> None:
        """
        Args:
            model: folder of a pre-trained encoder, or its name on the hub.
            share: of the words that are replaced, or in whose number words are inserted; at least one.
            top: among how many words one is drawn, the most probable ones; 0: all.

        Raises:
            UserError: no such model, or one without the head that predicts masked words.
        """
        folder = Path(local_folder(model))
        self._model, self._head = open_masked(folder, device)
        self._vocabulary, self._device = load_tokenizer(folder), device
        config: Any = self._model.config
        self._room = architecture_of(config).positions(config) - 2
        self._tokenizer, self._mask = plain(self._vocabulary), self._vocabulary.names["mask_token"]
        ids, self.words = whole_words(self._vocabulary, config.vocab_size, folder)
        self._ids = torch.from_numpy(ids).to(device)
        self._places: dict[str, list[int]] = {}
        for place, word in enumerate(self.words):
            self._places.setdefault(word.lower(), []).append(place)
        self._never = [place for word, places in self._places.items() if is_negation(word) for place in places]
        self._share, self._operations, self._top = share, tuple(operations), top
        content = (base_weights(str(folder)), self._vocabulary.fingerprint, share, self._operations, top)
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()

    def __call__(self, examples: Sequence[Words], draws: Sequence[Draws]) -> list[Words]:
        """See `Method`."""
        plans = [self._plan(words, own) for words, own in zip(examples, draws, strict=True)]
        found = self.logits([plan.words.text for plan in plans])
        return [
            words if logits is None or not plan.places else self._filled(plan, logits, own)
            for words, plan, logits, own in zip(examples, plans, found, draws, strict=True)
        ]

    def _plan(self, words: Words, draws: Draws) -> Plan:
        """Where a text gets masks; one that quotes the mask gets none."""
        free = [index for index in words.free if not is_negation(words.words[index].lower())]
        if self._mask in words.text or not free:
            return Plan(words, (), ())
        count = changed(self._share, len(words.free))
        if draws.one_of(self._operations) == "replace":
            places = sorted(draws.some_of(free, count))
            masked = [self._mask if index in places else word for index, word in enumerate(words.words)]
            return Plan(words.with_words(masked), tuple(places), tuple(words.words[index] for index in places))
        places = sorted(draws.some_of(words.openings, count))
        for place in reversed(places):
            words = words.with_inserted(place, self._mask)
        return Plan(words, tuple(place + before for before, place in enumerate(places)), ("",) * len(places))

    def _filled(self, plan: Plan, logits: NDArray[np.float64], draws: Draws) -> Words:
        """The text with words for its masks; as it was behind what the model reads.

        Args:
            logits: [masks that the model reads, K], which are changed.
        """
        new, read = list(plan.words.words), len(logits)
        for place, written, row in zip(plan.places, plan.written, logits, strict=False):
            row[self._never + self._places.get(written.lower(), [])] = -np.inf
            new[place] = like(self.words[choose(row, self._top, draws.uniform())], written)
        for place, written in zip(plan.places[read:], plan.written[read:], strict=True):
            new[place] = written
        words = plan.words.with_words(new)
        for place in reversed([place for place in plan.places if not new[place]]):
            words = words.without(place)
        return words

    def logits(self, texts: Sequence[str]) -> list[NDArray[np.float64] | None]:
        """Of each text the logits of whole words at its masks, [M, K] or fewer rows if it is too long; None of a text
        without one that the model reads."""
        words = self._vocabulary
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [[words.cls_id, *encoding.ids[: self._room], words.sep_id] for encoding in encodings]
        counts = [row.count(words.mask_id) for row in rows]
        found: list[NDArray[np.float64] | None] = [None] * len(rows)
        for part in _batches(rows, [index for index, count in enumerate(counts) if count], TOKENS[self._device.type]):
            batch = packed([Sample(tuple(rows[index]), (0,) * len(rows[index])) for index in part])
            batch = {name: tensor.to(self._device) for name, tensor in batch.items()}
            read = torch.nonzero(batch["input_ids"] == words.mask_id).flatten()
            with torch.no_grad():
                logits = next(iter(own_logits(self._model, self._head, batch, read).values()))
            ends = np.cumsum([counts[index] for index in part])
            own = logits[:, self._ids].double().cpu().numpy()
            for index, each in zip(part, np.split(own, ends[:-1]), strict=True):
                found[index] = each
        return found


def choose(logits: NDArray[np.float64], top: int, draw: float) -> int:
    """A word drawn by its probability among the `top` most probable ones, or (0) among all.

    Args:
        logits: [K], minus infinity of words that may not be.
        draw: a number in [0, 1).
    """
    count = min(top, len(logits)) if top else len(logits)
    order = np.sort(np.argpartition(-logits, count - 1)[:count])
    powers = np.exp(logits[order] - logits[order].max())
    bounds = np.cumsum(powers)
    return int(order[np.searchsorted(bounds, draw * bounds[-1], side="right")])


def open_masked(folder: Path, device: torch.device) -> tuple[nn.Module, str]:
    """A model in evaluation mode that predicts masked words, and its head.

    Raises:
        UserError: the folder is of a model with another head, or lacks the head's weights.
    """
    config = load_config(folder)
    architecture, kind = architecture_of(config), (config.architectures or [None])[0]
    heads = {name: head for head, name in architecture.export_classes.items() if head in HEADS}
    remedy = "give the folder of a model that was pre-trained with masked words"
    if kind not in heads:
        raise UserError(f"model: {folder / 'config.json'} names {kind!r}, which predicts no masked words; {remedy}")
    model = architecture.build(heads[kind], config, False)
    missing = load_pretrained(model, folder).initialised
    if missing:
        raise UserError(f"model: {folder} has no weights of {missing[0]}; {remedy}")
    return model.to(device).eval(), heads[kind]


def _batches(rows: Sequence[Sequence[int]], wanted: Sequence[int], limit: int) -> Iterator[list[int]]:
    """The wanted rows in their order, at most `limit` tokens at a time, or one row."""
    part: list[int] = []
    held = 0
    for index in wanted:
        if part and held + len(rows[index]) > limit:
            yield part
            part, held = [], 0
        part.append(index)
        held += len(rows[index])
    if part:
        yield part
