"""The plans of a run's epochs, each made in a thread of its own before it is needed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Generic, TypeVar

P = TypeVar("P")


class EpochPlans(dict[int, Future[P]], Generic[P]):
    """Plans by epoch; beside the newest only that of the epoch before it is kept."""

    def __init__(self, make: Callable[[int], P]) -> None:
        """
        Args:
            make: the plan of an epoch; what it raises, `plan` raises.
        """
        super().__init__()
        self._make = make

    def plan(self, epoch: int) -> P:
        """The plan of an epoch, waiting for it."""
        self.begin(epoch)
        return self[epoch].result()

    def begin(self, epoch: int) -> None:
        """Begin to make the plan of an epoch, unless that was done."""
        if epoch in self:
            return
        for other in [other for other in self if other != epoch - 1]:
            del self[other]
        self[epoch] = _in_thread(partial(self._make, epoch))


def _in_thread(work: Callable[[], P]) -> Future[P]:
    """The result of `work` in a daemon thread: unlike those of a pool, it doesn't keep the process from ending."""
    future: Future[P] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result gets it
            future.set_exception(error)

    Thread(target=run, daemon=True, name="epoch plan").start()
    return future
