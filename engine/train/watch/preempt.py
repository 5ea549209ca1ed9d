"""Requests to stop: a signal only sets a flag, and all ranks act on it together at a step boundary.

What the launchers do with a signal that is sent to the launcher itself, measured with DeepSpeed 0.19, torch 2.13 and
Open MPI 5 on one machine:

| to | `deepspeed` | `torchrun` | `mpirun` |
|---|---|---|---|
| SIGUSR1 | dies at once, the ranks get nothing | dies at once, the ranks get nothing | the ranks get it: use this |
| SIGTERM | dies at once, the ranks get nothing | the ranks get it, and SIGKILL 30 s later | and SIGKILL at once |
| SIGINT | dies at once, the ranks get nothing | the ranks get it, and SIGKILL 30 s later | as SIGTERM |

SIGHUP, which a closed terminal sends to all of its processes, is a request like SIGTERM unless ignored (`nohup`).

Because launchers die without a signal to the ranks, the end of the launcher is a request to stop too: otherwise the
ranks would train on with nothing to end them. For `deepspeed` that is the end of its command or of its per-node
launcher; over pdsh and SSH, where a shell stays above the ranks, it is a closed pipe behind rank 0's output.

A signal to the whole process group (Ctrl-C, `kill -- -GROUP`) also reaches the ranks, except under torchrun, which
gives each a group of its own; `deepspeed` then ends them one after the other, each with SIGKILL 30 s later. SLURM's
`--signal` and `scancel` reach the tasks of srun, which are the ranks themselves, and nothing kills these before the
grace time is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from engine.durable import replace_durably

#: reasons to stop, by priority: a run whose user typed Ctrl-C is an interrupted one, whatever signals come with it
REASONS = ("SIGINT", "SIGUSR1", "SIGTERM", "SIGHUP", "the end of the launcher")
LAUNCHER_ENDED = REASONS[4]
MARKER = "REQUEUE"


@dataclass(frozen=True)
class Stop:
    """A stop that all ranks have agreed on."""

    reason: str
    by_a_person: bool
    """Ctrl-C outside of a scheduler: exit code 130, and no script may start the run again"""

    @property
    def code(self) -> int:
        """The exit code of every rank."""
        return 130 if self.by_a_person else 0


class Stopped(Exception):  # noqa: N818 - the run has done what it was asked to
    """Ends the run on every rank, once all agree that it was asked to stop."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.reason)
        self.stop = stop
        self.code = stop.code


def agreed_stop(counts: Sequence[float], scheduled: bool) -> Stop | None:
    """The stop that the sums of `StopRequest.counts` over the ranks ask for, if any.

    Args:
        counts: for each of REASONS, the number of ranks that have it.
        scheduled: whether a scheduler runs the job, so that SIGINT doesn't come from a person.
    """
    met = [reason for reason, count in zip(REASONS, counts, strict=True) if count > 0]
    return Stop(met[0], met[0] == "SIGINT" and not scheduled) if met else None


class StopRequest:
    """The requests to stop that this rank has received: signal handlers that set flags, and a check of the launcher.

    Python runs handlers in the main thread between two instructions, so a signal during a collective is seen after it.
    A forked child, such as a loader that is just starting, ignores all these signals but SIGTERM.
    """

    def __init__(self) -> None:
        self._received: set[str] = set()
        self._process = os.getpid()
        self._launcher: tuple[Path | None, int, int] | None = None

    def listen(self, *, launched: bool) -> None:
        """Handle SIGUSR1, SIGTERM and SIGHUP from now on.

        Args:
            launched: also watch whether the process that started this one, its launcher, has ended.
        """
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
                signal.signal(number, self._note)
        if launched:
            above = _deepspeed_launch(os.getppid())
            self._launcher = (above, os.getppid(), _parent(above) if above else 0)
            outlive_readers(self._note_launcher)

    def listen_to_interrupts(self) -> None:
        """Handle one SIGINT too, called once there is something to save; a second SIGINT ends the process."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # this is a child that was forked with these handlers
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._received.add(signal.Signals(number).name)
        outlive_readers()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def counts(self) -> list[float]:
        """For each of REASONS, 1 if this rank has it, else 0."""
        if LAUNCHER_ENDED not in self._received and self._launcher_ended():
            self._note_launcher()
        return [float(reason in self._received) for reason in REASONS]

    def _note_launcher(self) -> None:
        self._received.add(LAUNCHER_ENDED)

    def _launcher_ended(self) -> bool:
        if self._launcher is None:
            return False
        above, parent, grandparent = self._launcher
        return os.getppid() != parent or (above is not None and _parent(above) != grandparent)


class _Lenient:
    """A text stream that ignores a closed pipe, and calls `gone` when it finds one."""

    def __init__(self, stream: TextIO, gone: Callable[[], None] = lambda: None) -> None:
        self._stream, self._gone = stream, gone

    def write(self, text: str) -> int:
        with self._tolerant():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._tolerant():
            self._stream.flush()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._gone()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers(gone: Callable[[], None] = lambda: None) -> None:
    """Ignore closed pipes behind stdout and stderr: Ctrl-C also ends the `tee` behind a run, which has yet to save.

    Args:
        gone: called when something is printed to a closed pipe.
    """
    if not isinstance(sys.stdout, _Lenient):
        streams = (_Lenient(stream, gone) for stream in (sys.stdout, sys.stderr))
        sys.stdout, sys.stderr = streams  # type: ignore[assignment]


def _deepspeed_launch(pid: int) -> Path | None:
    """The /proc folder of a parent that is DeepSpeed's per-node launcher, itself a child of the `deepspeed` command."""
    folder = Path(f"/proc/{pid}")
    try:
        return folder if b"deepspeed.launcher.launch" in (folder / "cmdline").read_bytes() else None
    except OSError:
        return None


def _parent(folder: Path) -> int:
    """The parent of a process, 0 if that is unknown; the name in `stat` may hold spaces and brackets."""
    try:
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


def is_scheduled(env: Mapping[str, str]) -> bool:
    """Whether SLURM runs this process."""
    return "SLURM_JOB_ID" in env


def write_marker(output: Path, step: int) -> None:
    """Write the file that asks the batch script to requeue the job; its text is the step."""
    replace_durably(output / MARKER, f"{step}\n".encode())
