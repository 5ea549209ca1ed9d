"""OpenMP's threads beside other programs: they spin while they wait, except while others want their cores.

libgomp's threads spin for some 10 ms where they wait for one another, and a thread that waits for a core keeps all of
them spinning on theirs: with one more busy program than there are cores, a step takes many times as long. Short spins
for good are no remedy: threads that sleep between the operators of a step must be woken for each of them, which costs
more than the 2 % that a run alone may lose (`python -m benchmarks.neighbour` measures both). So a thread of Python
looks how long this process's threads wait for cores, and shortens the spins while they do.

libgomp reads its variables once, when it is loaded. What it looks at each time is whether it has more threads than
there are cores: then it spins 100 times instead of 300,000 (GOMP_SPINCOUNT in its manual). Hence `Crowd`. Nothing is
done where the environment says how to wait, with another OpenMP runtime, or where Linux doesn't tell what threads wait.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

TASKS = Path("/proc/self/task")
#: what a user says how to wait by
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
#: seconds between two looks
PERIOD = 0.5
#: threads waiting for a core, on average over a period, that mean a neighbour: so many, and so many a thread of ours
WAITING, WAITING_A_THREAD = 0.25, 0.02
#: seconds with short spins until long ones are tried again; twice as many each time that the neighbour is still there
SHORTEST, LONGEST = 5.0, 40.0
#: threads that are kept asleep at most; where a rank has a small part of the cores more would be needed
SLEEPERS = 64


@dataclass
class Patience:
    """Decides, look by look, whether spins should be short; time is in seconds."""

    threads: int
    is_short: bool = False
    until: float = -math.inf
    pause: float = SHORTEST

    def look(self, waiting: float, now: float) -> bool:
        """Whether spins should be short from now on.

        Args:
            waiting: threads of ours that waited for a core, on average since the last look.
        """
        if self.is_short:
            self.is_short = now < self.until
        elif waiting > WAITING + WAITING_A_THREAD * self.threads:
            still_there = now - self.until <= 2 * PERIOD
            self.pause = min(2 * self.pause, LONGEST) if still_there else SHORTEST
            self.is_short, self.until = True, now + self.pause
        return self.is_short


class Crowd:
    """More threads of libgomp's than cores, all asleep, which makes it shorten its spins; it ends them with `leave`."""

    def __init__(self, gomp: ctypes.CDLL, size: int) -> None:
        self._gomp, self._size, self._over = gomp, size, threading.Event()
        self._thread = threading.Thread(target=self._stay, name="crowd", daemon=True)
        self._thread.start()

    def _stay(self) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
        self._gomp.GOMP_parallel(nothing, None, self._size, 0)
        self._over.wait()  # a thread's team lives as long as the thread

    def leave(self) -> None:
        self._over.set()
        self._thread.join()


def crowd_size(threads: int, cores: int) -> int | None:
    """Threads of a second team that make more than `cores` in all; None where they would be too many to keep."""
    size = max(2, cores - threads + 2)
    return size if size - 1 <= SLEEPERS else None


def find_gomp() -> ctypes.CDLL | None:
    """The libgomp that torch uses; None if it uses another runtime."""
    library = ctypes.CDLL(torch._C.__file__)  # looks a name up in what it depends on too
    if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_blocktime"):
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def waited(tasks: Path = TASKS) -> float | None:
    """Seconds that this process's threads have waited for a core while they could run; None where nobody counts."""
    total, counted = 0, False
    for task in tasks.glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, ValueError, IndexError):  # a thread that has just ended, or another system
            continue
        counted = True
    return total / 1e9 if counted else None


def give_way(threads: int, environment: Mapping[str, str] = os.environ) -> threading.Event | None:
    """Begin to watch what this process's threads wait, until the returned event is set or the process ends.

    Args:
        threads: OpenMP's in this process; one has nothing to wait for.
    """
    gomp = find_gomp()
    size = crowd_size(threads, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0)
    if threads < 2 or gomp is None or size is None or any(environment.get(name) for name in VARIABLES):
        return None
    over = threading.Event()
    threading.Thread(target=_watch, args=(gomp, size, Patience(threads), over), name="neighbours", daemon=True).start()
    return over


def _watch(gomp: ctypes.CDLL, size: int, patience: Patience, over: threading.Event) -> None:
    crowd: Crowd | None = None
    before, then = waited(), time.monotonic()
    while before is not None and not over.wait(PERIOD):
        after, now = waited(), time.monotonic()
        if after is None:
            break
        is_short = patience.look((after - before) / (now - then), now)
        before, then = after, now
        if is_short and crowd is None:
            crowd = Crowd(gomp, size)
        elif crowd is not None and not is_short:
            crowd.leave()
            crowd = None
    if crowd is not None:
        crowd.leave()
