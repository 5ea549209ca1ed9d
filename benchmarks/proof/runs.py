"""Training runs of a stage, by the project's own entry, several at a time, and what they leave behind."""

from __future__ import annotations

import csv
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.all import last_line
from benchmarks.common import ROOT

POLL_S = 0.05
#: no run leaves more than it must: curves as CSV, which need no further library, and no checkpoints
LEAN = ("--monitor.csv=true", "--monitor.tensorboard=false", "--monitor.texts=false", "--train.save_interval=null")


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    output: Path
    code: int
    seconds: float
    printed: str

    def curve(self, tag: str) -> list[tuple[int, float]]:
        """Points (step, value) of a curve such as train/loss; none where it has none."""
        path = self.output / "csv" / f"{tag.replace('/', '_')}.csv"
        if not path.exists():
            return []
        rows = list(csv.reader(path.read_text().splitlines()))[1:]
        return [(int(step), float(value)) for step, value in rows]

    @property
    def why(self) -> str:
        """The last line that it printed, where it failed."""
        return f"exit code {self.code}: {last_line(self.printed)}" if self.code else ""


def environment(device: str) -> dict[str, str]:
    """This environment without a launcher's variables, for ranks on a device."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "OMPI_", "PMI_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    return kept | own | ({"DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def command(options: Sequence[str], launcher: str = "python") -> list[str]:
    """Train on one rank, by plain python or under the launcher deepspeed."""
    script = str(ROOT / "launch" / "train.py")
    if launcher == "python":
        return [sys.executable, script, *options]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators=1"]
    return [*runner, f"--master_port={port}", script, *options]


@dataclass(frozen=True)
class Ended:
    """A process that has ended, by itself or at its limit."""

    code: int
    seconds: float
    printed: str


class Started:
    """A process under way, in the session of its stage, which ends it if it must."""

    def __init__(self, arguments: Sequence[str], log: Path, device: str) -> None:
        self._log, self._start = log, time.monotonic()
        with log.open("w") as output:
            self._process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment(device), stdout=output, stderr=subprocess.STDOUT, text=True
            )

    def ended(self, longest: float) -> Ended | None:
        """How it ended; None while it runs. It is ended after `longest` seconds."""
        seconds, late = time.monotonic() - self._start, ""
        if self._process.poll() is None:
            if seconds < longest:
                return None
            self._process.kill()
            late = f"\nended after {longest:.0f} s"
        code = self._process.wait()
        return Ended(code, seconds, self._log.read_text(errors="replace") + late)


def run_commands(
    commands: Mapping[str, Sequence[str]], scratch: Path, device: str, at_once: int, longest: float = math.inf
) -> Iterator[tuple[str, Ended]]:
    """Start commands in order, `at_once` of them at a time, each for at most `longest` seconds; yield each as it ends.

    Their output goes to logs in `scratch`.
    """
    waiting, running = list(enumerate(commands)), dict[str, Started]()
    while waiting or running:
        while waiting and len(running) < at_once:
            index, name = waiting.pop(0)
            running[name] = Started(commands[name], scratch / f"{index}.log", device)
        time.sleep(POLL_S)
        for name, started in list(running.items()):
            if (ended := started.ended(longest)) is not None:
                del running[name]
                yield name, ended


def run_all(
    runs: Mapping[str, Sequence[str]],
    scratch: Path,
    device: str,
    at_once: int,
    launchers: Mapping[str, str] | None = None,
) -> Iterator[tuple[str, Run]]:
    """Train, `at_once` runs at a time, and yield each as it ends.

    Args:
        runs: options of each by name, without its output folder, which is `scratch`/name.
        launchers: of the runs that plain python doesn't start.
    """
    commands = {
        name: command([f"--output={scratch / name}", *options], (launchers or {}).get(name, "python"))
        for name, options in runs.items()
    }
    for name, ended in run_commands(commands, scratch, device, at_once):
        yield name, Run(scratch / name, ended.code, ended.seconds, ended.printed)


def run_one(options: Sequence[str], output: Path, device: str) -> Run:
    """One run of plain python, to its end."""
    ((_, run),) = run_all({output.name: options}, output.parent, device, 1)
    return run


def tail(run: Run, lines: int = 12) -> None:
    """Print the end of what a run printed, which the stage's own output then ends with."""
    print(*run.printed.splitlines()[-lines:], sep="\n", flush=True)
