"""What is computed together, and what becomes of requests when one of them is bad."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import UserError
from engine.predict.options import PredictConfig
from engine.predict.predictor import Encoded
from engine.predict.rows import Row
from launch.serve.batcher import Answer, Batcher, FullQueueError
from launch.serve.metrics import Metrics
from launch.serve.options import ServeConfig
from launch.serve.service import open_predictor

WORDS = ["fox", "dog", "code", "quick", "brown", "lazy"]


class Recorded(Batcher):
    """Computes once it may, and keeps how many requests were computed together."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.together: list[int] = []
        self.free, self.computes = threading.Event(), threading.Event()
        self.bad: set[int] = set()
        predictor = open_predictor(PredictConfig(str(folder), "rows", "-", probabilities=True))
        super().__init__(predictor, torch.device("cpu"), ServeConfig(**options), Metrics())

    def _answer(self, parts: Sequence[Encoded]) -> list[Answer]:
        if self.ready.is_set():
            self.together.append(len(parts))
            self.computes.set()
            assert self.free.wait(20)
        if any(len(ids) in self.bad for part in parts for ids in part.tokens):
            raise ArithmeticError("such a length")
        return super()._answer(parts)

    def begin(self) -> Recorded:
        self.start({"text": "a"}, lambda: None, lambda: None)
        assert self.ready.wait(20)
        return self


def rows(*texts: Any) -> list[Row]:
    return [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]


@pytest.fixture
def make(classifier: Path) -> Iterator[Any]:
    made: list[Recorded] = []

    def build(**options: Any) -> Recorded:
        made.append(Recorded(classifier, **options).begin())
        return made[-1]

    yield build
    for each in made:
        each.free.set()
        each.close(20)
        assert not each.alive


def test_what_comes_meanwhile_is_computed_together_up_to_max_batch(make: Any) -> None:
    batcher = make(max_batch=4)
    first = batcher.submit(rows("fox"))
    assert batcher.computes.wait(10)
    later = [batcher.submit(rows(*[word] * count)) for word, count in zip(WORDS, (2, 1, 1, 1, 5, 1), strict=True)]
    assert batcher.waiting == 11
    batcher.free.set()
    answers = [each.result(10) for each in later]
    assert [len(answer.columns) for answer in answers] == [2, 1, 1, 1, 5, 1]
    assert batcher.together == [1, 3, 1, 1, 1]
    alone = [batcher.submit(rows(word)).result(10).columns[0] for word in ("fox", *WORDS)]
    for answer, expected in zip([first.result(10), *answers], alone, strict=True):
        for row in answer.columns:
            assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=2e-5)


def test_a_request_waits_for_others_as_long_as_it_is_told_to(make: Any) -> None:
    batcher = make(max_wait_ms=600, max_batch=3)
    batcher.free.set()
    begun = time.monotonic()
    pair = [batcher.submit(rows("fox")), batcher.submit(rows("dog"))]
    assert all(each.result(10) for each in pair)
    assert time.monotonic() - begun >= 0.6
    begun = time.monotonic()
    full = [batcher.submit(rows("fox")), batcher.submit(rows("dog", "dog"))]
    assert all(each.result(10) for each in full)
    assert time.monotonic() - begun < 0.5
    assert batcher.together == [2, 2]


def test_a_bad_row_concerns_its_own_request(make: Any) -> None:
    batcher = make()
    batcher.free.set()
    good, bad = batcher.submit(rows("fox")), batcher.submit(rows("fox", None))
    assert len(good.result(10).columns) == 1
    with pytest.raises(UserError, match="rows, line 2: no text in column 'text'"):
        bad.result(10)


def test_a_request_that_fails_fails_alone(make: Any) -> None:
    batcher = make()
    batcher.bad = {7}
    blocker = batcher.submit(rows("fox"))
    assert batcher.computes.wait(10)
    good, bad, other = (batcher.submit(rows(text)) for text in ("dog", "fox fox fox fox fox", "code"))
    batcher.free.set()
    assert all(len(each.result(10).columns) == 1 for each in (blocker, good, other))
    with pytest.raises(ArithmeticError):
        bad.result(10)
    assert batcher.together == [1, 3, 1, 1, 1]


def test_a_full_queue_takes_nothing_and_what_was_cancelled_makes_room(make: Any) -> None:
    batcher = make(max_queue=3, max_rows=2)
    computed = batcher.submit(rows("fox"))
    assert batcher.computes.wait(10)
    waits = [batcher.submit(rows("dog")), batcher.submit(rows("dog", "fox"))]
    with pytest.raises(FullQueueError):
        batcher.submit(rows("code"))
    assert waits[1].cancel()
    last = batcher.submit(rows("code", "code"))
    batcher.free.set()
    assert [len(each.result(10).columns) for each in (computed, waits[0], last)] == [1, 1, 2]
    with pytest.raises(CancelledError):
        waits[1].result(10)


def test_what_waits_at_the_end_is_answered(make: Any) -> None:
    batcher = make(max_batch=1, max_wait_ms=60_000)
    waits = [batcher.submit(rows("fox")) for _ in range(3)]
    batcher.free.set()
    batcher.close(20)
    assert [len(each.result(0).columns) for each in waits] == [1, 1, 1]
    assert not batcher.alive
