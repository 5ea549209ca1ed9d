"""Files for whoever supervises a run: its heartbeat, and how often it has been started.

<output>/heartbeat.json   step, loss and state of the run; rewritten every few seconds, as long as it makes progress
<output>/restarts.json    number of starts of this output folder, and the step at which the last ones began
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from engine.config import FaultConfig
from engine.durable import write_atomically
from engine.errors import UserError

State = Literal["starting", "training", "saving", "evaluating", "done", "preempted", "interrupted", "failed"]
HEARTBEAT_FILE = "heartbeat.json"
RESTARTS_FILE = "restarts.json"
#: seconds between two writes while the state stays
INTERVAL = 2.0


class Heartbeat:
    """Rank 0's heartbeat; one that is not `enabled` writes nothing.

    The file is written from the loop, not by a thread: an old one means that the run makes no progress.
    """

    def __init__(self, output: Path, *, enabled: bool, ranks: int = 1, restarts: int = 0) -> None:
        self._path, self.enabled = output / HEARTBEAT_FILE, enabled
        self._written = -math.inf
        self._values: dict[str, object] = {
            "time": 0.0,
            "step": 0,
            "total": 0,
            "loss": None,
            "tokens_per_second": None,
            "restarts": restarts,
            "job": os.environ.get("SLURM_JOB_ID"),
            "state": "starting",
            "host": socket.gethostname(),
            "ranks": ranks,
        }

    @property
    def state(self) -> object:
        return self._values["state"]

    def update(self, state: State | None = None, **values: float | None) -> None:
        """Set new values, and write the file if the state has changed or the last write is `INTERVAL` ago.

        Args:
            state: the new state, None if it is the same.
            values: any of step, total, loss and tokens_per_second; a number that is not finite becomes null.
        """
        changed = state is not None and state != self._values["state"]
        if state is not None:
            self._values["state"] = state
        for name, value in values.items():
            assert name in self._values
            self._values[name] = value if value is not None and math.isfinite(value) else None
        if self.enabled and (changed or time.monotonic() - self._written >= INTERVAL):
            self.write()

    def write(self) -> None:
        """Write the file now; errors are ignored, since a full disk is no reason to end a run."""
        self._written = time.monotonic()
        self._values["time"] = time.time()
        with contextlib.suppress(OSError):
            write_atomically(self._path, json.dumps(self._values) + "\n")


@dataclass(frozen=True)
class Starts:
    """The starts of an output folder so far."""

    starts: int = 0
    stalled: int = 0
    """number of the last starts in a row that began at `step`"""
    step: int | None = None

    def next(self, step: int) -> Starts:
        """The count with one more start, which begins at `step`."""
        return Starts(self.starts + 1, self.stalled + 1 if step == self.step else 1, step)


def read_starts(output: Path) -> Starts:
    """The starts so far; none where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    path = output / RESTARTS_FILE
    try:
        return Starts(**json.loads(path.read_text()))
    except FileNotFoundError:
        return Starts()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"output: {path} is damaged ({error}); delete it") from error


def check_restart(starts: Starts, step: int, config: FaultConfig, output: Path) -> None:
    """Refuse a restart where the last ones made no progress, or where there were too many.

    The user has to act then, so it is a `UserError`, whose exit code 2 tells a script not to try again.

    Args:
        starts: the starts before this one.
        step: step at which this one begins.
        config: has both bounds, max_restarts and max_stalled_restarts.
        output: the folder of the run.

    Raises:
        UserError: a bound is reached; names the file that holds the count.
    """
    bound, remedy = config.max_stalled_restarts, f"find out why, then delete {output / RESTARTS_FILE} to go on"
    if bound is not None and step == starts.step and starts.stalled >= bound:
        raise UserError(
            f"fault.max_stalled_restarts: the last {starts.stalled} starts began at step {step} too and saved nothing "
            f"further; {remedy}"
        )
    if config.max_restarts is not None and starts.starts > config.max_restarts:
        raise UserError(f"fault.max_restarts: {output} was restarted {starts.starts - 1} times; {remedy}")


def write_starts(output: Path, starts: Starts) -> None:
    """Write the count of starts for the next one."""
    write_atomically(output / RESTARTS_FILE, json.dumps(asdict(starts)) + "\n")


def forgive_start(output: Path) -> None:
    """This start ended in order, finished or asked to stop: it doesn't count as one without progress."""
    starts = read_starts(output)
    write_starts(output, Starts(starts.starts))
