"""The supervision of a run: the loop's calls at step boundaries about stops, faults, hangs and slow ranks.

One all-reduce per step sums the loss and the requests to stop over the ranks, so all ranks act on the same values. On a
GPU it waits for the device, so it is done every fault.check_interval steps only, unless a policy needs every loss.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from engine import dist
from engine.config import FaultConfig
from engine.data.loading.source import Cursor, MicroBatch
from engine.durable import write_atomically
from engine.errors import RunError
from engine.train.log import say
from engine.train.watch import preempt
from engine.train.watch.faults import FaultPolicy
from engine.train.watch.heartbeat import State
from engine.train.watch.preempt import Stop, Stopped
from engine.train.watch.session import Session
from engine.train.watch.slow_ranks import SlowRanks
from engine.zero.engine import ZeroEngine

#: steps between two checks on GPUs, unless fault.check_interval says otherwise
GPU_INTERVAL = 10
PENDING_FILE = "pending_evaluation"


class Guard:
    """Supervises the steps of one start on this rank."""

    def __init__(self, session: Session, zero: ZeroEngine, start: int | None, total: int) -> None:
        """Called once the engine is built and the run's folder exists.

        Args:
            session: this start of the run.
            zero: the engine.
            start: step of the checkpoint that the run resumes from; None for a new run.
            total: steps of the run.
        """
        self.session, self.world, self.output = session, session.world, session.output
        self.watchdog, self.heartbeat = session.watchdog, session.heartbeat
        self.config: FaultConfig = session.config
        self.scheduled = preempt.is_scheduled(os.environ)
        self.interval = self.config.check_interval or (1 if self.world.device.type == "cpu" else GPU_INTERVAL)
        self.slow = SlowRanks(self.config.slow_rank_factor, self.world.device) if self.world.size > 1 else None
        self.stop: Stop | None = None
        self.policy = FaultPolicy(zero, self.config, self.output, start, is_main=self.world.is_main)
        if start is None and self.world.is_main:
            (self.output / PENDING_FILE).unlink(missing_ok=True)
        session.built(start or 0, total)

    @contextlib.contextmanager
    def doing(self, state: State) -> Iterator[None]:
        """The heartbeat's state inside (saving, evaluating); afterwards it is the former one again."""
        before = self.heartbeat.state
        self.watchdog.feed(state)
        self.heartbeat.update(state)
        yield
        self.watchdog.feed("training")
        self.heartbeat.update("training" if before == "starting" else before)  # type: ignore[arg-type]

    def check(self) -> None:
        """Check between steps whether all ranks are to stop; collective.

        Raises:
            Stopped: on every rank.
        """
        self._sum_up([])
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Stop if the last check found that all ranks are to stop.

        Raises:
            Stopped: on every rank.
        """
        if self.stop is not None:
            raise Stopped(self.stop)

    def _sum_up(self, values: Sequence[Tensor]) -> list[float]:
        """Sum scalar tensors and the requests to stop over the ranks; collective.

        Returns:
            The sums of `values`; the requests are kept.
        """
        device = self.world.device
        counts = torch.tensor(self.session.request.counts(), dtype=torch.float64, device=device)
        local = torch.cat([*(value.double().reshape(1) for value in values), counts])
        summed: list[float] = dist.sum_over_ranks(local).tolist()
        self.stop = self.stop or preempt.agreed_stop(summed[len(values) :], self.scheduled)
        return summed[: len(values)]

    def before_update(self, step: int, cursor: Cursor, share: Tensor) -> None:
        """Check the requests to stop and the loss before the update of a step; collective.

        Args:
            step: number of the step, from 1.
            cursor: position in the data before its global batch.
            share: this rank's share of the loss of the global batch, a scalar tensor.

        Raises:
            RunError: the loss is not finite, and the policy is to stop.
        """
        self.watchdog.feed("update")
        if self.config.judges_updates or step % self.interval == 0:
            (loss,) = self._sum_up([share])
            self.policy.judge(step, cursor, loss)

    def after_update(self, step: int, cursor: Cursor) -> bool:
        """Whether the update of a step was applied: false if it was skipped for a fault.

        Raises:
            RunError: the gradient is not finite and the policy is to stop.
            RollBack: the run must go back to a checkpoint; on every rank.
        """
        self.watchdog.feed("step", step)
        fault = self.policy.after_update(step, cursor)
        if fault is not None:
            say(f"{fault}: its update was skipped")
        self.heartbeat.update("training", step=step)
        return fault is None

    def fetched(self, batches: Iterator[MicroBatch], count: int) -> Iterator[MicroBatch]:
        """The next micro-batches, on the device; each is a sign of life, also where a task fetches all at once."""
        for batch in islice(batches, count):
            self.watchdog.feed("forward pass")
            yield batch.to(self.world.device)

    @contextlib.contextmanager
    def evaluating(self, step: int) -> Iterator[None]:
        """Encloses an evaluation after `step` steps; if it is interrupted, the next start repeats it."""
        with self.doing("evaluating"):
            try:
                self.stop_if_asked()
                yield
            except Stopped:
                self._note_evaluation(step, pending=True)
                raise
            self._note_evaluation(step, pending=False)

    def skips(self, cursor: Cursor) -> bool:
        """Whether the global batch at this position is skipped after a rollback."""
        return cursor.consumed in self.policy.left_out

    def evaluated(self, batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """The micro-batches of an evaluation; between them all ranks may stop together; collective.

        Raises:
            Stopped: on every rank, which have equally many batches.
        """
        for index, batch in enumerate(batches):
            self.watchdog.feed("evaluating")
            self.heartbeat.update("evaluating")
            if index % self.interval == 0:
                self.check()
            yield batch

    def saved(self) -> None:
        """Called when a checkpoint was written or is being written."""
        self.policy.saved()

    def point(self, loss: float, tokens_per_second: float, steps: int) -> None:
        """Called at each point of the curves; reports slow ranks; collective.

        Args:
            loss: mean loss of the point.
            tokens_per_second: throughput over all ranks.
            steps: steps that the point covers.
        """
        self.heartbeat.update(loss=loss, tokens_per_second=tokens_per_second)
        if self.slow is not None:
            times = dist.gather_objects(self.slow.seconds() / steps)
            if slow := self.slow.judge(times):
                hosts = dist.gather_objects(socket.gethostname())
                for rank in slow:
                    say(self.slow.tell(rank, times, hosts[rank]))

    def own_time(self) -> contextlib.AbstractContextManager[None]:
        """Measures the time of work that waits for no other rank."""
        return self.slow.measured() if self.slow is not None else contextlib.nullcontext()

    def _note_evaluation(self, step: int, *, pending: bool) -> None:
        if self.world.is_main and pending:
            write_atomically(self.output / PENDING_FILE, f"{step}\n")
        elif self.world.is_main:
            (self.output / PENDING_FILE).unlink(missing_ok=True)


def pending_evaluation(output: Path, step: int) -> bool:
    """Whether the run in this folder was interrupted in the evaluation after `step` steps."""
    try:
        return int(json.loads((output / PENDING_FILE).read_text())) == step
    except (OSError, ValueError):
        return False


def unsaved(stop: Stop, step: int) -> RunError:
    """The error of a stop where the user wants no checkpoints: the run is lost, so its exit code must not say done."""
    return RunError(f"stopped by {stop.reason} at step {step}; nothing is saved, since train.save_interval is null")
