"""OpenMP's threads on a machine that other programs use too: they spin less at barriers while others need the cores.

At a barrier libgomp's threads spin for some 10 ms, and one thread that waits for a core keeps all the others spinning
on theirs: with one more busy program than there are cores, a step takes many times as long. Always spinning less is no
remedy: threads that sleep between the operators of a step must be woken for each of them, which costs more than the
2 % that a run alone on the machine may lose (`python -m benchmarks.neighbour` measures both). So a Python thread
watches how long this process's threads wait for cores, and shortens the spins while they do.

libgomp reads its environment variables once, when it is loaded. But at each barrier it checks whether it has more
threads than there are cores, and then spins 100 times instead of 300,000 (GOMP_SPINCOUNT in its manual). So `Crowd`
adds sleeping threads. Nothing is done where the environment sets how to wait, with another OpenMP runtime, or where
Linux doesn't tell how long threads wait.
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
#: environment variables by which a user sets how threads wait
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
#: seconds between two checks
PERIOD = 0.5
#: mean number of threads waiting for a core that tells of a neighbour: more than the first, plus the second per thread
WAITING, WAITING_A_THREAD = 0.25, 0.02
#: seconds with short spins until long ones are tried again; doubled each time that the neighbour is still there
SHORTEST, LONGEST = 5.0, 40.0
#: largest number of sleeping threads; a rank with a small share of the cores would need more, and goes without
SLEEPERS = 64


@dataclass
class Patience:
    """Decides at each check whether spins should be short; all times are in seconds."""

    threads: int
    is_short: bool = False
    until: float = -math.inf
    pause: float = SHORTEST

    def look(self, waiting: float, now: float) -> bool:
        """Whether spins should be short from now on.

        Args:
            waiting: mean number of our threads that waited for a core since the last check.
            now: the present time.
        """
        if self.is_short:
            self.is_short = now < self.until
        elif waiting > WAITING + WAITING_A_THREAD * self.threads:
            still_there = now - self.until <= 2 * PERIOD
            self.pause = min(2 * self.pause, LONGEST) if still_there else SHORTEST
            self.is_short, self.until = True, now + self.pause
        return self.is_short


class Crowd:
    """Sleeping threads by which libgomp has more threads than cores, and so spins less; `leave` ends them."""

    def __init__(self, gomp: ctypes.CDLL, size: int) -> None:
        self._gomp, self._size, self._over = gomp, size, threading.Event()
        self._thread = threading.Thread(target=self._stay, name="crowd", daemon=True)
        self._thread.start()

    def _stay(self) -> None:
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # called with a null pointer it does nothing
        self._gomp.GOMP_parallel(nothing, None, self._size, 0)
        self._over.wait()  # the OpenMP team of a thread lives as long as the thread

    def leave(self) -> None:
        self._over.set()
        self._thread.join()


def crowd_size(threads: int, cores: int) -> int | None:
    """Size of a second OpenMP team that makes more threads than `cores` in all; None where it would be too large."""
    size = max(2, cores - threads + 2)
    return size if size - 1 <= SLEEPERS else None


def find_gomp() -> ctypes.CDLL | None:
    """The libgomp that torch uses; None if it uses another runtime."""
    library = ctypes.CDLL(torch._C.__file__)  # symbols are also looked up in the libraries that it depends on
    if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_blocktime"):
        return None
    library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    library.GOMP_parallel.restype = None
    return library


def waited(tasks: Path = TASKS) -> float | None:
    """Seconds that this process's runnable threads have waited for a core; None where the kernel doesn't count them."""
    total, counted = 0, False
    for task in tasks.glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, ValueError, IndexError):  # the thread has just ended, or this is not Linux
            continue
        counted = True
    return total / 1e9 if counted else None


def give_way(threads: int, environment: Mapping[str, str] = os.environ) -> threading.Event | None:
    """Begin to watch how long this process's threads wait, until the returned event is set or the process ends.

    Args:
        threads: number of OpenMP threads of this process; a single one waits at no barrier.
        environment: the environment variables.

    Returns:
        The event that ends the watch; None where nothing is watched.
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
