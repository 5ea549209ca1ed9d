"""A rank that makes no progress ends itself, with the stack of every thread and the name of the rank that is to blame.

Every rank has its own watchdog, a daemon thread that calls no collective. It writes a beat at regular intervals:

    <output>/beats/rank-N     where rank N is: step, activity, host, process; see `Beat`
    <output>/hang/rank-N.txt  report of a rank that made no progress for fault.hang_timeout

A rank that hangs in Python or in a collective is ended by its own watchdog; one that is stopped or dead is named by the
others, because its beats are missing. The beats also tell which rank died when a collective fails.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.durable import write_atomically
from engine.errors import HANG_EXIT_CODE, LostRankError
from engine.train.output import is_used
from engine.train.watch.peers import is_running

#: largest number of seconds between beats; a short time-out needs more of them
LONGEST_INTERVAL = 30.0
#: port that is tried to see whether a host answers; a firewall inside of a cluster, if any, lets it through
SSH_PORT = 22
#: messages of gloo, NCCL and torch's store for a peer that has gone
BROKEN_COLLECTIVE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited or there was a network error",
    "NCCL communicator was aborted",
    "Gloo connectFullMesh failed",
)


@dataclass(frozen=True)
class Beat:
    """Where a rank is."""

    rank: int
    step: int
    activity: str
    """the activity that it began last"""
    count: int
    """number of activities that it has begun since its start, which orders ranks within the same step"""
    idle: float
    """seconds since it began the last one"""
    host: str
    process: int
    ended: str | None = None
    """why it ended, if it could record that"""
    age: float = 0.0
    """seconds since the beat was written; set by the reader"""


def behind(beats: Sequence[Beat], size: int, silence: float) -> list[int]:
    """The ranks that the others wait for: those without recent beats, else those that began the fewest activities.

    Args:
        beats: beats of the ranks that have written any.
        size: number of ranks.
        silence: age of a beat in seconds from which on its rank counts as stopped or dead.

    Returns:
        Ranks in ascending order; none if all are equally far.
    """
    quiet = {beat.rank for beat in beats if beat.age > silence or beat.ended is not None}
    quiet |= set(range(size)) - {beat.rank for beat in beats}
    if quiet:
        return sorted(quiet)
    least, most = min(beat.count for beat in beats), max(beat.count for beat in beats)
    return [beat.rank for beat in beats if beat.count == least] if least < most else []


def blame(beats: Sequence[Beat], ranks: Sequence[int], silence: float) -> str:
    """The ranks that are to blame as a text, with their hosts and what they did last."""
    if not ranks:
        return "all ranks are equally far"
    known = {beat.rank: beat for beat in beats}
    words = []
    for rank in ranks[:4]:
        beat = known.get(rank)
        if beat is None:
            words.append(f"rank {rank} left no beat")
        elif beat.ended is not None:
            words.append(f"rank {rank} on {beat.host} ended: {beat.ended}")
        elif beat.age > silence:
            words.append(f"rank {rank} on {beat.host} has been silent for {beat.age:.0f} s")
        else:
            words.append(f"rank {rank} on {beat.host} is behind, in {beat.activity!r} of step {beat.step + 1}")
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return "; ".join(words) + more


def unreachable(hosts: Iterable[str], patience: float = 3.0, most: int = 4) -> dict[str, str]:
    """The hosts that don't answer, and why; a host that refuses the connection does answer.

    Args:
        hosts: names of hosts; one that can't be resolved is left out, since the ranks may have met by address.
        patience: seconds to try each host.
        most: number of such hosts after which the search ends.
    """
    problems: dict[str, str] = {}
    for host in hosts:
        try:
            socket.create_connection((host, SSH_PORT), timeout=patience).close()
        except (ConnectionRefusedError, socket.gaierror):
            continue
        except OSError as error:
            problems[host] = error.strerror or str(error)
        if len(problems) == most:
            break
    return problems


class Watchdog:
    """This rank's watchdog; does nothing before `start`.

    Time in which the whole process was suspended doesn't count: only time in which the thread itself ran does.
    """

    def __init__(self, output: Path, rank: int = 0, size: int = 1, timeout: float | None = None) -> None:
        self.output, self.rank, self.size, self.timeout = output, rank, size, timeout
        self.interval = min(LONGEST_INTERVAL, timeout / 10 if timeout else LONGEST_INTERVAL)
        self.on_hang: Callable[[], None] = lambda: None
        self._step, self._activity, self._count = 0, "start", 0
        self._idle = 0.0
        self._host = socket.gethostname()
        self._ended: str | None = None
        self._held_back = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch from now on; no beat is written before `open`, since the folder may still be another run's."""
        self._held_back = True
        self._thread.start()

    def open(self) -> None:
        """Write beats from now on, since the folder is this run's; remove the beat of an earlier start."""
        self._held_back = False
        with contextlib.suppress(OSError):
            self._beat_file.unlink(missing_ok=True)

    def feed(self, activity: str, step: int | None = None) -> None:
        """Record progress: this rank begins an activity, after `step` steps."""
        self._activity = activity
        self._step = self._step if step is None else step
        self._count += 1

    def end(self, why: str | None = None) -> None:
        """Stop watching; if this rank ends by an error, record why."""
        self._ended = why
        self._stopping.set()
        if why is not None:
            self.beat()

    @property
    def _beat_file(self) -> Path:
        return self.output / "beats" / f"rank-{self.rank}"

    @property
    def _silence(self) -> float:
        return 3 * self.interval + 1

    def beat(self) -> None:
        """Write this rank's beat, if the run has its folder already; errors are ignored, as those of a full disk."""
        has_word = self._ended is not None and self.size > 1 and self.output.is_dir()
        if self._held_back or not (is_used(self.output) or has_word):
            return
        beat = Beat(
            self.rank, self._step, self._activity, self._count, self._idle, self._host, os.getpid(), self._ended
        )
        with contextlib.suppress(OSError):
            self._beat_file.parent.mkdir(exist_ok=True)
            write_atomically(self._beat_file, json.dumps(asdict(beat)))

    def beats(self) -> list[Beat]:
        """The beats of all ranks; their ages are by the file system's clock, which all hosts share."""
        self.beat()
        beats = []
        for rank in range(self.size):
            path = self.output / "beats" / f"rank-{rank}"
            with contextlib.suppress(OSError, ValueError, TypeError):
                age = self._beat_file.stat().st_mtime - path.stat().st_mtime
                beats.append(Beat(**{**json.loads(path.read_text()), "age": max(0.0, age)}))
        return beats

    def _watch(self) -> None:
        seen, last = self._count, time.monotonic()
        while not self._stopping.wait(self.interval):
            now = time.monotonic()
            self._idle = self._idle + min(now - last, 2 * self.interval) if self._count == seen else 0.0
            seen, last = self._count, now
            if self.timeout is not None and self._idle >= self.timeout:
                self._end_hang()
            self.beat()

    def _end_hang(self) -> None:
        try:
            self._report()
            self.on_hang()
        finally:
            os._exit(HANG_EXIT_CODE)

    def _report(self) -> None:
        beats = self.beats()
        late = behind(beats, self.size, self._silence)
        told = blame(beats, late, self._silence) + ("" if late else self._network(beats))
        folder = self.output / "hang"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self.rank}.txt").open("w") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}: rank {self.rank} of {self.size} on {self._host}, ")
            file.write(f"process {os.getpid()}, has been in {self._activity!r} of step {self._step + 1} ")
            file.write(f"for {self._idle:.0f} s (fault.hang_timeout {self.timeout:g})\n{told}\n\n")
            for beat in beats:
                file.write(f"rank {beat.rank} on {beat.host}: {beat.step} steps done, in {beat.activity!r} for ")
                file.write(f"{beat.idle:.0f} s, {beat.count} beginnings, beat {beat.age:.0f} s ago\n")
            file.write("\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        if self.rank == _first_outside(late, self.size):
            line = (
                f"error: no progress for {self._idle:.0f} s in step {self._step + 1}: {told}; "
                f"stacks in {folder}; exit code {HANG_EXIT_CODE}\n"
            )
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
        elif self.rank in late:  # once it exits the launcher ends the others, which must report first
            time.sleep(2 * self.interval)

    def _network(self, beats: Sequence[Beat]) -> str:
        """A note on hosts of other ranks that don't answer this one: the network may be cut."""
        silent = unreachable(sorted({beat.host for beat in beats} - {self._host}))
        return "".join(f"; {host} doesn't answer {self._host} ({why})" for host, why in silent.items())

    def lost_rank(self, error: BaseException, patience: float = 2.0) -> LostRankError | None:
        """The error that names the rank whose end made a collective fail; None if `error` is of another kind.

        The death of a rank on this host can be seen at once; of other hosts' ranks only what they recorded in beats.

        Args:
            error: the exception that the collective raised.
            patience: seconds to wait for the last beat of the rank that is to blame.
        """
        if self.size == 1 or not is_broken_collective(error):
            return None
        deadline = time.monotonic() + patience
        while True:
            beats = self.beats()
            gone = [beat for beat in beats if beat.rank != self.rank and self._is_gone(beat)]
            culprits = [beat for beat in gone if beat.ended != LostRankError.LAST_WORD]
            if culprits or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        told = "; ".join(_last_words(beat) for beat in culprits[:4]) or self._peer(str(error), beats)
        remedy = "" if culprits else " (see the other hosts' output)"
        step = f"in {self._activity!r} of step {self._step + 1}"
        message = f"{told} has gone, so rank {self.rank} can't go on {step}{remedy}"
        return LostRankError(message, speaks=self._speaks(beats, culprits))

    def _speaks(self, beats: Sequence[Beat], culprits: Sequence[Beat]) -> bool:
        """Whether this rank reports to the user: the first remaining rank, on each host where their knowledge differs.

        Whether a rank of another host is alive can't be known here, so each host reports for itself then.
        """
        gone = [beat.rank for beat in culprits]
        if culprits and all(beat.ended is not None for beat in culprits):
            return self.rank == _first_outside(gone, self.size)
        left = [beat.rank for beat in beats if beat.host == self._host and beat.rank not in gone]
        return self.rank == min([self.rank, *left])

    def _peer(self, message: str, beats: Sequence[Beat]) -> str:
        """The rank that a collective's error is about, by its host or at least its address if gloo gives one."""
        match = re.search(r"\[([\d.]+|[\da-fA-F:]+)\]:\d", message)
        if match is None:
            return "another rank"
        for host in sorted({beat.host for beat in beats}):
            with contextlib.suppress(OSError):
                if match[1] in {str(address[4][0]) for address in socket.getaddrinfo(host, None)}:
                    return "another rank" if host == self._host else f"a rank on {host}"
        return f"a rank at {match[1]}"

    def _is_gone(self, beat: Beat) -> bool:
        return beat.ended is not None or (beat.host == self._host and not is_running(beat.process))


def is_broken_collective(error: BaseException) -> bool:
    """Whether an exception says that another rank can't be reached."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in BROKEN_COLLECTIVE)


def _last_words(beat: Beat) -> str:
    where = f"rank {beat.rank} on {beat.host} (process {beat.process}, {beat.step} steps done)"
    return where if beat.ended is None else f"{where}, which ended with {beat.ended!r},"


def _first_outside(ranks: Sequence[int], size: int) -> int:
    """The lowest rank that is not among `ranks`; 0 if all are."""
    return next((rank for rank in range(size) if rank not in ranks), 0)
