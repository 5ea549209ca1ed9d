"""Where blocks of work run: in this process, in processes of this machine, or in MPI ranks over nodes.

All three have the interface of `concurrent.futures`, so the code that submits work doesn't know which it has.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as connection_wait
from typing import Any, TypeVar, cast

T = TypeVar("T")

#: variables that tell a rank the size of its job: Open MPI; MPICH and Intel MPI
MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class InlineExecutor(Executor):
    """Runs each task when it is submitted, in the calling process."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def mpi_size() -> int:
    """Number of ranks that `mpirun` started; 1 without it."""
    values = (os.environ.get(name, "") for name in MPI_SIZE_VARIABLES)
    return next((int(value) for value in values if value.isdigit()), 1)


@contextmanager
def open_executor(workers: int | None = None) -> Iterator[tuple[Executor, int] | None]:
    """The executor for this process and its number of workers; None on an MPI rank that only serves.

    Args:
        workers: processes of this machine, all its cores when None, this process alone when 0 or 1; under
            `mpirun` with several ranks they are the workers and this is ignored.
    """
    if mpi_size() > 1:
        with _mpi() as executor:
            yield executor
        return
    count = available_cores() if workers is None else workers
    if count <= 1:
        yield InlineExecutor(), 1
        return
    # spawn: tokenizers and Arrow start threads, which a fork would lose
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        yield pool, count


@contextmanager
def _mpi() -> Iterator[tuple[Executor, int] | None]:
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    _one_thread()
    # a rank that serves stays in the `with` line until rank 0 is done
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else (cast(Executor, executor), MPI.COMM_WORLD.size - 1)


def _one_thread() -> None:
    """Keep a worker's tokenizer to one thread: the workers fill the cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _start_worker() -> None:
    _one_thread()
    # Ctrl-C reaches the whole terminal group; the parent decides what it means
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None
    threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _follow(sentinel: int) -> None:
    """End this process with its parent: a pool's workers outlive a parent that was killed."""
    connection_wait([sentinel])
    os._exit(1)
