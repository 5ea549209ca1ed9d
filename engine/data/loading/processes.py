"""The processes that make micro-batches: how they begin, and that they end with the process that uses them.

They pass over the signals that ask a run to save and stop, SIGTERM among them. By SIGTERM multiprocessing would end
them when the interpreter exits, and then wait for them without end; so here its request is a SIGKILL.
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
#: what a whole process group may be sent to ask its ranks to save and stop
PASSED_OVER = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class _Handle(Popen):
    """A process that can be ended for certain."""

    def terminate(self) -> None:
        self.kill()


class _Process(ForkProcess):
    @staticmethod
    def _Popen(process: Any) -> Popen:  # noqa: N802 - multiprocessing's name
        return _Handle(process)


class LoaderContext(ForkContext):
    """Where a DataLoader takes its processes from; remembers them."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[ForkProcess] = []

    def Process(self, *arguments: Any, **named: Any) -> ForkProcess:  # type: ignore[override]  # noqa: N802
        process = _Process(*arguments, **named)
        self._made.append(process)
        return process

    def end(self) -> None:
        """Kill what was started, where no iterator is there to end it; torch would take the deaths for crashes."""
        watch = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for process in self._made:
            if process.pid is not None:
                process.kill()
                process.join()
        signal.signal(signal.SIGCHLD, watch)


def start_iterator(loader: DataLoader[Any]) -> Any:
    """The iterator of a DataLoader, which already asks for the first items; no process is left if that fails."""
    try:
        return iter(loader)
    except BaseException:
        if isinstance(loader.multiprocessing_context, LoaderContext):
            loader.multiprocessing_context.end()
        raise


def prepare_worker(parent: int, _worker: int) -> None:
    """Set up a fresh loader process.

    A signal to the whole process group asks the trainer to save and stop; it must not end its loaders first. And
    garbage that the fork copied, another loader perhaps, belongs to the trainer: collected here, it would hang.
    A trainer that is killed takes it along: what it has sent fills the pipe; without a reader it would wait forever.

    Args:
        parent: the trainer, which may be dead by now.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(1)
    gc.freeze()
    for number in PASSED_OVER:
        signal.signal(number, signal.SIG_IGN)


def worker_preparation() -> partial[None]:
    """What a DataLoader of this process calls in each of its processes."""
    return partial(prepare_worker, os.getpid())


def kill_workers(iterator: Any) -> None:
    """End workers of which one may be stuck in its fork, where it heeds no other signal.

    torch would take their deaths for a crash and raise in the main thread, unless it has forgotten them before.
    """
    signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
    iterator._worker_pids_set = False
    for process in iterator._workers:
        process.kill()


def end_workers(iterator: weakref.ref[Any]) -> None:
    """Ask the workers through their queues to end, now and not when the iterator happens to be collected.

    A crash's traceback may keep it until the interpreter exits.
    """
    alive = iterator()
    if alive is not None and hasattr(alive, "_shutdown_workers"):  # one without workers has no such method
        with contextlib.suppress(AttributeError):  # of an iterator that an interrupt has left half made
            alive._shutdown_workers()
