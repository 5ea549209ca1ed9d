"""A rank that waits outside of Python ends itself once another rank on its machine has gone.

gloo raises an error in a rank that waits for one that has died. NCCL raises none: the main thread stays in a call of
CUDA, where it hears no signal either. So a daemon thread looks whether the processes of this machine's other ranks
still run. It knows them by number and start time, since a number may belong to another process later.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from engine import dist

#: seconds between two looks
PERIOD = 2.0
#: seconds for what ends a rank in order: an error that gloo raises, a save that finishes, a launcher's signal
GRACE = 10.0
#: as of a rank in which a collective fails since another one has gone
EXIT_CODE = 1
#: states in /proc of a process that doesn't run any more
ENDED = "ZX"


@dataclass(frozen=True)
class Process:
    """A rank's process."""

    rank: int
    host: str
    machine: str
    """within which numbers of processes are comparable: this start of the kernel, and a namespace of processes"""
    number: int
    started: int
    """clock ticks between the kernel's start and its own"""


def own_process(rank: int) -> Process | None:
    """This process; None where there is no Linux's /proc."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{kernel} {Path('/proc/self/ns/pid').readlink()}"
        return Process(rank, socket.gethostname(), machine, os.getpid(), _stat(os.getpid())[1])
    except OSError:
        return None


def is_running(number: int, started: int | None = None) -> bool:
    """Whether a process of this machine runs, and is no zombie, for which its parent hasn't waited yet.

    Args:
        number: its number.
        started: as in `Process`; a process with this number and another start is not the one that is meant.
    """
    try:
        os.kill(number, 0)
        state, now = _stat(number)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, IndexError):  # it is another user's, it has just ended, or there is no /proc
        return True
    return state not in ENDED and started in (None, now)


def _stat(number: int) -> tuple[str, int]:
    """State and start time of a process (proc_pid_stat(5), fields 3 and 22)."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def neighbours(own: Process | None, ranks: Sequence[Process | None]) -> list[Process]:
    """The other ranks whose processes this one can see."""
    known = [process for process in ranks if process is not None and own is not None]
    return [process for process in known if process != own and process.machine == own.machine]  # type: ignore[union-attr]


class PeerWatch:
    """Looks after the other ranks of this machine, from `start` until `end`."""

    def __init__(self, on_loss: Callable[[], object], period: float = PERIOD, grace: float = GRACE) -> None:
        """
        Args:
            on_loss: called before the process ends, in the thread.
            period: seconds between two looks.
            grace: seconds from the loss of a rank to the end of this one.
        """
        self._on_loss, self._period, self._grace = on_loss, period, grace
        self._over = threading.Event()

    def start(self, rank: int) -> None:
        """Get to know the other ranks, and look after those of this machine; collective."""
        own = own_process(rank)
        self.watch(rank, neighbours(own, dist.gather_objects(own)))

    def watch(self, rank: int, peers: Sequence[Process]) -> None:
        """Look after these processes, as the rank with this number."""
        if peers:
            threading.Thread(target=self._watch, args=(rank, peers), name="peers", daemon=True).start()

    def end(self) -> None:
        """Look no more: this rank needs the others no longer, or meets an error of its own."""
        self._over.set()

    def _watch(self, rank: int, peers: Sequence[Process]) -> None:
        while not self._over.wait(self._period):
            gone = [peer for peer in peers if not is_running(peer.number, peer.started)]
            speaks = rank == min([rank, *(peer.rank for peer in peers if peer not in gone)])
            # Those that don't speak wait longer, since the launcher ends all once the first has ended.
            if gone and not self._over.wait(self._grace + (0.0 if speaks else 2 * self._period)):
                self._leave(rank, gone if speaks else [])

    def _leave(self, rank: int, gone: Sequence[Process]) -> NoReturn:
        try:
            if gone:
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, told(rank, gone).encode())
            self._on_loss()
        finally:
            os._exit(EXIT_CODE)


def told(rank: int, gone: Sequence[Process]) -> str:
    """The line about ranks that have gone, from one that needs them."""
    names = ", ".join(f"rank {process.rank} (process {process.number})" for process in gone)
    return (
        f"error: {names} on {gone[0].host} has gone, so rank {rank} can't go on; look at what it printed last, and "
        f"with dmesg whether the kernel killed it for memory; exit code {EXIT_CODE}\n"
    )
