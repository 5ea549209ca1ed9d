"""The observers of an optimizer step, called in a fixed order.

The order matters for the result. A fault must be recognised before the update that it forbids, the certificate
encloses the update alone, the audit records a step before a fault may undo it, and a step whose update was skipped
does not count in the curves.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.data.loading.source import Cursor, MicroBatch
from engine.tasks.task import StepOutput
from engine.train.audit import Audit
from engine.train.certificate.certificate import UpdateCertificate
from engine.train.curves.meter import Meter
from engine.train.curves.monitor import Monitor, Progress
from engine.train.profile.profile import Profile
from engine.train.profile.recording import BACKWARD, FORWARD, OPTIMIZER
from engine.train.watch.guard import Guard
from engine.zero.engine import ZeroEngine


@dataclass
class StepObserver:
    """Guard, audit, certificate, profile, meter and monitor, as one observer of the training loop's steps.

    Of each step the loop calls `step` around it and, per micro-batch, `before_fetch`, `before_backward`,
    `before_update` and `after_update`; then `after_step`.
    """

    zero: ZeroEngine
    guard: Guard
    audit: Audit
    certificate: UpdateCertificate
    profile: Profile
    meter: Meter
    monitor: Monitor
    progress: Progress
    norm_interval: int
    """optimizer steps between measurements of the norms of weights and update; 0 for none"""
    layer_of: Callable[[str], str]
    """the layer that a parameter counts to in the curves of norms"""

    @contextlib.contextmanager
    def step(self, number: int, rate: float, cursor: Cursor) -> Iterator[None]:
        """One optimizer step.

        Args:
            number: its number, from 1.
            rate: its learning rate.
            cursor: position in the data before its global batch.
        """
        self._number, self._rate, self._cursor = number, rate, cursor
        self._share = torch.zeros((), dtype=torch.float64, device=self.zero.device)
        self._measured: list[tuple[dict[str, Tensor], int]] = []
        self.audit.begin_step()
        with ExitStack() as self._phase:
            yield

    @property
    def measures_norms(self) -> bool:
        """Whether the step under way measures the norms of weights and update."""
        return self.norm_interval > 0 and self._number % self.norm_interval == 0

    def before_fetch(self) -> None:
        """A micro-batch is about to be loaded; loading and forward pass are the rank's own time (see `SlowRanks`)."""
        self.guard.watchdog.feed("forward pass")
        self._phase.enter_context(self.guard.own_time())
        self._phase.enter_context(self.profile.part(FORWARD))

    def before_backward(self, batch: MicroBatch, output: StepOutput) -> None:
        """The forward pass is done.

        Args:
            batch: the micro-batch.
            output: its loss and metrics, as shares of the global batch's.
        """
        self._phase.close()
        self.guard.watchdog.feed("backward pass")
        self.audit.count(0 if batch.again else len(batch.inputs["lengths"]))
        loss = output.loss.detach()
        self._share += loss
        tokens = 0 if batch.again else batch.inputs["input_ids"].numel()
        self._measured.append(({"loss": loss, **output.metrics}, tokens))
        self._phase.enter_context(self.profile.part(BACKWARD))

    def before_update(self, *, last: bool) -> None:
        """The backward pass of a micro-batch is done.

        Args:
            last: whether it was the last one of the global batch, after which the update follows.

        Raises:
            RunError: the loss is not finite, and the policy is to stop.
        """
        self._phase.close()
        if last:
            self.guard.before_update(self._number, self._cursor, self._share)
        self._phase.enter_context(self.profile.part(OPTIMIZER))
        self._phase.enter_context(self.certificate.watch(self._number, self._rate, last_micro_batch=last))

    def after_update(self) -> None:
        """The engine's step call for the micro-batch is done, including the update after the last one.

        Raises:
            RunError: the update differs from the exact one.
        """
        self._phase.close()
        self.meter.exclude(self.certificate.seconds)

    def after_step(self, cursor: Cursor) -> None:
        """The step is done.

        Args:
            cursor: position in the data after its global batch.

        Raises:
            RunError: the audit can't be written, or the gradient is not finite and the policy is to stop.
            RollBack: the run must go back to a checkpoint; on every rank.
        """
        self.audit.end_step(self._number, cursor)
        if self.guard.after_update(self._number, self._cursor):
            for shares, tokens in self._measured:
                self.meter.add(shares, tokens)
            self.meter.end_step()
        if norms := self.zero.norms():
            self.monitor.norms(norms, self.layer_of, self._number)
        self.progress.advance()
