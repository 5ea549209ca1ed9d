"""Work in a process of its own that is the one rank of a run: DeepSpeed's process group must not stay in the tests'."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool

from tensorboard.summary.writer import event_file_writer

from engine.train.ranks.join import start_ranks
from launch.launcher import single_process_variables


def _start(port: int) -> None:
    # files of one second are read in the order of their names, and a process that trains many times begins a tenth file
    event_file_writer._global_uid = event_file_writer.AtomicCounter(1000)
    os.environ |= single_process_variables(port)
    start_ranks()


@contextmanager
def single_rank(port: int) -> Iterator[Pool]:
    """A pool whose one worker has joined a process group of one; `apply` takes functions of modules."""
    with multiprocessing.get_context("spawn").Pool(1, initializer=_start, initargs=(port,)) as pool:
        yield pool
