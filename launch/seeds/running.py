"""Starts runs, a number of them at once, and waits for them; a stop reaches all of them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

from engine.errors import RunError, UserError
from launch.launcher import WORLDS, free_port
from launch.seeds.plan import Member
from launch.slurm.sbatch import STARTED

SCRIPT = str(Path(__file__).resolve().parents[1] / "train.py")
#: stands in a launcher's options for a port that is free
PORT = "{port}"
#: signals that the runs get too; Ctrl-C reaches them by the terminal
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
INTERVAL = 0.05


def check_launcher(launcher: str, at_once: int, env: Mapping[str, str]) -> list[str]:
    """The words of a launcher's command line, with its program found; plain python without one.

    Raises:
        UserError: no such program; runs at once that would meet at one port; this command is under a launcher itself.
    """
    for _, size in WORLDS:
        if env.get(size, "").isdecimal() and int(env[size]) > 1:
            raise UserError(
                f"launcher: {size} is {env[size]}; start seeds by itself, and give it the launcher as --launcher"
            )
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"launcher: {launcher!r} can't be read ({error}); write it as in a shell") from error
    if not words:
        return [sys.executable]
    beside = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    program = shutil.which(words[0], path=beside)
    if program is None:
        raise UserError(f"launcher: {words[0]!r} is no program here; give one such as deepspeed, torchrun or mpirun")
    name, port = Path(program).name, "--master_port"
    apart = any(PORT in word or word.startswith(("--standalone", "--rdzv")) for word in words)
    if at_once > 1 and name in ("deepspeed", "torchrun") and not apart:
        raise UserError(
            f"launcher: {launcher!r} gives all runs the same port; add {port}={PORT} to run {at_once} at once"
        )
    return [program, *words[1:]]


class Runs:
    """Runs under way, and whether they were asked to stop."""

    def __init__(self, launcher: Sequence[str], at_once: int) -> None:
        self._launcher, self._at_once = launcher, at_once
        self._started: dict[subprocess.Popen[str], Member] = {}
        self.stopped_by: int | None = None
        """the signal"""

    def run_all(
        self,
        members: Sequence[Member],
        ended: Callable[[Member], None],
        lost: Callable[[Member, int], None] | None = None,
    ) -> int:
        """Run them to their ends, in order.

        Args:
            members: what to run.
            ended: called after each that has finished.
            lost: called with each that failed and its exit code, after which the others go on; None: no other is
                started.

        Returns:
            0, the exit code of a user's mistake, which the run has told, or that of a stop.

        Raises:
            RunError: a run failed, or was stopped alone, and `lost` is None; those beside it have ended.
        """
        heeded = [number for number in (*PASSED_ON, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._stop) for number in heeded}
        failed: tuple[Member, int] | None = None
        waiting = list(members)
        try:
            while (waiting and not failed and self.stopped_by is None) or self._started:
                while waiting and not failed and self.stopped_by is None and len(self._started) < self._at_once:
                    self._start(waiting.pop(0))
                for process in [process for process in self._started if process.poll() is not None]:
                    member = self._started.pop(process)
                    if process.returncode == 0 and member.is_finished:
                        ended(member)
                    elif lost is not None:
                        lost(member, process.returncode)
                    else:
                        failed = failed or (member, process.returncode)
                time.sleep(INTERVAL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._verdict(failed)

    def _verdict(self, failed: tuple[Member, int] | None) -> int:
        if self.stopped_by is not None:
            print(f"stopped by {signal.Signals(self.stopped_by).name}; the same command goes on", flush=True)
            return 130 if self.stopped_by == signal.SIGINT else 0
        if failed is None:
            return 0
        member, code = failed
        if code == 2:
            return code
        how = f"ended with exit code {code}" if code else "was stopped"
        raise RunError(f"{member.name}: {how} before its end; the same command goes on")

    def _start(self, member: Member) -> None:
        command = command_of(self._launcher, member.options)
        if member.log is not None:
            self._started[_logged(command, member.log)] = member
            return
        if self._at_once == 1:
            self._started[subprocess.Popen(command, text=True)] = member
            return
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        threading.Thread(target=_repeat, args=(process, member.name), daemon=True).start()
        self._started[process] = member

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.stopped_by = number
        for process in self._started if number in PASSED_ON else ():
            process.send_signal(number)


def command_of(launcher: Sequence[str], options: Sequence[str]) -> list[str]:
    """The command line of a training, with a free port where the launcher asks for one."""
    words = [word.replace(PORT, str(free_port())) if PORT in word else word for word in launcher]
    return [*words, SCRIPT, *options]


def _logged(command: Sequence[str], log: Path) -> subprocess.Popen[str]:
    """Start a run whose output goes to the end of a file, after its command."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{STARTED} {shlex.join(command)}\n")
        file.flush()
        return subprocess.Popen(command, text=True, stdout=file, stderr=subprocess.STDOUT)


def _repeat(process: subprocess.Popen[str], name: str) -> None:
    """Print what a run prints, with its name before each line."""
    assert process.stdout is not None
    for line in process.stdout:
        print(f"{name}: {line}", end="", flush=True)
