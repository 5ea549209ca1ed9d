"""The queue of requests and the thread that computes them: what waits at a time is computed in the same packed batches.

There is one thread, because a forward pass uses all cores (or the GPU) by itself. A request is encoded and decoded on
its own, and only the sequences are put together: so a bad row concerns its own request alone.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from engine import dist
from engine.errors import UserError
from engine.predict.batches import compute_parts
from engine.predict.predictor import Encoded, Predictor
from engine.predict.rows import Row
from engine.predict.worker import load
from launch.serve.metrics import Metrics
from launch.serve.options import ServeConfig

log = logging.getLogger("zerobert.serve")


class FullQueueError(Exception):
    """There is no room for a request's rows."""


@dataclass(frozen=True)
class Answer:
    """What became of a request."""

    columns: list[dict[str, Any]]
    """the new columns of each row"""
    truncated: int
    """rows whose text was cut"""


@dataclass
class Job:
    """A request that waits."""

    rows: Sequence[Row]
    future: Future[Answer] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Opens the model in a thread of its own, and computes there what `submit` gives it.

    Attributes:
        ready: set when the model is open and has computed a first row.
        failure: what kept it from that.
        threads: that compute.
    """

    def __init__(self, predictor: Predictor, device: torch.device, config: ServeConfig, metrics: Metrics) -> None:
        self.ready = threading.Event()
        self.failure: Exception | None = None
        self.threads = dist.set_threads(1, config.threads)
        self._predictor, self.device, self._config, self._metrics = predictor, device, config, metrics
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._model: torch.nn.Module

    def start(self, first: Mapping[str, Any], begun: Callable[[], object], failed: Callable[[], object]) -> None:
        """Open the model.

        Args:
            first: a row to compute before any other: the first one takes long, for kernels are compiled and memory is
                asked for.
            begun, failed: called in the thread of the model, at either end of opening it.
        """
        self._opening = (first, begun, failed)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread is there."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Rows that wait."""
        with self._changed:
            return self._held()

    def _held(self) -> int:
        return sum(len(job.rows) for job in self._waiting)

    def submit(self, rows: Sequence[Row]) -> Future[Answer]:
        """The answer to come; cancel it if nobody waits for it any more.

        Its exception is a `UserError` if there is anything wrong with a row.

        Raises:
            FullQueueError: too many rows wait.
        """
        job = Job(rows)
        with self._changed:
            self._waiting = deque(each for each in self._waiting if not each.future.cancelled())
            if self._held() + len(rows) > self._config.max_queue:
                raise FullQueueError
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def close(self, patience: float) -> None:
        """End the thread, at the latest after `patience` seconds and behind what it computes."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(patience)

    def _run(self) -> None:
        first, begun, failed = self._opening
        try:
            dist.set_threads(1, self._config.threads)  # OpenMP keeps the number by thread
            self._model = load(self._predictor.model, self._predictor.config, self.device)
            with contextlib.suppress(UserError):  # such a row may be too long for this model
                self._answer([self._predictor.encode([Row(1, first)])])
        except Exception as error:
            self.failure = error
            failed()
            return
        self.ready.set()
        if not self._closed:
            begun()
        while jobs := self._gathered():
            self._compute(jobs)

    def _gathered(self) -> list[Job]:
        """The jobs to compute next: at least one, unless the queue is closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._waiting and self._config.max_wait_ms:
                self._wait_for_more(self._waiting[0].arrived + self._config.max_wait_ms / 1e3)
            jobs, rows = list[Job](), 0
            while self._waiting and (not jobs or rows + len(self._waiting[0].rows) <= self._config.max_batch):
                jobs.append(self._waiting.popleft())
                rows += len(jobs[-1].rows)
            return jobs

    def _wait_for_more(self, deadline: float) -> None:
        while self._held() < self._config.max_batch and not self._closed:
            left = deadline - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _compute(self, jobs: Sequence[Job]) -> None:
        """Answer these jobs, each whatever the others are."""
        encoded: list[tuple[Job, Encoded]] = []
        for job in jobs:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                encoded.append((job, self._encode(job.rows)))
            except Exception as error:
                job.future.set_exception(error)
        if not encoded:
            return
        try:
            answers = self._counted([part for _, part in encoded])
        except Exception:
            log.exception("a batch of %d requests failed; each is computed alone", len(encoded))
            self._compute_apart(encoded)
            return
        for (job, _), answer in zip(encoded, answers, strict=True):
            job.future.set_result(answer)

    def _compute_apart(self, encoded: Sequence[tuple[Job, Encoded]]) -> None:
        """Answer jobs one by one, so that what fails fails alone."""
        for job, part in encoded:
            try:
                job.future.set_result(self._counted([part])[0])
            except Exception as error:
                job.future.set_exception(error)

    def _encode(self, rows: Sequence[Row]) -> Encoded:
        """The sequences of a request.

        Raises:
            UserError: a row that can't be read, or more than a request may have.
        """
        encoded = self._predictor.encode(rows)
        tokens, most = tokens_of([encoded]), self._config.max_tokens
        if tokens > most:
            raise UserError(f"rows: {tokens:,} tokens in all are not allowed; give at most {most:,} a request")
        if encoded.truncated and self._config.long_texts == "refuse":
            length = self._predictor.length
            raise UserError(
                f"rows: {encoded.truncated} of {len(rows)} have more than the {length} tokens that are read; shorten "
                "them, or let the server cut them (long_texts)"
            )
        return encoded

    def _counted(self, parts: Sequence[Encoded]) -> list[Answer]:
        """The answers to encoded requests, which the metrics are told of."""
        begun = time.monotonic()
        answers = self._answer(parts)
        rows, cut = sum(len(each.columns) for each in answers), sum(each.truncated for each in answers)
        self._metrics.batch(len(parts), rows, tokens_of(parts), cut, time.monotonic() - begun)
        return answers

    def _answer(self, parts: Sequence[Encoded]) -> list[Answer]:
        logits = compute_parts(self._predictor, self._model, parts, self.device, self._predictor.config.batch_tokens)
        pairs = zip(parts, logits, strict=True)
        return [Answer(self._predictor.decode(part, own), part.truncated) for part, own in pairs]


def tokens_of(parts: Sequence[Encoded]) -> int:
    """Of all their sequences."""
    return sum(len(ids) for part in parts for ids in part.tokens)
