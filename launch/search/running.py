"""One trial: a run under way whose evaluations are told as they come, and that can be ended."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from engine.errors import UserError
from launch.curves import read_curves
from launch.seeds.running import command_of

#: seconds between looks at a run
INTERVAL = 0.5
#: seconds for a run that is ended to leave by itself
PATIENCE = 20.0
_DIES_WITH_PARENT = 1
#: exit code of a search that USR1 stopped, which a scheduler may start again (EX_TEMPFAIL)
STOPPED = 75


class Run:
    """A training in a process group of its own, which ends with this process whatever becomes of it."""

    def __init__(self, output: Path, options: Sequence[str], launcher: Sequence[str]) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output, self.log = output, output / "output.txt"
        self._told: dict[int, float] = {}
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                command_of(launcher, options),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def news(self, tag: str) -> Iterator[tuple[int, float]]:
        """Points of a curve that weren't told yet: step and value."""
        for step, value in points(self.output, tag):
            if step not in self._told:
                self._told[step] = value
                yield step, value

    def signal(self, number: int) -> None:
        """Pass a signal on, which a run answers by saving and stopping."""
        if self.code is None:
            self._process.send_signal(number)

    def end(self) -> None:
        """End the run, by force where it doesn't leave."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        _kill_group(self._process)

    def kill(self) -> None:
        """End the run at once, without a checkpoint."""
        _kill_group(self._process)

    def watch(self, look: Callable[[], bool], *, kill: bool = False) -> bool:
        """Wait for the end of the run, looking now and then; whether it ended by itself.

        Args:
            look: called every so often; False ends the run.
            kill: whether it then ends without a checkpoint.
        """
        while self.code is None:
            if not look():
                self.kill() if kill else self.end()
                return False
            time.sleep(INTERVAL)
        return True

    def last_words(self) -> str:
        """The last line that the run wrote."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else "it wrote nothing"


def points(output: Path, tag: str) -> list[tuple[int, float]]:
    """The points of a run's curve; none where there is no such curve yet."""
    try:
        return read_curves(output, [tag])[tag]
    except UserError:
        return []


def best_step(output: Path) -> int | None:
    """The step of the weights that a finished run exported as its best; None where it has no best."""
    path = output / "export" / "zerobert.json"
    best = json.loads(path.read_text(encoding="utf-8")).get("best") if path.is_file() else None
    return None if best is None else best["step"]


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the parent dies: a killed search must leave no run behind."""
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGTERM)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
