"""The processes that make micro-batches: how they begin, and that they end with the process that uses them.

They ignore the signals that ask a run to save and stop, SIGTERM among them. SIGTERM is also what multiprocessing ends
its processes by when the interpreter exits, before it waits for them without a limit; so here it sends SIGKILL instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import weakref
from functools import partial
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

PR_SET_PDEATHSIG = 1
#: signals that ask the ranks to save and stop, and that may be sent to a whole process group
PASSED_OVER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class _Handle(Popen):
    """The handle of a process that `terminate` ends for certain."""

    def terminate(self) -> None:
        self.kill()


class _Process(ForkProcess):
    @staticmethod
    def _Popen(process: Any) -> Popen:  # noqa: N802 - multiprocessing's name
        return _Handle(process)


class LoaderContext(ForkContext):
    """The multiprocessing context of a DataLoader; it remembers the processes that it made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[ForkProcess] = []

    def Process(self, *arguments: Any, **named: Any) -> ForkProcess:  # type: ignore[override]  # noqa: N802
        process = _Process(*arguments, **named)
        self._made.append(process)
        return process

    def end(self) -> None:
        """Kill the processes, where no iterator exists yet to end them; torch's SIGCHLD handler would see crashes."""
        watch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in self._made:
            if process.pid is not None:
                process.kill()
                process.join()
        signal.signal(signal.SIGCHLD, watch)


def start_iterator(loader: DataLoader[Any]) -> Any:
    """The iterator of a DataLoader, which at once requests the first items; no process is left if that fails."""
    try:
        return iter(loader)
    except BaseException:
        if isinstance(loader.multiprocessing_context, LoaderContext):
            loader.multiprocessing_context.end()
        raise


def prepare_worker(parent: int, _worker: int) -> None:
    """Set up a loader process after its fork.

    A signal to the whole process group asks the trainer to save and stop; it must not end its loaders first. Garbage
    that the fork copied, such as another loader, belongs to the trainer: collecting it here would hang. The process
    dies with a trainer that is killed: nobody would read the pipe that it fills, and it would wait forever.

    Args:
        parent: process id of the trainer, which may be dead by now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()
    for number in PASSED_OVER:
        signal.signal(number, signal.SIG_IGN)


def worker_preparation() -> partial[None]:
    """The function that a DataLoader of this process calls in each of its loader processes."""
    return partial(prepare_worker, os.getpid())


def kill_workers(iterator: Any) -> None:
    """Kill workers of which one may hang in its fork, where no other signal reaches it.

    torch would take their deaths for a crash and raise in the main thread, so it is made to forget them first.
    """
    signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
    iterator._worker_pids_set = False
    for process in iterator._workers:
        process.kill()


def end_workers(iterator: weakref.ref[Any]) -> None:
    """Ask the workers through their queues to end, now and not when the iterator is garbage-collected.

    The traceback of an error may keep the iterator alive until the interpreter exits.
    """
    alive = iterator()
    if alive is not None and hasattr(alive, "_shutdown_workers"):  # an iterator without workers has no such method
        with contextlib.suppress(AttributeError):  # an interrupt may have left the iterator half made
            alive._shutdown_workers()
