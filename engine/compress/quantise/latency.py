"""How long models take on this machine, in turn, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engine.compress.quantise.graph import Feed

#: batches that are timed, and how often
ROUNDS = {1: 60, 32: 12}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a batch."""

    median: float
    p95: float


def latencies(sessions: Mapping[str, Any], feed: Feed, rounds: int) -> dict[str, Latency]:
    """Of each session, from so many rounds in which all of them compute the same batch."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for count in range(rounds + 1):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            if count:
                seconds[name].append(time.perf_counter() - start)
    return {
        name: Latency(1000 * float(np.median(values)), 1000 * float(np.quantile(values, 0.95)))
        for name, values in seconds.items()
    }


def timed(sessions: Mapping[str, Any], feed: Feed) -> dict[int, dict[str, Latency]]:
    """Latencies of sessions by the size of a batch, which is the same sample so many times."""
    return {batch: latencies(sessions, repeated(feed, batch), rounds) for batch, rounds in ROUNDS.items()}


def typical(feeds: Sequence[Feed]) -> Feed:
    """The one of median length."""
    lengths: NDArray[np.int64] = np.array([feed["input_ids"].shape[-1] for feed in feeds])
    return feeds[int(np.argsort(lengths, kind="stable")[len(lengths) // 2])]


def repeated(feed: Feed, count: int) -> dict[str, NDArray[Any]]:
    """A feed of one sample as a batch of so many."""
    return {name: np.repeat(values[:1], count, axis=0) for name, values in feed.items()}
