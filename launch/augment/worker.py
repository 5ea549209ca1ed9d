"""What a process does: it opens the method once, and makes the new rows of the chunks that it is given."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.augment.build import cheap_method
from engine.data.augment.draws import draws_for
from engine.data.augment.eda import mentions_of
from engine.data.augment.method import Method
from engine.data.augment.words import Words
from engine.predict.rows import Row
from launch.augment.examples import Examples, Texts, read_tags, words_in
from launch.augment.options import CONFIDENCE, MARK, TAGS, AugmentConfig

if TYPE_CHECKING:
    from launch.augment.judge import Judge

#: how often a copy is tried that would be the row itself or another of its copies
ATTEMPTS = 5


@dataclass(frozen=True)
class Made:
    """The rows to write of a chunk."""

    rows: list[Row]
    marks: list[dict[str, Any]]
    """the new columns of each"""
    new: int
    """of them"""
    missing: int
    """copies that would have been the same as another row or of another class; rows whose class is not sure"""


@functools.lru_cache(maxsize=1)
def method_of(config: AugmentConfig) -> Method:
    """The method of this process; kept for its next chunk.

    Raises:
        UserError: what it needs isn't there.
    """
    if config.method in ("mlm", "translate"):
        return _by_models(config)
    mentions = None
    if config.task == TAGS and "mention" in config.chosen:
        mentions = mentions_of(list(words_in(read_tags(config))))
    return cheap_method(config.method, config.share, config.model, config.chosen, mentions)


def _by_models(config: AugmentConfig) -> Method:
    from engine import dist
    from engine.data.augment.mlm import MaskedWords
    from engine.data.augment.translate import BackTranslation, Translator
    from engine.predict.worker import device_of

    dist.set_threads(max(dist.local_size(os.environ), config.processes), None)
    device = device_of(config.device)
    if config.method == "translate":
        assert config.forward is not None
        assert config.back is not None
        forward = Translator(config.forward, "forward", config.beams, device)
        return BackTranslation(forward, Translator(config.back, "back", config.beams, device))
    assert config.model is not None
    return MaskedWords(config.model, config.share, config.chosen, config.top, device)


def make_rows(config: AugmentConfig, examples: Examples, rows: Sequence[Row], copies: Sequence[int]) -> Made:
    """The rows of a chunk, each followed by its copies.

    Args:
        copies: of each row.
    """
    if config.method == "pseudo_labels":
        return _labelled(config, examples, rows)
    texts = [examples.texts(row) for row in rows]
    seen = [{_content(own)} for own in texts]
    found: dict[tuple[int, int], Row] = {}
    pending = [(index, copy) for index, count in enumerate(copies) for copy in range(1, count + 1)]
    for attempt in range(ATTEMPTS):
        fresh: dict[tuple[int, int], Row] = {}
        for (index, copy), new in zip(pending, _changed(config, rows, texts, pending, attempt), strict=True):
            content = _content(new)
            if content not in seen[index]:
                seen[index].add(content)
                fresh[index, copy] = examples.row(rows[index], new)
        found |= _kept(config, examples, fresh)
        pending = [each for each in pending if each not in found]
        if not pending:
            break
    return _in_order(config, rows, found, len(pending))


def _kept(config: AugmentConfig, examples: Examples, new: Mapping[Any, Row]) -> dict[Any, Row]:
    """Those of new rows that the classifier, where there is one, finds to be of their class."""
    if config.keep_by is None or not new:
        return dict(new)
    from launch.augment.judge import keeps_class

    opinions = judge(config, examples)[0](list(new.values()))
    pairs = zip(new.items(), opinions, strict=True)
    return {key: row for (key, row), opinion in pairs if keeps_class(config, row, opinion)}


def _labelled(config: AugmentConfig, examples: Examples, rows: Sequence[Row]) -> Made:
    """The rows whose class is sure, with it."""
    opinions = judge(config, examples)[0](rows)
    sure = [place for place, opinion in enumerate(opinions) if opinion[CONFIDENCE] >= config.confidence]
    marks = [{config.label: opinions[place]["label"], CONFIDENCE: opinions[place][CONFIDENCE]} for place in sure]
    return Made([rows[place] for place in sure], marks, len(sure), len(rows) - len(sure))


def judge(config: AugmentConfig, examples: Examples) -> tuple[Judge, str]:
    """The classifier of this process, and its fingerprint.

    Raises:
        UserError: see `judge_of`.
    """
    assert isinstance(examples, Texts)
    return _judge(config, examples.columns)


@functools.lru_cache(maxsize=1)
def _judge(config: AugmentConfig, columns: tuple[str, ...]) -> tuple[Judge, str]:
    """The same, kept for the next chunk."""
    from launch.augment.judge import judge_of

    return judge_of(config, columns)


def _content(texts: Sequence[Words]) -> tuple[str, ...]:
    return tuple(words.text for words in texts)


def _changed(
    config: AugmentConfig,
    rows: Sequence[Row],
    texts: Sequence[Sequence[Words]],
    wanted: Sequence[tuple[int, int]],
    attempt: int,
) -> list[list[Words]]:
    """New texts of each wanted copy, (index of the row, number of the copy)."""
    if not wanted:
        return []
    method = method_of(config)
    positions = np.array([rows[index].position for index, _ in wanted])
    numbers = np.array([copy for _, copy in wanted])
    fields = []
    for field in range(len(texts[0])):
        draws = draws_for(config.seed, field, positions, numbers, attempt)
        fields.append(method([texts[index][field] for index, _ in wanted], draws))
    return [list(each) for each in zip(*fields, strict=True)]


def _in_order(config: AugmentConfig, rows: Sequence[Row], found: dict[tuple[int, int], Row], missing: int) -> Made:
    own = {} if config.only_new else {(index, 0): row for index, row in enumerate(rows)}
    placed = sorted({**own, **found}.items())
    marks = [{MARK: copy} for (_, copy), _ in placed]
    return Made([row for _, row in placed], marks, len(found), missing)
