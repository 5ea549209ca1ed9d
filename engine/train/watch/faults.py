"""Faults of a step: non-finite losses and gradients, and loss spikes, detected before the update, which can be skipped.

A skipped update changes nothing: the client optimizer's `step` isn't called, at any ZeRO stage, so weights, moments
and step counters keep their bits, while DeepSpeed goes through the step as always and clears the gradients. The run
goes on with the next global batch. A rollback also loads the newest checkpoint, and skips that global batch when the
run comes to it again.

    <output>/faults.jsonl         one line per fault: time, step, cursor, kind, value, action
    <output>/recent_losses.json   the losses whose median a spike is judged by, so that a resume judges as the run did
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import FaultConfig
from engine.data.loading.source import Cursor
from engine.durable import write_atomically
from engine.errors import RunError, UserError
from engine.zero.engine import ZeroEngine

Kind = Literal["loss", "gradient", "spike"]
FAULTS_FILE = "faults.jsonl"
LOSSES_FILE = "recent_losses.json"
#: least number of losses for a median
FEWEST_LOSSES = 10
#: windows of losses that are kept, for a resume from a checkpoint that isn't the newest
KEPT_WINDOWS = 4


@dataclass(frozen=True)
class Fault:
    """A fault of one step, and what was done."""

    step: int
    """number of the step, from 1"""
    cursor: Cursor
    """position before its global batch"""
    kind: Kind
    value: float
    action: Literal["stop", "skip", "rollback"]

    def __str__(self) -> str:
        what = {"loss": "the loss became", "gradient": "the gradient norm became", "spike": "the loss jumped to"}
        return f"{what[self.kind]} {self.value:.6g} in step {self.step}"


class RollBack(Exception):  # noqa: N818 - the run goes on
    """The run must go back to its newest checkpoint; raised on every rank."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


def failure(what: Fault | str) -> RunError:
    """The error that ends a run at a non-finite loss or gradient."""
    return RunError(
        f"{what}; resume from a checkpoint with a lower optim.learning_rate or a longer optim.warmup, or with "
        "fault.non_finite skip or rollback (train.detect_anomaly true finds the operation)"
    )


def found_late(step: int, loss: float, norm: float | None) -> RunError | None:
    """The error of a fault that is seen only at a point of the curves, because not every step is checked; else None.

    Args:
        step: steps done.
        loss: the mean loss of the point.
        norm: gradient norm of the last step; None if there is none, or if a non-finite one is no fault.
    """
    if not math.isfinite(loss):
        return failure(f"the loss became {loss} by step {step}")
    if norm is not None and (norm < 0 or not math.isfinite(norm)):  # DeepSpeed gives -1 for a non-finite norm
        return failure(f"the gradient became infinite or NaN by step {step}")
    return None


class SpikeDetector:
    """Compares a loss with the median of the last ones, which it keeps with their steps."""

    def __init__(self, factor: float, window: int) -> None:
        self.factor, self.window = factor, window
        self.losses: deque[tuple[int, float]] = deque(maxlen=KEPT_WINDOWS * window)

    def is_spike(self, loss: float) -> bool:
        """Whether a finite loss is above `factor` times the median; never before there are enough losses."""
        recent = [value for _, value in list(self.losses)[-self.window :]]
        return len(recent) >= min(FEWEST_LOSSES, self.window) and loss > self.factor * statistics.median(recent)

    def add(self, step: int, loss: float) -> None:
        """Keep the loss of a step whose update was applied."""
        self.losses.append((step, loss))

    def go_back(self, step: int) -> None:
        """Forget the losses after `step`."""
        self.losses = deque([pair for pair in self.losses if pair[0] <= step], maxlen=self.losses.maxlen)


class UpdateGate:
    """Guards the client optimizer's `step`, which DeepSpeed calls once or several times in an update.

    Attributes:
        closed: while true, updates are skipped.
        bad_norm: the non-finite gradient norm for which it closed itself in the last update; None if it didn't.
    """

    def __init__(self, zero: ZeroEngine) -> None:
        self._zero = zero
        self._client = zero.wrapper.client
        self._step = self._client.step
        self._client.step = self._guarded  # type: ignore[method-assign]
        self.closed = self._counted = False
        self.bad_norm: float | None = None

    def _guarded(self, *arguments: Any, **named: Any) -> Any:
        if not self.closed:
            norm = self._zero.wrapper.norm_in_step()
            if norm < 0 or not math.isfinite(norm):
                self.bad_norm, self.closed = math.nan if norm < 0 else norm, True
        if not self.closed:
            return self._step(*arguments, **named)
        if not self._counted:
            self._zero.model.skipped_steps += 1  # counted together with the steps that DeepSpeed skips
            self._counted = True
        return None

    def left_out(self) -> bool:
        """Whether the update that just ended was skipped, by this gate or by DeepSpeed; opens the gate."""
        closed, self.closed, self._counted = self.closed, False, False
        return closed or self._zero.wrapper.overflowed


class FaultPolicy:
    """Decides whether an update is applied, skipped or rolled back, the same on every rank, and records faults."""

    def __init__(
        self, zero: ZeroEngine, config: FaultConfig, output: Path, start: int | None, *, is_main: bool
    ) -> None:
        """
        Args:
            zero: the engine.
            config: the policies.
            output: folder of the run.
            start: step of the checkpoint that the run resumes from; None for a new run.
            is_main: whether this rank writes the records.
        """
        self._zero, self._config, self._is_main = zero, config, is_main
        self._record, self._losses = output / FAULTS_FILE, output / LOSSES_FILE
        self._gate = UpdateGate(zero) if config.judges_updates else None
        self._spikes = SpikeDetector(config.spike_factor, config.spike_window)
        self._fault: Fault | None = None
        self._faults = 0
        self.left_out: set[int] = set()
        """consumed samples before each global batch that is skipped after a rollback"""
        if start is not None:
            self.left_out = {found["cursor"]["consumed"] for found in read_faults(self._record) if _lasts(found)}
            self._read_losses(start)
        elif is_main:
            self._record.unlink(missing_ok=True)
            self._losses.unlink(missing_ok=True)

    @property
    def minds_gradients(self) -> bool:
        """Whether a non-finite gradient that is seen at a point of the curves is a fault that was not handled yet."""
        return self._zero.loss_scale is None and self._gate is None

    def judge(self, step: int, cursor: Cursor, loss: float) -> Fault | None:
        """Judge the loss of a step before its update, and close the gate if the update is to be skipped.

        Args:
            step: number of the step, from 1.
            cursor: position in the data before its global batch.
            loss: loss of the global batch, the same on every rank.

        Raises:
            RunError: the policy is to stop.
        """
        config, self._fault = self._config, None
        if not math.isfinite(loss):
            self._meet(Fault(step, cursor, "loss", loss, config.non_finite))
        elif config.spike != "ignore" and self._spikes.is_spike(loss):
            self._meet(Fault(step, cursor, "spike", loss, config.spike))
        elif config.spike != "ignore":
            self._spikes.add(step, loss)
        if self._fault is not None and self._gate is not None:
            self._gate.closed = True
        return self._fault

    def after_update(self, step: int, cursor: Cursor) -> Fault | None:
        """The fault of the step whose update just ended, if its loss or gradient had any.

        Raises:
            RunError: the policy is to stop, or there have been too many faults.
            RollBack: the policy is to roll back.
        """
        bad_norm = self._gate_result()
        if self._fault is None and bad_norm is not None:
            self._spikes.go_back(step - 1)
            self._meet(Fault(step, cursor, "gradient", bad_norm, self._config.non_finite))
        fault, self._fault = self._fault, None
        if fault is not None and fault.action == "rollback":
            raise RollBack(fault)
        return fault

    def _gate_result(self) -> float | None:
        """The gradient norm for which the update was skipped; None if it wasn't, or for an fp16 overflow."""
        zero, norm = self._zero, None
        if self._gate is not None:
            left_out, norm = self._gate.left_out(), self._gate.bad_norm
            self._gate.bad_norm = None
        else:
            left_out = zero.wrapper.overflowed
        if zero.loss_scale is not None or not left_out:
            return None
        return math.inf if norm is None else norm

    def _meet(self, fault: Fault) -> None:
        self._fault = fault
        self._faults += 1
        self._write(fault)
        if fault.action == "stop":
            raise failure(fault)
        if self._faults > self._config.max_faults:
            raise RunError(f"{fault}, fault number {self._faults} of this start; fault.max_faults is reached")
        if fault.action == "rollback":
            self.left_out.add(fault.cursor.consumed)

    def _write(self, fault: Fault) -> None:
        if self._is_main:
            value = fault.value if math.isfinite(fault.value) else str(fault.value)
            line = json.dumps({"time": time.time(), **asdict(fault), "value": value})
            with self._record.open("a") as file:
                file.write(line + "\n")

    def go_back(self, step: int) -> None:
        """The run was rolled back to `step`."""
        self._spikes.go_back(step)

    def saved(self) -> None:
        """A checkpoint is written: also write the recent losses, from which a resume goes on judging."""
        if self._is_main and self._config.spike != "ignore":
            write_atomically(self._losses, json.dumps(list(self._spikes.losses)))

    def _read_losses(self, start: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                for step, loss in json.loads(self._losses.read_text()):
                    self._spikes.add(int(step), float(loss))
            except (ValueError, TypeError) as error:
                raise UserError(f"output: {self._losses} is damaged ({error}); delete it") from error
        self._spikes.go_back(start)


def _lasts(found: dict[str, Any]) -> bool:
    return found.get("action") == "rollback"


def read_faults(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of `faults.jsonl`; a line that a crash truncated is left out."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(line)
